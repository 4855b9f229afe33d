"""Processes that read damaged files: one that dies or hangs costs its file and nothing else."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from crafts_client.ingest.errors import SlideError
from crafts_client.ingest.pool import DIED, HANGS, Pool
from support.pool_jobs import behave


def outcomes(jobs: list[tuple[str, str]], silence_s: float = 60) -> list[str]:
    with Pool(2, silence_s=silence_s) as pool:
        found = dict(pool.run(behave, jobs))
    return [str(found[place]) for place in range(len(jobs))]


def test_file_that_kills_its_reader_is_named_and_the_others_go_on() -> None:
    told = outcomes([("fine", "a"), ("die", "b"), ("refuse", "odd"), ("fine", "c")])
    assert told == ["fine a", DIED, "odd", "fine c"]


def test_process_that_the_system_ended_is_tried_again(tmp_path: Path) -> None:
    assert outcomes([("die once", str(tmp_path / "died"))]) == [f"die once {tmp_path / 'died'}"]


@pytest.mark.slow
def test_file_that_never_ends_is_given_up_but_a_slow_one_is_not() -> None:
    """The slow job takes longer than the limit in all, and gives signs of life meanwhile."""
    told = outcomes([("hang", "a"), ("slow", "b"), ("fine", "c")], silence_s=3)
    assert told == [HANGS, "slow b", "fine c"]


def test_other_errors_end_the_run() -> None:
    with pytest.raises(OSError, match="no space left"):
        outcomes([("raise", "a")])


def test_in_this_process_a_refusal_is_a_result_too() -> None:
    beats: list[int] = []
    with Pool(0) as pool:
        told = dict(pool.run(behave, [("refuse", "odd"), ("fine", "a")], on_beat=beats.append))
    assert isinstance(told[0], SlideError)
    assert told[1] == "fine a"


@pytest.mark.slow
def test_beats_of_all_processes_arrive() -> None:
    beats: list[int] = []
    with Pool(2, silence_s=60) as pool:
        list(pool.run(behave, [("slow", "a"), ("slow", "b")], on_beat=beats.append))
    assert sum(beats) == 24


_RUN = """
import sys
from crafts_client.ingest.pool import Pool
from support.pool_jobs import behave

if __name__ == "__main__":
    with Pool(1) as pool:
        list(pool.run(behave, [("hang for good", sys.argv[1])]))
"""


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it ends when the library lets it")
def test_worker_that_hangs_does_not_outlive_a_killed_program(tmp_path: Path) -> None:
    """It would hold its shard, and the next run would wait for it in vain."""
    (tmp_path / "run.py").write_text(_RUN)
    noted = tmp_path / "pid"
    program = subprocess.Popen(
        [sys.executable, tmp_path / "run.py", noted],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    for _ in range(600):
        if noted.exists() and noted.read_text():
            break
        time.sleep(0.05)
    worker = int(noted.read_text())
    assert is_running(worker)
    program.kill()
    program.wait()
    for _ in range(100):
        if not is_running(worker):
            return
        time.sleep(0.05)
    os.kill(worker, 9)
    pytest.fail("the worker is still there")
