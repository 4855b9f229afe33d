"""Turns on Ray. What runs there is tested without it; Ray itself is for long runs of tests."""

import importlib.util
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from typer.testing import CliRunner

from crafts_core.durable import write_file
from crafts_privacy import place
from crafts_simulations import cli
from crafts_simulations import run as simulation
from crafts_simulations.errors import ScenarioError
from crafts_simulations.local_grid import LocalGrid
from crafts_simulations.ray_crew import RayCrew, TurnActor
from crafts_simulations.scenario import parse_scenario
from crafts_simulations.site_bench import SiteWork
from crafts_simulations.turn_pool import TurnPool
from support.foundations import tiny_foundation
from support.scenarios import tile_source, tiles_scenario_values
from support.turns import Answer, PlayedWork, tells_where

run_scenario = partial(simulation.run_scenario, num_workers=0)


def on_ray(test: Callable[..., None]) -> Callable[..., None]:
    """Starts Ray, which takes a while and leaves its processes to the garbage collector."""
    marks = (
        pytest.mark.exhaustive,
        pytest.mark.network,
        pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray"),
        pytest.mark.filterwarnings("ignore::ResourceWarning"),
        pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    )
    for mark in marks:
        test = mark(test)
    return test


def message(text: str = "hello") -> Message:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 0
    return Message(RecordDict({"say": ConfigRecord({"text": text})}), 1, "train")


def test_an_actor_makes_what_answers_once_and_when_it_is_first_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = []

    def make() -> Answer:
        made.append(1)
        return tells_where()

    monkeypatch.setattr(place, "MACHINE_ID", place.MACHINE_ID)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    actor = TurnActor(make)
    assert not made
    for site in ("a", "b"):
        assert actor.answer(site, message()).content.config_records["told"]["site"] == site
    assert len(made) == 1


def test_on_ray_a_ledger_is_of_its_folder_on_whatever_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ledger = tmp_path / "ledger.db"
    write_file(ledger, "")
    write_file(tmp_path / "machine", "a" * 32)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(place, "MACHINE_ID", tmp_path / "machine")
    here = place.Place.of(ledger, "id")
    write_file(tmp_path / "machine", "b" * 32)
    assert place.Place.of(ledger, "id").differences(here) == ["another machine"]
    TurnActor(tells_where).answer("a", message())
    assert place.Place.of(ledger, "id").differences(here) == []


def test_without_ray_one_line_says_which_extra(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ScenarioError, match=r"^--ray needs Ray: pip install .*\[ray\]' "):
        RayCrew(work(tmp_path), "local", num_places=1)


def test_real_programs_and_ray_exclude_each_other(tmp_path: Path) -> None:
    words = ["run", "quickstart", "--out", str(tmp_path / "out"), "--processes", "--ray", "local"]
    told = CliRunner().invoke(cli.app, words)
    assert told.exit_code == 1
    assert "leave out --processes or --ray" in told.stderr


def work(folder: Path, *sites: str) -> SiteWork:
    return SiteWork(
        foundation=str(folder),
        device="cpu",
        homes=dict.fromkeys(sites, folder),
        repeatable_seed=None,
        holds_sums=False,
        is_verbose=False,
    )


class PlayedRay:
    """A cluster that others use: what it has, what is free, and when an actor gets room.

    Actors live in this process. One without room answers after ``waits`` looks at its replies.
    """

    class exceptions:  # noqa: N801  # Ray's own name
        class RayError(Exception):
            pass

        class RayTaskError(RayError):
            pass

    def __init__(self, *, has: dict[str, float], free: dict[str, float], waits: int = 0) -> None:
        self.has, self.free, self.waits = has, free, waits
        self.looks: list[float | None] = []

    def init(self, **_: object) -> None:
        pass

    def shutdown(self) -> None:
        pass

    def kill(self, _actor: object) -> None:
        pass

    def cluster_resources(self) -> dict[str, float]:
        return self.has

    def available_resources(self) -> dict[str, float]:
        return self.free

    def remote(self, **_: object) -> Callable[[type], object]:
        def actor_class(made: type) -> object:
            return SimpleNamespace(remote=lambda *words: self._handle(made(*words)))

        return actor_class

    def _handle(self, actor: TurnActor) -> object:
        answer = SimpleNamespace(remote=lambda *words: partial(actor.answer, *words))
        return SimpleNamespace(
            is_here=SimpleNamespace(remote=lambda: partial(actor.is_here)), answer=answer
        )

    def wait(
        self, words: list[Callable[[], object]], *, num_returns: int, timeout: float | None
    ) -> tuple[list[object], list[object]]:
        self.looks.append(timeout)
        if self.waits:
            self.waits -= 1
            return [], list(words)
        return list(words[:num_returns]), list(words[num_returns:])

    def get(self, word: Callable[[], object]) -> object:
        return word()


def played(monkeypatch: pytest.MonkeyPatch, cluster: PlayedRay) -> None:
    monkeypatch.setitem(sys.modules, "ray", cluster)
    monkeypatch.setattr(place, "MACHINE_ID", place.MACHINE_ID)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.mark.parametrize(
    ("device", "free", "asked", "places"),
    [
        ("cpu", {"CPU": 8.0, "GPU": 2.0}, None, 5),
        ("cpu", {"CPU": 3.5}, None, 3),
        ("cpu", {"CPU": 3.0}, 4, 3),
        ("cpu", {"CPU": 3.0}, 2, 2),
        ("cpu", {}, None, 1),
        ("cuda", {"CPU": 8.0, "GPU": 2.0}, None, 2),
        ("cuda", {"CPU": 1.0, "GPU": 2.0}, None, 1),
    ],
)
def test_as_many_actors_as_are_free_now_and_one_at_least(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    device: str,
    free: dict[str, float],
    asked: int | None,
    places: int,
) -> None:
    """Of eight CPUs and two GPUs, for five sites."""
    played(monkeypatch, PlayedRay(has={"CPU": 8.0, "GPU": 2.0}, free=free))
    sites = replace(work(tmp_path, *"abcde"), device=device)
    assert RayCrew(sites, "auto", num_places=asked).num_places == places


def test_more_than_the_whole_cluster_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    played(monkeypatch, PlayedRay(has={"CPU": 2.0}, free={"CPU": 2.0}))
    with pytest.raises(ScenarioError, match=r"has room for 2 processes of one CPU each, and 3 are"):
        RayCrew(work(tmp_path, *"abc"), "auto", num_places=3)


def test_waiting_for_room_is_said_once_and_ends(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cluster = PlayedRay(has={"CPU": 4.0}, free={}, waits=4)
    played(monkeypatch, cluster)
    job = SimpleNamespace(homes={"a": tmp_path}, device="cpu", is_verbose=False, bench=tells_where)
    crew = RayCrew(job, "auto", num_places=None)  # type: ignore[arg-type]
    with caplog.at_level(logging.WARNING), TurnPool(crew, ["a"], num_places=1) as pool:
        reply = pool.begin("a", message())()
    assert reply.content.config_records["told"]["site"] == "a"
    said = [record.getMessage() for record in caplog.records]
    assert [line for line in said if "1 of 1 processes have not begun" in line] == said
    assert len(said) == 1
    assert None not in cluster.looks, "no look is without an end"


@on_ray
def test_killed_actors_are_started_anew_and_replies_stay_in_order(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # actors find what tests play
    sites = ["a", "b", "c"]
    played = PlayedWork(sites, tmp_path / "tries")
    crew = RayCrew(
        played,  # type: ignore[arg-type]
        "local",
        num_places=2,
    )
    assert crew.num_places == 2
    with TurnPool(crew, sites, num_places=2) as pool:
        grid = LocalGrid(pool)
        content = RecordDict({"say": ConfigRecord({"text": "a" * 1_000_000})})
        ids = list(grid.push_messages([Message(content, n, "train") for n in grid.get_node_ids()]))
        told = [reply.content.config_records["told"] for reply in grid.pull_messages(ids)]
    assert [each["site"] for each in told] == sites
    assert sorted((tmp_path / "tries").read_text().split()) == sorted(2 * sites)


@on_ray
def test_two_actors_leave_the_bytes_of_one_process(tmp_path: Path) -> None:
    foundation = tiny_foundation(tmp_path / "tiny")
    scenario = parse_scenario(tiles_scenario_values(foundation.path), "t").changed(repeatable=True)
    source = tile_source(tmp_path)
    run_scenario(scenario, tmp_path / "here", source=source)
    run_scenario(scenario, tmp_path / "ray", source=source, num_trainers=2, ray="local")
    name = "adapter.safetensors"
    assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "ray" / name).read_bytes()


@pytest.mark.parametrize("address", ["127.0.0.1:9", "nonsense"])
def test_a_cluster_that_is_not_there_is_one_line(tmp_path: Path, address: str) -> None:
    pytest.importorskip("ray")
    with pytest.raises(ScenarioError, match=f"^no Ray at {address}: .* takes local, auto or"):
        RayCrew(work(tmp_path, "a"), address, num_places=1)
