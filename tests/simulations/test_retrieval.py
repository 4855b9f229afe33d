"""Stage retrieval end to end: picked, trained on, killed, gone on with, exported, and measured."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from crafts_client.home import SiteHome
from crafts_core.evaluation.real_tiles import OverlapError
from crafts_core.pages import page_environment
from crafts_core.plan import Plan
from crafts_core.releases import ANCHORS, COLOUR
from crafts_core.retrieval import PublicLoss
from crafts_core.state import weights_of
from crafts_core.tiles import TileStore
from crafts_core.vocabulary import cancer_type, compose_caption
from crafts_privacy.accounting import epsilon
from crafts_privacy.ledger import Ledger
from crafts_server.aggregation import AlignmentRegularized
from crafts_server.checkpoints import Checkpoint
from crafts_server.cli import app
from crafts_server.export import retrieval_of, shared_state
from crafts_server.home import CoordinatorHome
from crafts_server.study_view import run_view
from crafts_simulations.errors import ScenarioError
from crafts_simulations.report import Report
from crafts_simulations.run import run_scenario
from crafts_simulations.scenario import Scenario, parse_scenario
from crafts_simulations.workspace import Workspace
from support.foundations import tiny_foundation
from support.open_tiles import open_table
from support.scenarios import tiny_scenario_values

pytestmark = pytest.mark.slow
CAPTIONS = tuple(compose_caption(cancer_type(code), None) for code in ("LUAD", "COAD"))
TARGET = 100.0
"""Little noise, so that twelve patients can be seen."""


def scenario_of(foundation: Path) -> Scenario:
    values = tiny_scenario_values(foundation)
    pretraining = values["stage"][0] | {"rounds": 1, "local_steps": 1}
    values["study"]["captions"] = list(CAPTIONS)
    values["privacy"] |= {"target_epsilon": TARGET, "tiles_per_patient": 9}
    values["stage"] = [
        {"name": "anchors", "noise_multiplier": 0.2},
        {"name": "colour", "noise_multiplier": 0.2},
        {"name": "retrieval", "public_steps": 4, "learning_rate": 0.05, "tiles_per_caption": 5},
        pretraining,
    ]
    return parse_scenario(values, "a test")


class KilledError(Exception):
    pass


@pytest.fixture(scope="module")
def foundation(tmp_path_factory: pytest.TempPathFactory):
    return tiny_foundation(tmp_path_factory.mktemp("foundation") / "tiny")


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return open_table(tmp_path_factory.mktemp("open"))


@pytest.fixture(scope="module")
def run(foundation, table: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    """Killed in its public steps, then gone on with; attacks on generators are tested elsewhere."""
    out, scenario = tmp_path_factory.mktemp("run") / "out", scenario_of(foundation.path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("crafts_simulations.results.attack", lambda _study: None)
        with patch.context() as first:
            first.setattr("crafts_server.coordinator.trained_on", killed)
            with pytest.raises(KilledError):
                run_scenario(scenario, out, pool=table, num_workers=0)
        return out, run_scenario(scenario, out, pool=table, num_workers=0)


def killed(*_arguments: object) -> None:
    raise KilledError


@pytest.fixture(scope="module")
def chain(run: tuple[Path, Report]) -> list[Checkpoint]:
    home = CoordinatorHome.open(run[0] / "coordinator")
    (run_id,) = [each.run_id for each in home.registry().runs()]
    return home.checkpoints(run_id).chain()


def test_the_coordinator_trains_alone_between_what_is_told_and_what_sites_train(
    chain: list[Checkpoint],
) -> None:
    receipts = [checkpoint.receipt() for checkpoint in chain[1:]]
    assert [each.stage for each in receipts] == ["anchors", "colour", "retrieval", "pretraining"]
    assert [len(each.sites) for each in receipts] == [2, 2, 0, 2]
    before, after = chain[2].state(), chain[3].state()
    assert all(torch.equal(before[name], after[name]) for name in (ANCHORS, COLOUR))
    assert not any(torch.equal(before[name], after[name]) for name in weights_of(after))
    assert receipts[2].step_norm > 0
    assert receipts[2].bytes_down == receipts[2].bytes_up == 0


def test_what_was_picked_is_in_the_receipt_and_on_the_card(
    run: tuple[Path, Report], chain: list[Checkpoint]
) -> None:
    record = retrieval_of(chain)
    assert record is not None
    assert record.num_tiles > 0
    assert record.captions == CAPTIONS
    generator = run[0] / "generator"
    card = (generator / "README.md").read_text()
    assert all(f"- {source}: {licence}" in card for licence, source in record.licences)
    assert "sites had told" in card
    assert (generator / "picked.tsv").read_text() == record.as_table()


def test_later_rounds_go_on_with_what_was_told_also_after_a_kill(
    foundation, table: Path, tmp_path: Path, monkeypatch
) -> None:
    """The same end, whether or not the process that picked is the one that aggregates."""
    values = scenario_of(foundation.path).model_dump(mode="json")
    values["scenario"]["repeatable"] = True
    values["stage"][2]["lambda_align"] = 0.5
    scenario = parse_scenario(values, "a test")
    monkeypatch.setattr("crafts_simulations.results.attack", lambda _study: None)
    monkeypatch.setattr("crafts_simulations.results.evaluate", killed)
    used: list[int] = []
    gradient = PublicLoss.gradient
    monkeypatch.setattr(
        PublicLoss,
        "gradient",
        lambda self, *a, seed, **k: (used.append(seed), gradient(self, *a, seed=seed, **k))[1],
    )

    def end_of(out: Path) -> Checkpoint:
        with pytest.raises(KilledError):
            run_scenario(scenario, out, pool=table, num_workers=0)
        home = CoordinatorHome.open(out / "coordinator")
        (run_id,) = [each.run_id for each in home.registry().runs()]
        return home.checkpoints(run_id).chain()[-1]

    whole = end_of(tmp_path / "whole")
    assert len(used) == scenario.aggregation.trust_steps
    with monkeypatch.context() as patch:
        patch.setattr(AlignmentRegularized, "move", killed)
        assert end_of(tmp_path / "cut").round == 3
    cut = end_of(tmp_path / "cut")
    assert (whole.round, cut.round) == (4, 4)
    assert used == used[:2] * 2
    assert all(torch.equal(whole.state()[name], cut.state()[name]) for name in whole.state())


def test_no_site_is_charged_for_it(run: tuple[Path, Report]) -> None:
    for name in ("north", "south"):
        ledger = Ledger(SiteHome.open(run[0] / "sites" / name).ledger_path)
        stages = [entry.stage for entry in ledger.entries() if entry.stage]
        assert "retrieval" not in stages
        (cohort,) = {entry.cohort for entry in ledger.entries() if entry.cohort}
        assert 0.98 * TARGET < epsilon(ledger.events(cohort), 1e-3) <= TARGET


def test_retrieval_is_a_row_of_the_table(run: tuple[Path, Report]) -> None:
    names = [arm.name for arm in run[1].evaluation.arms]
    assert names[-3:] == ["retrieved", "public_steps", "generator"]
    page = (run[0] / "report.html").read_text()
    assert "private retrieval" in page
    assert "trained on retrieved tiles" in page
    rounds = json.loads((run[0] / "report.json").read_text())["rounds"]
    assert rounds[2]["weights"] == {}


def test_pages_and_program_show_a_round_without_hospitals(
    run: tuple[Path, Report], chain: list[Checkpoint]
) -> None:
    home = CoordinatorHome.open(run[0] / "coordinator")
    view, record = run_view(home, chain[0].manifest.run_id), retrieval_of(chain)
    assert record is not None
    costs = {receipt.round: cost for receipt, cost in view.rounds}
    assert costs[3] == costs[2]
    assert costs[4].highest > costs[3].highest
    page = page_environment("crafts_server").get_template("run.html.j2")
    assert f"{record.in_words}; no hospital was asked" in page.render(run=view, refresh_s=5)
    shown = CliRunner().invoke(
        app, ["runs", "show", view.run.run_id, "--home", str(home.path)], catch_exceptions=False
    )
    assert "no site asked" in shown.output
    assert f"picked: {record.in_words}" in shown.output


def test_before_sites_train_the_generator_is_the_public_one(chain: list[Checkpoint]) -> None:
    home_plan = chain[0].path.parents[2]
    registry = CoordinatorHome.open(home_plan).registry()
    plan = Plan.parse(json.loads(registry.plan(chain[0].manifest.plan_hash).json))
    registry.close()
    after = shared_state(chain[:4], plan)
    assert all(torch.equal(after[name], tensor) for name, tensor in chain[3].state().items())


def test_a_pool_with_a_hospitals_tiles_is_refused(
    foundation, run: tuple[Path, Report], tmp_path: Path
) -> None:
    """Turned and paler: before anything is told."""
    out, table = tmp_path / "out", open_table(tmp_path / "open", num_cases=1, side_px=32)
    out.mkdir()
    for kept in ("hospitals", "sites", "heldout"):
        shutil.copytree(run[0] / kept, out / kept)
    store = TileStore.open(SiteHome.open(out / "sites" / "south").tile_store_path)
    tile = np.rot90(store.read_images(np.array([3]))[0]) // 2 + 100
    Image.fromarray(tile).save(tmp_path / "open" / "images" / "0.png")
    with pytest.raises(OverlapError, match=r"images/0\.png"):
        refused(foundation, out, table)


def refused(foundation, out: Path, table: Path) -> None:
    from crafts_core.public_pool import read_pool
    from crafts_simulations.public_tiles import refuse_known_tiles
    from crafts_simulations.study import LocalStudy

    scenario = scenario_of(foundation.path)
    study = LocalStudy(
        workspace=Workspace(out),
        scenario=scenario,
        plan=scenario.plan(foundation.manifest.hash, "b" * 64),
        foundation=foundation,
        signer="",
        device="cpu",
        num_workers=0,
        num_trainers=1,
        ray=None,
        real_processes=False,
        progress=lambda _what, _done, _total: None,
    )
    refuse_known_tiles(study, read_pool(table, tile_px=32, mpp=1.0))


@pytest.mark.parametrize(("picks", "gives"), [(True, False), (False, True)])
def test_a_pool_is_given_exactly_where_it_is_picked_from(
    foundation, table: Path, tmp_path: Path, picks: bool, gives: bool
) -> None:
    values = scenario_of(foundation.path).model_dump(mode="json")
    if not picks:
        del values["stage"][2]
    scenario = parse_scenario(values, "a test")
    with pytest.raises(ScenarioError, match="--pool"):
        run_scenario(scenario, tmp_path / "out", pool=table if gives else None)
