"""The tile store: tiles on disk, indexed by patient, and the caches that feed training."""

from crafts_core.tiles.records import TileRecord, TileStoreError, encode_tile
from crafts_core.tiles.store import TileStore
from crafts_core.tiles.writer import TileStoreWriter

__all__ = ["TileRecord", "TileStore", "TileStoreError", "TileStoreWriter", "encode_tile"]
