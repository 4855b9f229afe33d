"""What is said of a plan's noise is what its sites would add, beside a gradient they could have."""

import copy
import math

import pytest
import torch

from crafts_core.adapters import Adapter
from crafts_core.plan import Plan
from crafts_core.stages.objective import Objective
from crafts_core.stages.public_batch import probe_batch
from crafts_core.stages.schedule import NoiseSchedule
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
    start = initial_state(foundation, plan.adapter, plan.study.seed, ("generator",))
    (first, *_) = forecasts._clipped_gradients(plan, planned, foundation, start)
    adapter = Adapter.attach(copy.deepcopy(foundation.generator.denoiser), plan.adapter)
    adapter.load_state(start)
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


@pytest.mark.slow
def test_what_is_told_first_is_no_step(foundation) -> None:
    """Measured where training starts, also where it contrasts the study's captions."""
    values = plan_values(foundation.manifest.hash)
    pretraining, alignment = values["stage"]
    alignment |= {"lambda_drift": 0.0, "lambda_align": 0.3, "alignment_loss": "contrast"}
    values["study"]["captions"] = ["tissue with glands", "tissue with sheets"]
    told = [{"name": "anchors", "noise_multiplier": 8}, {"name": "colour", "noise_multiplier": 8}]
    with_them, without, contrast = (
        Plan.parse(values | {"stage": stages})
        for stages in ([*told, pretraining], [pretraining], [*told, alignment])
    )
    found = noise_forecast(with_them, foundation, [12])
    assert found.gradient_norm == noise_forecast(without, foundation, [12]).gradient_norm
    assert found.steps == 4
    assert noise_forecast(contrast, foundation, [12]).gradient_norm != found.gradient_norm


def test_spread_alone_is_no_gradient() -> None:
    """Rows that share a direction of length 0.5 beside rows that share none."""
    source = torch.Generator().manual_seed(0)
    spread = torch.randn(64, 4000, generator=source).double() / math.sqrt(4000)
    shared = torch.zeros(4000)
    shared[0] = 0.5
    assert forecasts._agreed_norm(spread + shared) == pytest.approx(0.5, abs=0.03)
    assert forecasts._agreed_norm(spread) < 0.06 < float(spread.mean(dim=0).norm())


def test_two_errors_are_those_of_a_slow_jackknife() -> None:
    rows = torch.randn(7, 5, generator=torch.Generator().manual_seed(1)).double()

    def shared(chosen: list[int]) -> float:
        pairs = [float(rows[a] @ rows[b]) for a in chosen for b in chosen if a != b]
        return sum(pairs) / len(pairs)

    left = [shared([other for other in range(7) if other != one]) for one in range(7)]
    error = math.sqrt(6 / 7 * sum((each - sum(left) / 7) ** 2 for each in left))
    wanted = math.sqrt(max(0.0, shared(list(range(7))) + 2 * error))
    assert forecasts._agreed_norm(rows) == pytest.approx(wanted)


def test_a_sketch_keeps_inner_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecasts, "_SKETCH", 4096)
    first, second = torch.randn(2, 50_001, generator=torch.Generator().manual_seed(2))
    second = second + 0.5 * first
    found = forecasts._sketch(first) @ forecasts._sketch(second)
    scale = float(first.norm() * second.norm())
    assert float(found) / scale == pytest.approx(float(first @ second) / scale, abs=0.05)
    assert torch.equal(forecasts._sketch(first[:10]), first[:10].double())


@pytest.mark.parametrize("loss", ["correlation", "contrast"])
def test_the_share_of_alignment_is_its_own_gradients(
    foundation, monkeypatch: pytest.MonkeyPatch, loss: str
) -> None:
    """Against autograd on the alignment term alone, by the same tiles and draws."""
    monkeypatch.setattr(forecasts, "_PATIENTS", 3)
    values = plan_values(foundation.manifest.hash)
    values["study"] |= {"captions": list(dict.fromkeys(foundation.probe.captions))[:2]}
    values["stage"][1] |= {"lambda_align": 3.0, "alignment_loss": loss}
    plan = Plan.parse(values)
    captions = plan.captions_of(plan.stage[1])
    paler = forecasts._paler(foundation)
    assert not torch.equal(paler.probe.tiles_NCHW, foundation.probe.tiles_NCHW)
    adapter = Adapter.attach(copy.deepcopy(foundation.generator.denoiser), plan.adapter)
    adapter.load_state(initial_state(foundation, plan.adapter, plan.study.seed, ("generator",)))
    parameters = list(adapter.trainable(next(iter(plan.rounds())).factor).values())
    stage = plan.stage[1].model_copy(update={"lambda_drift": 0.0})
    anchors = foundation.aligner.embed_captions(list(captions)) if captions else None
    objective = Objective(paler, adapter, stage, class_anchors_KD=anchors)
    schedule = NoiseSchedule.of(foundation.generator)
    everybody = probe_batch(paler, 3, captions=captions)
    source, shares = torch.Generator().manual_seed(plan.study.seed), []
    for row in range(3):
        batch = everybody.select(torch.tensor([row])).repeat(plan.privacy.draws_per_tile)
        draws = objective.draw(batch, source)
        noisy = schedule.noisy(batch.latents_BCHW, draws.noise_BCHW, draws.timesteps_B)
        predicted = adapter.predict(noisy, draws.timesteps_B, draws.text(batch))
        denoised = schedule.denoised(noisy, predicted, draws.timesteps_B)
        term = 3.0 * objective._alignment(denoised, batch, draws).mean()
        whole = objective.loss_per_tile(batch, draws).mean()
        own, all_of_it = (
            torch.cat([part.flatten() for part in torch.autograd.grad(value, parameters)])
            for value in (term, whole)
        )
        shares.append(float(own.norm() / all_of_it.norm()))
    found = noise_forecast(plan, foundation, [40])
    assert found.alignment_share == pytest.approx(sum(shares) / 3, rel=1e-3)


@pytest.mark.parametrize(("share", "warns"), [(None, False), (0.09, True), (0.11, False)])
def test_alignment_that_moves_little_is_told(share: float | None, warns: bool) -> None:
    told = NoiseForecast(
        num_coordinates=10, gradient_norm=0.5, noise_norm=1.0, steps=16, alignment_share=share
    )
    assert ("of the gradient is of alignment" in told.in_words) is (share is not None)
    assert ("changes little" in told.in_words) is warns


@pytest.mark.slow
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
