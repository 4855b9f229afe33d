"""One slide's tiles on disk, committed whole: what makes ingest resume slide by slide.

A part is a Parquet file beside the store to be. Its name is a hash of everything that decides its
content, so a part made with other options, or from a file that changed since, is never taken.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from crafts_client.ingest.table import TableRow
from crafts_client.ingest.tiling import TilingOptions
from crafts_core.durable import sync

_FORMAT = 1
_REJECTED_KEY = b"rejected"

PART_SCHEMA = pa.schema(
    [
        ("x", pa.int64()),
        ("y", pa.int64()),
        ("width", pa.float64()),
        ("height", pa.float64()),
        ("tissue_fraction", pa.float64()),
        ("sharpness", pa.float64()),
        ("jpeg", pa.binary()),
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class CutTile:
    """A tile as it comes from a slide, before it has an id."""

    x: int
    y: int
    width: float
    height: float
    tissue_fraction: float
    sharpness: float
    jpeg: bytes


def part_path(folder: Path, slide_id: str, row: TableRow, options: TilingOptions) -> Path:
    """Where the part of a slide lies."""
    status = row.path.stat()
    content = [_FORMAT, slide_id, asdict(options), row.mpp, status.st_size, status.st_mtime_ns]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return folder / f"{digest[:32]}.parquet"


def write_part(path: Path, tiles: Sequence[CutTile], rejected: dict[str, int]) -> None:
    """Commit a slide's tiles in one rename."""
    columns = {
        name: pa.array([getattr(tile, name) for tile in tiles], PART_SCHEMA.field(name).type)
        for name in PART_SCHEMA.names
    }
    metadata = {_REJECTED_KEY: json.dumps(rejected).encode()}
    partial = path.with_suffix(".partial")
    pq.write_table(pa.table(columns, schema=PART_SCHEMA.with_metadata(metadata)), partial)
    sync(partial)
    partial.rename(path)


def read_part(path: Path) -> list[CutTile]:
    """The tiles of a committed part."""
    return [CutTile(**values) for values in pq.read_table(path).to_pylist()]


def read_part_counts(path: Path) -> tuple[int, dict[str, int]]:
    """How many tiles a part holds and what was rejected, without reading pixels."""
    metadata = pq.read_metadata(path)
    rejected: dict[str, int] = json.loads(metadata.metadata[_REJECTED_KEY])
    return metadata.num_rows, rejected
