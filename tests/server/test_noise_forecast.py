"""What is said of a plan's noise is what its sites would add, beside a gradient they could have."""

import copy
import math

import pytest
import torch

from crafts_core.adapters import Adapter
from crafts_core.plan import Plan
from crafts_core.stages.objective import Objective
from crafts_core.stages.public_batch import probe_batch
from crafts_core.starting_point import initial_state
from crafts_privacy import noise_forecast as forecasts
from crafts_privacy.noise_forecast import NoiseForecast, noise_forecast, noise_std
from crafts_privacy.plan_noise import plan_noise_multiplier
from crafts_privacy.secure_aggregation.shares import own_noise_multiplier, total_noise_multiplier
from support.sites import plan_values


def plan_of(foundation, **privacy: object) -> Plan:
    values = plan_values(foundation.manifest.hash)
    return Plan.parse(values | {"privacy": values["privacy"] | privacy})


@pytest.mark.parametrize("patients", [[40], [20, 20], [30, 60, 90]])
def test_noise_is_what_sites_would_add(foundation, patients: list[int]) -> None:
    """Each adds noise of its own to the sum that its patients' share of the cohort weighs."""
    plan = plan_of(foundation)
    sigma, rate = plan_noise_multiplier(plan), plan.privacy.sample_rate
    source, total = torch.Generator().manual_seed(1), torch.zeros(200_000)
    for size in patients:
        noise = torch.randn(len(total), generator=source) * sigma / (rate * size)
        total += noise * size / sum(patients)
    assert float(total.std()) == pytest.approx(noise_std(plan, patients), rel=0.02)


def test_one_step_over_all_sites_has_the_shares_of_all(foundation) -> None:
    """Sized so that the shares of all but one make up one site's noise."""
    plan = plan_of(foundation)
    changes = {"trust": "distributed", "colluding_sites": 1}
    shared = plan.model_copy(update={"privacy": plan.privacy.model_copy(update=changes)})
    share = own_noise_multiplier(plan_noise_multiplier(plan), num_members=9, colluding_sites=1)
    drawn = plan.privacy.sample_rate * 180
    assert noise_std(shared, [20] * 9) == pytest.approx(total_noise_multiplier([share] * 9) / drawn)
    assert noise_std(shared, [20]) == pytest.approx(noise_std(plan, [20])), "too few for a sum"


def test_gradients_are_clipped_ones_of_the_plans_first_step(foundation) -> None:
    """Against autograd alone, for the first public patient."""
    plan = plan_of(foundation, max_grad_norm=1e-3)
    planned = next(iter(plan.rounds()))
    (first, *_) = forecasts._clipped_gradients(plan, planned, foundation)
    adapter = Adapter.attach(copy.deepcopy(foundation.generator.unet), plan.adapter)
    adapter.load_state(initial_state(foundation, plan.adapter, plan.study.seed, ("generator",)))
    parameters = list(adapter.trainable(planned.factor).values())
    objective = Objective(foundation, adapter, planned.stage)
    tile = probe_batch(foundation, forecasts._PATIENTS).select(torch.tensor([0]))
    batch = tile.repeat(plan.privacy.draws_per_tile)
    source = torch.Generator().manual_seed(plan.study.seed)
    loss = objective.loss_per_tile(batch, objective.draw(batch, source)).mean()
    parts = torch.autograd.grad(loss, parameters)
    wanted = torch.cat([part.flatten() for part in parts])
    assert float(wanted.norm()) > 1e-3, "the bound binds"
    torch.testing.assert_close(first, wanted / wanted.norm(), rtol=1e-3, atol=1e-5)


def test_spread_alone_is_no_gradient() -> None:
    """Rows that share a direction of length 0.5 beside rows that share none."""
    source = torch.Generator().manual_seed(0)
    spread = torch.randn(64, 4000, generator=source) / math.sqrt(4000)
    shared = torch.zeros(4000)
    shared[0] = 0.5
    assert forecasts._agreed_norm(spread + shared) == pytest.approx(0.5, abs=0.03)
    assert forecasts._agreed_norm(spread) < 0.05 < float(spread.mean(dim=0).norm())


def test_more_epsilon_patients_and_sites_help(foundation) -> None:
    few = noise_forecast(plan_of(foundation, target_epsilon=0.5), foundation, [12])
    more = noise_forecast(plan_of(foundation), foundation, [12] * 4)
    assert few.noise_over_gradient > more.noise_over_gradient > 0
    assert few.gradient_norm == more.gradient_norm
    assert few.steps == 8


@pytest.mark.parametrize(("noise_norm", "warns"), [(5.9, False), (6.1, True)])
def test_a_warning_where_noise_is_longer_than_what_adds_up(noise_norm: float, warns: bool) -> None:
    """A gradient of 0.5 over 16 steps goes as far as noise of 2 a step; three times that warns."""
    told = NoiseForecast(num_coordinates=10, gradient_norm=0.5, noise_norm=noise_norm, steps=16)
    assert told.is_drowned is warns
    assert told.in_words.startswith("WARNING") is warns
    assert "\n" not in told.in_words


def test_no_gradient_at_all_is_drowned() -> None:
    told = NoiseForecast(num_coordinates=10, gradient_norm=0.0, noise_norm=1.0, steps=16)
    assert told.is_drowned
    assert told.as_json()["noise_over_gradient"] is None
