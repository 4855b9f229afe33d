"""What a machine does with a shard of a table, for a process that is killed."""

from pathlib import Path

from crafts_client.ingest import cutting, shard_cut
from crafts_client.ingest.deidentify import Salt
from crafts_client.ingest.ingest import ingest_slides
from crafts_client.ingest.table import read_table
from crafts_client.ingest.table_shards import TableShard
from crafts_client.ingest.tiling import TilingOptions

SALT = Salt(bytes(32))


def cut(table: Path, out: Path, shard: TableShard | None) -> None:
    """Slowly, in small pieces; without a shard all of the table, which joins."""
    cutting.PLACES_PER_SHARD, shard_cut._COMMIT_EVERY_S = 20, 0.01
    ingest_slides(
        read_table(table),
        out,
        cohort="colon",
        salt=SALT,
        options=TilingOptions(tile_px=32, mpp=0.5),
        num_processes=0,
        shard=shard,
    )
