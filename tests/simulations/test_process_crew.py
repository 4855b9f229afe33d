"""Turns on processes of this machine, which are real and light here."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from flwr.app import ConfigRecord, Message, RecordDict

from crafts_simulations.errors import ProcessError
from crafts_simulations.local_grid import LocalGrid
from crafts_simulations.process_crew import Answer, ProcessCrew, environment_of
from crafts_simulations.turn_pool import TurnPool
from support.turns import Ends, cannot_start, tells_where

LONG = "a" * 1_000_000
"""Longer than a pipe holds."""


def told_by(make: Callable[[], Answer], sites: list[str], *, num_places: int) -> list[ConfigRecord]:
    crew = ProcessCrew(make, lambda place: {"OMP_NUM_THREADS": str(place + 1)})
    with TurnPool(crew, sites, num_places=num_places) as pool:
        grid = LocalGrid(pool)
        content = RecordDict({"say": ConfigRecord({"text": LONG})})
        ids = list(grid.push_messages([Message(content, n, "train") for n in grid.get_node_ids()]))
        return [reply.content.config_records["told"] for reply in grid.pull_messages(ids)]


def test_each_process_answers_for_many_sites_in_an_environment_of_its_own() -> None:
    told = told_by(tells_where, ["a", "b", "c", "d"], num_places=2)
    assert [each["site"] for each in told] == ["a", "b", "c", "d"]
    assert {each["num_bytes"] for each in told} == {len(LONG)}
    assert {(each["pid"], each["threads"]) for each in told[:2]} == {
        (told[0]["pid"], "1"),
        (told[1]["pid"], "2"),
    }
    assert len({each["pid"] for each in told}) == 2


@pytest.mark.slow
def test_a_process_that_is_killed_is_started_anew_and_its_turn_run_again(tmp_path: Path) -> None:
    ends = Ends(tmp_path / "tries", times=1)
    told = told_by(ends, ["a", "b"], num_places=1)
    assert [each["site"] for each in told] == ["a", "b"]
    assert (tmp_path / "tries").read_text().split() == ["a", "a", "b", "b"]


@pytest.mark.slow
def test_a_process_that_is_always_killed_is_one_line_that_says_how(tmp_path: Path) -> None:
    with pytest.raises(ProcessError, match=r"works for a ended 3 times in one turn \(SIGKILL\)"):
        told_by(Ends(tmp_path / "tries", times=9), ["a"], num_places=1)


@pytest.mark.exhaustive
def test_processes_end_with_a_simulation_that_is_killed(tmp_path: Path) -> None:
    """Whoever starts it again would otherwise meet them in the hospitals' homes."""
    file, words = tmp_path / "pid", "from support.turns import start_sleeping; start_sleeping"
    with subprocess.Popen(
        [sys.executable, "-c", f"{words}({str(file)!r})"],
        env=os.environ | {"PYTHONPATH": ":".join(sys.path)},
    ) as program:
        wait_for(file.exists)
        program.kill()
    wait_for(lambda: not Path(f"/proc/{file.read_text()}").exists())


def wait_for(done: Callable[[], bool]) -> None:
    for _ in range(3000):
        if done():
            return
        time.sleep(0.1)
    raise TimeoutError


def test_what_stops_a_process_from_starting_is_told() -> None:
    with pytest.raises(ProcessError, match="cannot go on: FileNotFoundError: no foundation here"):
        told_by(cannot_start, ["a"], num_places=1)


def test_processes_share_the_threads_that_this_one_may_have(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    shares = [environment_of(0, num_places=count, device="cpu") for count in (1, 3, 99)]
    assert [each["OMP_NUM_THREADS"] for each in shares] == ["16", "5", "1"]
    assert all(each["OMP_NUM_THREADS"] == each["OPENBLAS_NUM_THREADS"] for each in shares)
    assert "CUDA_VISIBLE_DEVICES" not in shares[0]


@pytest.mark.parametrize(
    ("visible", "dealt"),
    [(None, ["0", "1", "2", "0", "1"]), ("4,GPU-7", ["4", "GPU-7", "4", "GPU-7", "4"])],
)
def test_gpus_are_dealt_out_by_turns(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, dealt: list[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = [environment_of(place, num_places=5, device="cuda") for place in range(5)]
    assert [each["CUDA_VISIBLE_DEVICES"] for each in found] == dealt
    assert "CUDA_VISIBLE_DEVICES" not in environment_of(0, num_places=5, device="cuda:1")
