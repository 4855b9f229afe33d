"""The variance formula against the optimizer that makes the noise, and the bounds around it."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from crafts_core.exchange import RoundReply
from crafts_core.plan_sections import StageConfig
from crafts_privacy.declared_noise import (
    declared_delta,
    momentum_sums,
    noise_variance,
    norm_bounds,
    weighted_sum_of,
)
from crafts_privacy.mechanism import Mechanism
from crafts_privacy.optimizers import AdamBC, Momentum
from crafts_privacy.patient_sgd import PatientSGD
from support.noise import FixedSampler, SeededNoise

NUM_COORDINATES = 20_000


def stage(steps: int, momentum: float, optimizer: str = "sgd") -> StageConfig:
    return StageConfig(
        name="pretraining", rounds=1, local_steps=steps, learning_rate=0.03, momentum=momentum,
        optimizer=optimizer,
    )  # fmt: skip


def reply(steps: int, **changes: object) -> RoundReply:
    values = {
        "site": "aachen",
        "run_id": "run",
        "plan_hash": "0" * 64,
        "round": 1,
        "checkpoint_hash": "0" * 64,
        "schema_hash": "0" * 64,
        "noise_multiplier": 1.7,
        "max_grad_norm": 0.4,
        "steps": steps,
        "sample_rate": 0.25,
        "declared_patients": 80,
        "update_norm": 1.0,
    }
    return RoundReply.model_validate(values | changes)


def noise_only_delta(
    steps: int, momentum: float, *, seed: int = 1, adam: bool = False, patients: int = 0
) -> torch.Tensor:
    """What ``PatientSGD`` releases when ``patients`` pull one way with all they may."""
    weight = nn.Parameter(torch.zeros(NUM_COORDINATES))
    declared, plan = reply(steps), stage(steps, momentum)
    optimizer = PatientSGD(
        {"weight": weight},
        Mechanism(
            noise_multiplier=declared.noise_multiplier,
            max_grad_norm=declared.max_grad_norm,
            sample_rate=declared.sample_rate,
            expected_patients=declared.sample_rate * declared.declared_patients,
        ),
        learning_rate=plan.learning_rate,
        optimizer=AdamBC(momentum) if adam else Momentum(momentum),
        noise=SeededNoise(seed),
        sampler=FixedSampler(),
    )
    for _ in range(steps):
        optimizer.step(patients, lambda _patient: weight.sum())
    return weight.detach().double()


@pytest.mark.parametrize(("steps", "momentum"), [(1, 0.0), (7, 0.0), (7, 0.5), (12, 0.9)])
def test_variance_is_what_the_optimizer_realises(steps: int, momentum: float) -> None:
    """Two-sided: the sample variance of 20,000 normals is within 5 of its deviations (5 %)."""
    realised = float(noise_only_delta(steps, momentum).square().mean())
    declared = noise_variance(reply(steps), stage(steps, momentum))
    assert realised == pytest.approx(declared, rel=5 * math.sqrt(2 / NUM_COORDINATES))


def test_forgetting_momentum_would_be_noticed() -> None:
    realised = float(noise_only_delta(12, 0.9).square().mean())
    assert realised > 5 * noise_variance(reply(12), stage(12, 0.0))


def test_momentum_sums_equal_the_closed_form() -> None:
    coefficients = [(1 - 0.9**m) / (1 - 0.9) for m in range(1, 31)]
    first, second = momentum_sums(30, 0.9)
    assert first == pytest.approx(sum(coefficients))
    assert second == pytest.approx(sum(c * c for c in coefficients))
    assert momentum_sums(5, 0.0) == (5.0, 5.0)


@pytest.mark.parametrize(("steps", "momentum"), [(1, 0.0), (7, 0.5), (12, 0.9)])
def test_an_honest_noisy_update_is_within_the_bounds(steps: int, momentum: float) -> None:
    norm = float(noise_only_delta(steps, momentum).norm())
    bounds = norm_bounds(reply(steps), stage(steps, momentum), NUM_COORDINATES)
    assert bounds.lowest <= norm <= bounds.highest


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_a_weighted_sum_of_updates_is_within_its_bounds_on_both_sides(momentum: float) -> None:
    """Three sites with noise of their own; of noise alone half as much and twice are outside."""
    weights, plan = [0.2, 0.3, 0.5], stage(7, momentum)
    deltas = [noise_only_delta(7, momentum, seed=seed) for seed in (1, 2, 3)]
    total = torch.stack([w * delta for w, delta in zip(weights, deltas, strict=True)]).sum(dim=0)
    declared = weighted_sum_of([(weight, declared_delta(reply(7), plan)) for weight in weights])
    assert float(total.std()) == pytest.approx(declared.noise_std, rel=0.03)
    bounds = declared.bounds(NUM_COORDINATES)
    assert bounds.lowest <= float(total.norm()) <= bounds.highest
    of_noise = replace(declared, longest_signal=0.0).bounds(NUM_COORDINATES)
    assert float(total.norm()) / 2 < of_noise.lowest
    assert float(total.norm()) * 2 > of_noise.highest


def test_what_adams_updates_add_up_to_is_bounded_without_independence() -> None:
    weights, plan = [0.25, 0.75], stage(7, 0.9, "adam")
    deltas = [noise_only_delta(7, 0.9, adam=True, patients=30) for _ in weights]  # one seed
    total = torch.stack([w * delta for w, delta in zip(weights, deltas, strict=True)]).sum(dim=0)
    declared = weighted_sum_of([(weight, declared_delta(reply(7), plan)) for weight in weights])
    bounds = declared.bounds(NUM_COORDINATES)
    assert bounds.lowest == 0.0
    assert float(total.norm()) <= bounds.highest
    assert declared.noise_std == pytest.approx(declared_delta(reply(7), plan).noise_std)


def test_noise_that_is_declared_but_not_added_is_below_the_bounds() -> None:
    norm = float(noise_only_delta(7, 0.5).norm())
    claimed = reply(7, noise_multiplier=3 * 1.7)
    assert norm < norm_bounds(claimed, stage(7, 0.5), NUM_COORDINATES).lowest


def test_noise_that_is_added_but_understated_is_above_the_bounds() -> None:
    norm = 2.0 * float(noise_only_delta(7, 0.5).norm())
    claimed = reply(7, noise_multiplier=0.1)
    assert norm > norm_bounds(claimed, stage(7, 0.5), NUM_COORDINATES).highest


def test_gradients_at_full_length_from_every_likely_patient_are_within_the_bounds() -> None:
    """No noise to speak of, every step 30 of 20 expected patients, all pulling one way."""
    sums, _ = momentum_sums(7, 0.5)
    signal = 0.03 * 0.4 * 30 / 20 * sums
    bounds = norm_bounds(reply(7, noise_multiplier=1e-3), stage(7, 0.5), 10)
    assert bounds.lowest == 0.0
    assert signal <= bounds.highest


@pytest.mark.parametrize("patients", [0, 30])
@pytest.mark.parametrize(("steps", "momentum"), [(1, 0.0), (7, 0.9)])
def test_adam_stays_below_its_bounds(steps: int, momentum: float, patients: int) -> None:
    """Noise alone is near them after one step; patients who all pull one way stay below."""
    delta = noise_only_delta(steps, momentum, adam=True, patients=patients)
    plan = stage(steps, momentum, "adam")
    bounds = norm_bounds(reply(steps), plan, NUM_COORDINATES)
    assert bounds.lowest == 0.0
    assert float(delta.norm()) <= bounds.highest
    assert float(delta.square().mean()) <= noise_variance(reply(steps), plan) * 1.05
    if steps == 1:
        assert float(delta.norm()) > bounds.highest / 3
