"""A private control stage from hospitals with masks to a generator that is steered by one."""

from pathlib import Path

import pytest
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from PIL import Image

from crafts_client.home import SiteHome
from crafts_core.foundation import Foundation
from crafts_core.tiles import TileStore
from crafts_privacy.ledger import Ledger
from crafts_simulations.report import Report
from crafts_simulations.run import run_scenario
from crafts_simulations.scenario import load_scenario, parse_scenario
from support.foundations import tiny_foundation
from support.scenarios import tiny_scenario_values

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def foundation(tmp_path_factory: pytest.TempPathFactory) -> Foundation:
    return tiny_foundation(tmp_path_factory.mktemp("foundation") / "tiny")


@pytest.fixture(scope="module")
def finished(foundation: Foundation, tmp_path_factory: pytest.TempPathFactory) -> Path:
    values = tiny_scenario_values(foundation.path)
    values["scenario"] |= {"holdings": "tiles"}
    for site in values["site"]:
        site |= {"slide_px": 64, "slides_per_patient": 2}
    stage = {"local_steps": 1, "learning_rate": 0.05}
    values["stage"] = [
        {"name": "pretraining", "rounds": 1, **stage},
        {"name": "control", "modality": "nuclei", "rounds": 2, **stage},
    ]
    values["adapter"] |= {"control_targets": ["to_q"]}
    values["aggregation"] |= {"ema_decay": 0.5}
    out: Path = tmp_path_factory.mktemp("run") / "out"
    with pytest.MonkeyPatch.context() as patch:  # attacks on generators are tested elsewhere
        patch.setattr("crafts_simulations.results.attack", lambda _study: None)
        run_scenario(parse_scenario(values, "tiny"), out, num_workers=0)
    return out


@pytest.fixture(scope="module")
def report(finished: Path) -> Report:
    return Report.model_validate_json((finished / "report.json").read_bytes())


def test_every_round_trains_its_own_part(report: Report) -> None:
    assert [(entry.stage, entry.factor) for entry in report.rounds] == [
        ("pretraining", "second"), ("control", "nuclei"), ("control", "nuclei")
    ]  # fmt: skip
    for entry in report.rounds[1:]:
        assert entry.weights.keys() == {"north", "south"}
        assert set(entry.gains.values()) == {None}, "nobody measured what a mask does to the text"
        assert (entry.step, entry.trust_norm) == (1.0, 0.0)
        assert entry.margin_before == entry.margin_after == report.rounds[0].margin_after


def test_the_sites_paid_for_every_stage_from_one_budget(finished: Path, report: Report) -> None:
    for site in report.sites:
        ledger = Ledger(SiteHome.open(finished / "sites" / site.name).ledger_path)
        assert [entry.stage for entry in ledger.entries()][1::2] == [
            "pretraining", "control", "control"
        ]  # fmt: skip
        assert site.epsilon is not None
        assert 7.5 < site.epsilon <= 8.0


def test_every_tile_came_with_its_nuclei(finished: Path) -> None:
    store = TileStore.open(SiteHome.open(finished / "sites" / "north").tile_store_path)
    assert store.num_tiles == 12
    assert store.has_condition(range(12), "nuclei").all()


def test_the_generator_is_steered_by_stock_diffusers(finished: Path, report: Report) -> None:
    control = ControlNetModel.from_pretrained(finished / "generator" / "controlnet" / "nuclei")
    StableDiffusionControlNetPipeline.from_pretrained(finished / "generator", controlnet=control)
    (steering,) = report.steering
    assert (steering.modality, steering.tiles) == ("nuclei", 16)
    assert [row.where for row in steering.found] == [
        "mask",
        "real", "reconstruction", "drawn", "without", "drawn_other"
    ]  # fmt: skip
    real, drawn = steering.found[1], steering.found[3]
    assert real.dice > max(0.5, drawn.dice), "a real tile's own mask is found in it"
    with Image.open(finished / "samples" / "steered-nuclei.png") as sheet:
        assert sheet.size[0] > sheet.size[1] > 4 * 32
    assert "Use with a condition" in (finished / "generator" / "README.md").read_text()
    assert "Does it follow its condition?" in (finished / "report.html").read_text()


def test_the_shipped_scenario_trains_control_alone() -> None:
    assert load_scenario("control").plan("0" * 64).parts == ("nuclei",)
