"""An ingest that is killed at any instant goes on, and the store ends up the same to the byte."""

import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from crafts_core.tiles import TileStore
from support.slides import write_table, write_tissue_slide

_RUN = """
import sys
from pathlib import Path
from crafts_client.ingest import cutting, shard_cut
from crafts_client.ingest.deidentify import (Salt)
from crafts_client.ingest.ingest import (ingest_slides)
from crafts_client.ingest.table import (read_table)
from crafts_client.ingest.tiling import (TilingOptions)
cutting.PLACES_PER_SHARD, shard_cut._COMMIT_EVERY_S = 20, 0.01

def go(table, out, processes):
    ingest_slides(read_table(Path(table)), Path(out), cohort="colon", salt=Salt(bytes(32)),
        options=TilingOptions(tile_px=16, mpp=0.5), num_processes=processes)

if __name__ == "__main__":
    print("ready", flush=True)
    go(sys.argv[1], sys.argv[2], int(sys.argv[3]))
"""


def files_of(path: Path) -> dict[str, bytes]:
    return {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}


def bytes_in(out: Path) -> int:
    return sum(path.stat().st_size for path in (out / "shards").glob("*.tar"))


def runs_to_its_end(program: Path, table: Path, out: Path, processes: int, *, until: int) -> bool:
    """Start it; SIGKILL when its shards hold more than so many bytes."""
    started = subprocess.Popen(
        [sys.executable, program, table, out, str(processes)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    while started.poll() is None:
        if bytes_in(out) > until:
            started.send_signal(signal.SIGKILL)
            started.wait()
        time.sleep(0.01)
    assert started.returncode in (0, -signal.SIGKILL)
    return started.returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("processes", [0, 2])
def test_killed_at_any_instant_it_ends_with_the_same_bytes(tmp_path: Path, processes: int) -> None:
    rows = []
    for number in range(2):
        write_tissue_slide(tmp_path / "site" / f"{number}.svs", seed=number)
        rows.append(f"{number}.svs,p{number},COAD")
    table = write_table(tmp_path / "site" / "t.csv", "file,patient,label", rows)
    (tmp_path / "run.py").write_text(_RUN)
    run = partial(runs_to_its_end, tmp_path / "run.py", table, processes=processes)
    assert run(tmp_path / "whole", until=10**9)
    whole = bytes_in(tmp_path / "whole")
    draw, num_kills = random.Random(processes), 0
    while not run(
        tmp_path / "s",
        until=bytes_in(tmp_path / "s") + int(draw.uniform(0.0, 0.4) * whole),
    ):
        num_kills += 1
        assert num_kills < 30, "it never gets to the end"
    assert num_kills >= 2
    assert files_of(tmp_path / "s") == files_of(tmp_path / "whole")
    TileStore.open(tmp_path / "s").verify()
