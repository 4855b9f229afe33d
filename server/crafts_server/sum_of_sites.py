"""From an opened sum to the step that one site with everybody's patients would have taken.

All of it is post-processing of the sum, and public. Letters: D all coordinates of the trained
factor, tensor after tensor in the order of their names.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from crafts_core.plan_sections import PrivacyConfig, StageConfig
from crafts_core.state import State
from crafts_privacy.clipping import grid_step
from crafts_privacy.declared_noise import TAIL_Z, NormBounds
from crafts_privacy.optimizers import optimizer_of
from crafts_privacy.secure_aggregation.fixed_point import most_patients


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedSum:
    """Clipped gradients of all members' patients and the members' noise, in whole grid steps."""

    sum_D: Tensor
    """Float64."""
    declared_patients: int
    """Of all members together."""
    noise_multiplier: float
    """Standard deviation of the whole noise, over max_grad_norm."""

    def expected_patients(self, privacy: PrivacyConfig) -> float:
        return privacy.sample_rate * self.declared_patients


@dataclass(frozen=True, slots=True, kw_only=True)
class Descent:
    """A step down, not yet taken."""

    delta: State
    """Float64, so that adding it in float64 gives the engine's own result to the bit."""
    optimizer_state: State


def added(sums: Sequence[OpenedSum]) -> OpenedSum:
    """The sum over the members of all of them, of which none is in two."""
    return OpenedSum(
        sum_D=torch.stack([each.sum_D for each in sums]).sum(dim=0),
        declared_patients=sum(each.declared_patients for each in sums),
        noise_multiplier=math.hypot(*(each.noise_multiplier for each in sums)),
    )


def step_of(privacy: PrivacyConfig) -> float:
    """The grid's step, in units of the gradient."""
    assert privacy.sum_grid_bits is not None
    return grid_step(privacy.max_grad_norm, privacy.sum_grid_bits)


def norm_of(opened: OpenedSum, privacy: PrivacyConfig) -> float:
    """The sum's length, in units of max_grad_norm."""
    norm = float(torch.linalg.vector_norm(opened.sum_D))
    return norm * step_of(privacy) / privacy.max_grad_norm


def bounds_of(opened: OpenedSum, privacy: PrivacyConfig) -> NormBounds:
    """Which lengths agree with what the members declare, in units of max_grad_norm.

    The noise is ``noise_multiplier (sqrt(D) +- z)`` long and the gradients at most P, the most
    patients of a step; see ``declared_noise.norm_bounds``. A vector that anybody made up fills the
    whole group and is hundreds of times longer.
    """
    signal = most_patients(opened.expected_patients(privacy))
    root = math.sqrt(opened.sum_D.numel())
    noise = opened.noise_multiplier
    return NormBounds(
        lowest=max(noise * max(root - TAIL_Z, 0.0) - signal, 0.0),
        highest=noise * (root + TAIL_Z) + signal,
    )


def descend(
    state: Mapping[str, Tensor],
    opened: OpenedSum,
    privacy: PrivacyConfig,
    stage: StageConfig,
    optimizer_state: Mapping[str, Tensor],
) -> Descent:
    """One step of the stage's optimizer, in the operations and the order of ``PatientSGD``.

    Args:
        state: The trained factor's tensors.
        opened: The sum.
        privacy: The plan's.
        stage: The round's.
        optimizer_state: What the optimizer keeps, from the round before; empty where it begins.
    """
    expected = opened.expected_patients(privacy)
    optimizer = optimizer_of(stage)
    if optimizer_state:
        optimizer.load_state(optimizer_state)
    mean_D = opened.sum_D * (step_of(privacy) / expected)
    noise_std = opened.noise_multiplier * (privacy.max_grad_norm / expected)
    direction_D = optimizer.direction(mean_D, noise_std)
    names = sorted(state)
    parts = direction_D.split([state[name].numel() for name in names])
    delta = {
        name: _moved(state[name], part, stage.learning_rate).double() - state[name].double()
        for name, part in zip(names, parts, strict=True)
    }
    return Descent(delta=delta, optimizer_state=optimizer.state())


def _moved(tensor: Tensor, direction_D: Tensor, learning_rate: float) -> Tensor:
    return tensor.float().add(direction_D.reshape(tensor.shape), alpha=-learning_rate)
