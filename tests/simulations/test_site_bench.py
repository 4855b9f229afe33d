"""Which sites stay open in a process that serves many."""

import gc
import weakref
from functools import partial
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from crafts_client.trainer import Trainer
from crafts_core.foundation import Foundation
from crafts_server.collection import Patience
from crafts_server.coordinator import Coordinator
from crafts_simulations import site_bench
from crafts_simulations.agreement import agree_on_patients, approve_roster
from crafts_simulations.local_grid import LocalGrid, TurnsHere
from crafts_simulations.run import run_scenario
from crafts_simulations.scenario import parse_scenario
from crafts_simulations.site_bench import SiteBench, SiteWork
from crafts_simulations.small_study import make_small_study
from support.foundations import tiny_foundation
from support.scenarios import tile_source, tiles_scenario_values

SITES = [f"site-{number:02d}" for number in range(20)]


class PlayedSite:
    """Remembers whether it still has its model."""

    def __init__(self, path: Path) -> None:
        self.name, self.has_model = path.name, True

    def close(self) -> None:
        self.has_model = False


class Opened:
    """Sites that were opened, as far as anybody holds them."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self._alive = weakref.WeakSet[PlayedSite]()

    def __call__(self, path: Path) -> PlayedSite:
        site = PlayedSite(path)
        self.names.append(site.name)
        self._alive.add(site)
        return site

    @property
    def alive(self) -> list[PlayedSite]:
        gc.collect()
        return sorted(self._alive, key=lambda site: site.name)


def bench(monkeypatch: pytest.MonkeyPatch, *, holds_sums: bool) -> tuple[SiteBench, Opened]:
    opened = Opened()
    monkeypatch.setattr(site_bench, "opener", lambda *_: opened)
    work = SiteWork(
        foundation="unused",
        device="cpu",
        homes={name: Path("homes") / name for name in SITES},
        repeatable_seed=None,
        holds_sums=holds_sums,
        is_verbose=False,
    )
    return SiteBench(work, None), opened  # type: ignore[arg-type]


def turn(serves: SiteBench, name: str) -> Message:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 0
    return serves(name, Message(RecordDict({"no": ConfigRecord({})}), 1, "train"))


@pytest.mark.slow
def test_the_newest_few_sites_are_open_and_others_open_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    serves, opened = bench(monkeypatch, holds_sums=False)
    replies = [turn(serves, name) for name in SITES]
    assert {reply.error.code for reply in replies} == {101}  # no message of a round
    assert [site.name for site in opened.alive] == SITES[-4:]
    turn(serves, SITES[-4])
    assert opened.names == SITES
    turn(serves, SITES[0])
    assert [site.name for site in opened.alive] == [SITES[0], SITES[-4], *SITES[-2:]]


@pytest.mark.slow
def test_of_sums_every_site_remembers_and_the_newest_few_have_models(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    serves, opened = bench(monkeypatch, holds_sums=True)
    for name in SITES:
        turn(serves, name)
    assert [site.name for site in opened.alive] == SITES
    assert [site.name for site in opened.alive if site.has_model] == SITES[-4:]
    turn(serves, SITES[0])
    assert opened.names == SITES


@pytest.mark.exhaustive
def test_one_process_has_models_of_a_few_sites_and_ends_in_the_bytes_of_many(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of six sites that train where the simulation runs."""
    alive = weakref.WeakSet[Trainer]()

    class Noted(Trainer):
        def __init__(self, *words: object, **options: object) -> None:
            super().__init__(*words, **options)  # type: ignore[arg-type]
            alive.add(self)

    monkeypatch.setattr("crafts_client.site.Trainer", Noted)
    values = tiles_scenario_values(tiny_foundation(tmp_path / "tiny").path)
    values["tiles"]["num_sites"] = 6
    values["stage"][0]["rounds"] = 2
    scenario = parse_scenario(values, "six sites").changed(repeatable=True)
    run = partial(run_scenario, scenario, source=tile_source(tmp_path), num_workers=0)
    most: dict[str, int] = {}

    def note(name: str, what: str, _done: int, _total: int) -> None:
        if " at site-" in what:
            most[name] = max(most.get(name, 0), len(alive))

    run(tmp_path / "few", progress=partial(note, "few"))
    gc.collect()
    monkeypatch.setattr(site_bench, "_MOST_OPEN", 6)
    run(tmp_path / "all", progress=partial(note, "all"))
    assert most == {"few": 4, "all": 6}
    few, all_open = (tmp_path / name / "adapter.safetensors" for name in ("few", "all"))
    assert few.read_bytes() == all_open.read_bytes()


@pytest.mark.exhaustive
def test_a_sum_that_is_held_outlives_the_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Every site gives up its model between its word and its vector."""
    monkeypatch.setattr(site_bench, "_MOST_OPEN", 1)
    foundation = tiny_foundation(tmp_path / "tiny")
    study = make_small_study(
        *(tmp_path / "study", foundation),
        num_sites=3,
        rounds=1,
        min_sites=3,
        aggregation={"rule": "alignment_regularized", "secure_aggregation": True},
    )
    agree_on_patients(study.coordinator, study.sites.values())
    approve_roster(study.coordinator, study.plan, study.sites.values())
    checkpoint = _ran(study, foundation)
    assert len(checkpoint.receipt().sites) == 3


def _ran(study, foundation: Foundation):
    work = SiteWork(
        foundation=str(foundation.path),
        device="cpu",
        homes=study.sites,
        repeatable_seed=None,
        holds_sums=True,
        is_verbose=False,
    )
    serves = SiteBench(work, foundation)
    nodes = {name: serves.node(name) for name in study.sites}
    now = Patience(poll_s=0.0, join_wait_s=0.0)
    coordinator = Coordinator(study.coordinator, study.plan, foundation, patience=now)
    return coordinator.run(LocalGrid(TurnsHere(nodes)))
