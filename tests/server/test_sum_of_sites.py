"""The step of an opened sum, against the engine on all patients together and against statistics."""

import math

import pytest
import torch
from torch import Tensor, nn

from crafts_core.plan_sections import PrivacyConfig, StageConfig
from crafts_core.state import State, add_delta
from crafts_privacy.mechanism import Mechanism
from crafts_privacy.optimizers import optimizer_of
from crafts_privacy.patient_sgd import PatientSGD
from crafts_server.sum_of_sites import (
    OpenedSum,
    added,
    bounds_of,
    descend,
    norm_of,
    step_of,
)
from support.noise import FixedSampler
from support.summing_sites import summed_plan

PRIVACY = summed_plan().privacy
STAGES = {
    "sgd": {"optimizer": "sgd", "momentum": 0.7},
    "adam": {"optimizer": "adam", "momentum": 0.9, "second_moment_decay": 0.99},
}


def stage_of(optimizer: str) -> StageConfig:
    return StageConfig.model_validate(
        {
            "name": "pretraining",
            "rounds": 4,
            "local_steps": 1,
            "learning_rate": 0.037,
            **STAGES[optimizer],
        }
    )


class Scripted:
    """Adds the noise that it was given, step by step, and keeps every noisy sum."""

    def __init__(self, noise: list[Tensor]) -> None:
        self._noise = iter(noise)
        self.sums: list[Tensor] = []

    def add_(self, grid_sum_D: Tensor, _std: float) -> None:
        grid_sum_D += next(self._noise)
        self.sums.append(grid_sum_D.clone())


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_steps_are_those_of_one_engine_over_all_patients_to_the_bit(optimizer: str) -> None:
    """Odd-sized tensors; the optimizer's state is handed on as a checkpoint does."""
    torch.manual_seed(0)
    weights = {"b": nn.Parameter(torch.randn(37)), "a": nn.Parameter(torch.randn(5, 3))}
    names = sorted(weights)
    state: State = {name: weights[name].detach().clone() for name in names}
    noise = [torch.randn(52, dtype=torch.float64).mul(2.0**17).round() for _ in range(4)]
    source = Scripted(noise)
    mechanism = Mechanism(
        noise_multiplier=0.8,
        max_grad_norm=PRIVACY.max_grad_norm,
        sample_rate=PRIVACY.sample_rate,
        expected_patients=PRIVACY.sample_rate * 130,
    )
    engine = PatientSGD(
        {name: weights[name] for name in names},
        mechanism,
        learning_rate=0.037,
        optimizer=optimizer_of(stage_of(optimizer)),
        noise=source,
        sampler=FixedSampler(),
        grid_bits=18,
    )
    goals = torch.randn(9, 52)

    def loss(patient: int) -> Tensor:
        flat = torch.cat([weights[name].reshape(-1) for name in names])
        return (flat - goals[patient]).square().mean() * 10

    kept: State = {}
    for number in range(4):
        engine.step(9, loss)
        opened = OpenedSum(sum_D=source.sums[number], declared_patients=130, noise_multiplier=0.8)
        taken = descend(state, opened, PRIVACY, stage_of(optimizer), kept)
        state, kept = add_delta(state, taken.delta), taken.optimizer_state
        for name in names:
            assert torch.equal(state[name], weights[name].detach()), (number, name)


def test_the_divisor_is_of_all_members_patients() -> None:
    opened = OpenedSum(
        sum_D=torch.full((4,), 2.0**18, dtype=torch.float64),
        declared_patients=100,
        noise_multiplier=1.0,
    )
    stage = StageConfig(name="pretraining", rounds=1, local_steps=1, learning_rate=1.0)
    (delta,) = descend({"w": torch.zeros(4)}, opened, PRIVACY, stage, {}).delta.values()
    assert torch.allclose(delta, torch.full((4,), -1.0 / 50.0, dtype=torch.float64))


def test_norms_are_in_units_of_the_clipping_bound() -> None:
    privacy = PrivacyConfig.model_validate({**PRIVACY.model_dump(), "max_grad_norm": 0.3})
    in_steps = torch.zeros(9, dtype=torch.float64)
    in_steps[3] = 4 * 0.3 / step_of(privacy)
    opened = OpenedSum(sum_D=in_steps, declared_patients=10, noise_multiplier=1.0)
    assert norm_of(opened, privacy) == pytest.approx(4.0)


@pytest.mark.parametrize("noise_multiplier", [0.5, 7.0])
def test_honest_sums_are_within_the_bounds_and_others_are_not(noise_multiplier: float) -> None:
    """Gradients of none or of twice the declared patients, all in one direction; then no noise."""
    size, patients = 4000, 60
    generator = torch.Generator().manual_seed(5)
    steps = PRIVACY.max_grad_norm / step_of(PRIVACY)
    towards = torch.full((size,), 1 / math.sqrt(size), dtype=torch.float64)

    def plausible(sum_D: Tensor) -> bool:
        opened = OpenedSum(
            sum_D=sum_D, declared_patients=patients, noise_multiplier=noise_multiplier
        )
        bounds = bounds_of(opened, PRIVACY)
        return bounds.lowest <= norm_of(opened, PRIVACY) <= bounds.highest

    for _ in range(50):
        noise_D = torch.randn(size, dtype=torch.float64, generator=generator)
        noise_D *= noise_multiplier * steps
        assert plausible(noise_D)
        assert plausible(noise_D + towards * (patients * steps))
    assert not plausible(torch.randint(-(2**31), 2**31, (size,), generator=generator).double())
    if noise_multiplier == 7.0:
        assert not plausible(towards * (patients * steps)), "the noise was left out"


def test_two_sets_add_up_as_one() -> None:
    sums = [
        OpenedSum(
            sum_D=torch.tensor([float(number), -3.0], dtype=torch.float64),
            declared_patients=number,
            noise_multiplier=float(number),
        )
        for number in (3, 4)
    ]
    both = added(sums)
    assert both.sum_D.tolist() == [7.0, -6.0]
    assert (both.declared_patients, both.noise_multiplier) == (7, pytest.approx(5.0))
