"""The tile store: tiles on disk, indexed by patient, and the caches that feed training."""

from crafts_core.tiles.records import TileRecord, TileStoreError, encode_tile
from crafts_core.tiles.store import TileStore, damaged_files
from crafts_core.tiles.writer import TileStoreWriter

__all__ = [
    "TileRecord",
    "TileStore",
    "TileStoreError",
    "TileStoreWriter",
    "damaged_files",
    "encode_tile",
]
