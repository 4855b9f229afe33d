"""A table in shards: cut on several machines, joined, and the same to the byte as cut on one."""

import multiprocessing
import random
import shutil
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from crafts_client import preparation
from crafts_client.cli import app
from crafts_client.home import SiteHome
from crafts_client.ingest.deidentify import Salt
from crafts_client.ingest.errors import IngestError
from crafts_client.ingest.ingest import ingest_slides
from crafts_client.ingest.report import IngestReport
from crafts_client.ingest.table import read_table
from crafts_client.ingest.table_shards import TableShard
from crafts_client.ingest.tiling import TilingOptions
from crafts_core.durable import exclusive_lock
from crafts_core.foundation import Foundation
from crafts_core.tiles import TileStore
from support import shard_jobs
from support.shard_jobs import SALT
from support.sites import make_site_home
from support.slides import write_table, write_tissue_slide

pytestmark = pytest.mark.slow

HALVES = (TableShard(1, 2), TableShard(2, 2))


def files_of(path: Path) -> dict[str, bytes]:
    return {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}


def names_in(shard: TableShard, number: int, salt: Salt = SALT) -> list[str]:
    """Patients that a salt puts into a shard."""
    named = (f"p{n}" for n in range(1000))
    found = [name for name in named if shard.has(salt.patient_id(name))]
    return found[:number]


def write_slides(folder: Path, patients: list[str]) -> Path:
    """One slide of each; the table's path."""
    for seed, patient in enumerate(patients):
        write_tissue_slide(folder / f"{patient}.svs", seed=seed)
    return write_table(
        folder / "t.csv", "file,patient,label", [f"{p}.svs,{p},COAD" for p in patients]
    )


def ingest(table: Path, out: Path, shard: TableShard | None = None) -> IngestReport:
    return ingest_slides(
        read_table(table),
        out,
        cohort="colon",
        salt=SALT,
        options=TilingOptions(tile_px=64, mpp=0.5),
        num_processes=0,
        shard=shard,
    )


@given(st.integers(1, 50), st.integers(0, 10**6))
def test_a_patient_is_in_one_shard_only(count: int, number: int) -> None:
    patient = SALT.patient_id(f"p{number}")
    assert sum(TableShard(n, count).has(patient) for n in range(1, count + 1)) == 1
    assert TableShard.parse(str(TableShard(1, count))) == TableShard(1, count)


@pytest.mark.parametrize("text", ["", "3", "0/4", "5/4", "1/0", "1/99999", "-1/4", "1/4/2", "a/b"])
def test_what_is_no_shard_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected I/N"):
        TableShard.parse(text)


def test_shards_cut_in_any_order_join_to_the_store_of_one_machine(tmp_path: Path) -> None:
    patients = [*names_in(HALVES[0], 2), *names_in(HALVES[1], 1)]
    table = write_slides(tmp_path / "site", patients)
    whole = ingest(table, tmp_path / "whole")
    parts = [ingest(table, tmp_path / "parts", shard) for shard in reversed(HALVES)]
    assert [part.num_tiles > 0 for part in parts] == [True, True]
    assert not (tmp_path / "parts" / "store.json").exists(), "a shard alone counts already"
    assert ingest(table, tmp_path / "parts") == whole
    assert files_of(tmp_path / "parts") == files_of(tmp_path / "whole")


def test_what_is_in_the_store_already_is_not_cut_by_a_shard(tmp_path: Path) -> None:
    patients = [*names_in(HALVES[0], 1), *names_in(HALVES[1], 1)]
    table = write_slides(tmp_path / "site", patients)
    ingest(table, tmp_path / "s")
    before = files_of(tmp_path / "s")
    again = ingest(table, tmp_path / "s", HALVES[0])
    assert (again.already, len(again.sources)) == (1, 1)
    assert files_of(tmp_path / "s") == before


def killed_until_done(table: Path, out: Path, draw: random.Random) -> int:
    """Both shards at once, and then the join; one of those at work is killed, how often."""
    num_kills = 0
    for wanted in (list(HALVES), [None]):
        while wanted:
            running = {shard: started(table, out, shard) for shard in wanted}
            victim, until = draw.choice(wanted), bytes_in(out) + draw.uniform(0, 40_000)
            ends_at = time.monotonic() + draw.uniform(0.0, 0.5) * (1 + num_kills)
            while running[victim].is_alive():
                if bytes_in(out) > until or time.monotonic() > ends_at:
                    running[victim].kill()
                    num_kills += 1
                    break
                time.sleep(0.005)
            for process in running.values():
                process.join()
            codes = {shard: process.exitcode for shard, process in running.items()}
            assert set(codes.values()) <= {0, -signal.SIGKILL}
            wanted = [shard for shard, code in codes.items() if code]
            assert num_kills < 60, "it never gets to the end"
    return num_kills


def started(table: Path, out: Path, shard: TableShard | None) -> BaseProcess:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["support.shard_jobs"])
    process = context.Process(target=shard_jobs.cut, args=(table, out, shard))
    process.start()
    return process


def bytes_in(out: Path) -> int:
    return sum(path.stat().st_size for path in (out / "shards").glob("*.tar"))


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(n, marks=pytest.mark.exhaustive) for n in range(1, 30))]
)
def test_shards_that_are_killed_join_to_the_same_bytes(tmp_path: Path, seed: int) -> None:
    patients = [*names_in(HALVES[0], 1), *names_in(HALVES[1], 1)]
    table = write_slides(tmp_path / "site", patients)
    whole = started(table, tmp_path / "whole", None)
    whole.join()
    assert killed_until_done(table, tmp_path / "s", random.Random(seed)) >= 1
    assert files_of(tmp_path / "s") == files_of(tmp_path / "whole")
    TileStore.open(tmp_path / "s").verify()


# ---- as an operator does it ------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        preparation,
        "ingest_slides",
        lambda *a, **k: ingest_slides(*a, **(k | {"num_processes": 0})),
    )


@pytest.fixture
def home(tmp_path: Path, foundation: Foundation) -> SiteHome:
    """A home without a store."""
    home = make_site_home(tmp_path / "site", foundation, "key")
    shutil.rmtree(home.tile_store_path)
    return home


@pytest.fixture
def table(tmp_path: Path, home: SiteHome) -> Path:
    """A slide for each of two shards."""
    salt = Salt.load(home.salt_path)
    patients = [names_in(shard, 1, salt)[0] for shard in HALVES]
    return write_slides(tmp_path / "slides", patients)


def run(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


def cut(home: SiteHome, table: Path, shard: str, *options: object) -> Any:
    return run("ingest", table, "--home", home.path, "--shard", shard, *options)


def join(home: SiteHome) -> Any:
    return run("tiles", "join", "--home", home.path)


def refused(result: Any) -> str:
    """The one line of a refusal."""
    assert result.exit_code == 1, result.output
    (line,) = result.stderr.strip().splitlines()
    return line


def test_a_home_in_shards_is_that_of_one_ingest(
    tmp_path: Path, home: SiteHome, table: Path
) -> None:
    shutil.copytree(home.path, tmp_path / "one")
    one = SiteHome.open(tmp_path / "one")
    assert run("ingest", table, "--home", one.path).exit_code == 0
    first = cut(home, table, "2/2")
    assert first.exit_code == 0, first.output
    assert "when all 2 shards are cut: crafts-client tiles join" in first.stdout
    assert "shard 1/2 is missing or not finished" in refused(join(home))
    assert "tiles join first" in refused(run("ingest", table, "--home", home.path))
    assert cut(home, table, "1/2").exit_code == 0
    joined = join(home)
    assert joined.exit_code == 0, joined.output
    assert files_of(home.tile_store_path) == files_of(one.tile_store_path)
    pictures = [files_of(each.pictures_path) for each in (home, one)]
    assert pictures[0] == pictures[1] != {}
    told = [
        IngestReport.model_validate_json(each.ingest_report_path.read_bytes()).sources
        for each in (home, one)
    ]
    assert told[0] == told[1]
    again = join(home)
    assert (again.exit_code, again.stdout.strip()) == (0, "no shard waits to be joined")


def test_one_slide_in_two_shards_is_told_at_the_join_and_nothing_is_joined(
    home: SiteHome, table: Path
) -> None:
    first, second = sorted(table.parent.glob("*.svs"))
    shutil.copy(first, second)
    for shard in HALVES:
        assert cut(home, table, str(shard)).exit_code == 0
    result = join(home)
    assert result.exit_code == 1
    assert "is the same slide as" in result.stderr
    assert not (home.tile_store_path / "store.json").exists()
    assert cut(home, table, "1/2").exit_code == 0, "cut again"


def test_a_shard_of_other_options_another_table_or_salt_is_named(
    home: SiteHome, table: Path
) -> None:
    assert cut(home, table, "1/2").exit_code == 0
    assert cut(home, table, "2/2", "--max-tiles", 2).exit_code == 0
    assert "shard 2/2 was cut with another --max-tiles than shard 1/2" in refused(join(home))
    assert cut(home, table, "2/2").exit_code == 0
    salt = home.salt_path.read_bytes()
    home.salt_path.write_bytes(bytes(32))
    assert "another salt than there is now" in refused(join(home))
    home.salt_path.write_bytes(salt)
    table.write_text(table.read_text().replace("COAD", "READ"))
    assert "another table than there is now" in refused(join(home))
    assert "shards of 3 do not fit together" in refused(cut(home, table, "1/3"))
    table.rename(table.with_suffix(".old"))
    assert "is not there; put it back" in refused(join(home))


def test_a_table_that_is_not_there_keeps_nobody_waiting(home: SiteHome, table: Path) -> None:
    assert "no table at" in refused(cut(home, table.with_name("typo.csv"), "1/4"))
    assert cut(home, table, "1/2").exit_code == 0


def test_a_patient_who_withdraws_before_the_join_is_not_in_it(home: SiteHome, table: Path) -> None:
    for shard in HALVES:
        assert cut(home, table, str(shard)).exit_code == 0
    gone, stays = (names_in(shard, 1, Salt.load(home.salt_path))[0] for shard in HALVES)
    asked = run("tiles", "forget", gone, "--home", home.path)
    assert "and 2 shards that wait for tiles join are lost" in asked.output
    forgotten = run("tiles", "forget", gone, "--home", home.path, "--yes")
    assert "call 2 shards again, whose tiles are lost" in forgotten.stdout
    assert not list(home.tile_store_path.rglob("*.tar"))
    for shard in HALVES:
        assert cut(home, table, str(shard)).exit_code == 0
    assert join(home).exit_code == 0
    store = TileStore.open(home.tile_store_path)
    assert store.patients == (Salt.load(home.salt_path).patient_id(stays),)


def test_two_at_one_shard_and_an_ingest_beside_shards_are_refused(
    tmp_path: Path, home: SiteHome, table: Path
) -> None:
    assert cut(home, table, "1/2").exit_code == 0
    lock = next((home.tile_store_path / "work").glob("*.lock"))
    with exclusive_lock(lock, held=IngestError("held")):
        assert "shard 1/2 is being cut elsewhere" in refused(cut(home, table, "1/2"))
        assert cut(home, table, "2/2").exit_code == 0, "others go on"
    lock = home.path / "ingest.lock"
    with exclusive_lock(lock, held=IngestError("held"), is_shared=True):
        assert cut(home, table, "2/2").exit_code == 0
        assert "another ingest or forget is at work" in refused(join(home))
    with exclusive_lock(lock, held=IngestError("held")):
        assert "another ingest or forget is at work" in refused(cut(home, table, "2/2"))
