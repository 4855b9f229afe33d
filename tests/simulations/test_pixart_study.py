"""A whole private study on a PixArt-class foundation, from slides to a stock pipeline."""

import math
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

from crafts_core.foundation import load
from crafts_simulations.run import run_scenario
from crafts_simulations.scenario import parse_scenario
from support.foundations import write_tiny_foundation
from support.scenarios import tiny_scenario_values

pytestmark = pytest.mark.slow


def test_hospitals_train_it_privately_and_anybody_draws_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "crafts_simulations.results.attack", lambda _study: None
    )  # tested elsewhere
    foundation = write_tiny_foundation(tmp_path / "foundation", pixart=True)
    values = tiny_scenario_values(foundation)
    values["adapter"]["targets"] = ["to_q", "to_v", "proj_out"]
    values["stage"] = [stage | {"rounds": 1} for stage in values["stage"]]
    scenario = parse_scenario(values, "a test")
    report = run_scenario(scenario, tmp_path / "out", num_workers=0)
    assert [entry.stage for entry in report.rounds] == ["pretraining", "alignment"]
    assert all(not entry.refused for entry in report.rounds)
    assert all(math.isclose(site.epsilon or 0, 8, rel_tol=0.1) for site in report.sites)
    out = tmp_path / "out"
    assert not (out / "adapter.safetensors").exists(), "its pipeline reads no LoRA file"
    pipeline = DiffusionPipeline.from_pretrained(out / "generator")
    assert type(pipeline).__name__ == "PixArtAlphaPipeline"
    before = load(foundation).generator.denoiser.state_dict()
    after = pipeline.transformer.state_dict()
    moved = [name for name in after if not torch.equal(after[name], before[name])]
    assert moved
    assert all(name.endswith(("to_q.weight", "to_v.weight", "proj_out.weight")) for name in moved)
    again = run_scenario(scenario, out, num_workers=0)
    assert again.evaluation == report.evaluation, "nothing is made twice"
