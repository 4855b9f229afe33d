"""What turns a step's noisy mean gradient into a direction. Post-processing: it costs no privacy.

Letters: D all coordinates.
"""

import math
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from crafts_core.plan_sections import StageConfig


class Optimizer(Protocol):
    """Keeps its state from step to step; the engine multiplies by the learning rate."""

    def direction(self, mean_D: Tensor, noise_std: float) -> Tensor:
        """Where to go down, for one step's noisy mean.

        Args:
            mean_D: Float64 noisy sum of clipped gradients over the fixed divisor.
            noise_std: Standard deviation of the noise in each coordinate of ``mean_D``; public.

        Returns:
            Float32 (D,); belongs to the optimizer, valid until the next call.
        """

    def state(self) -> dict[str, Tensor]:
        """A copy of what it keeps from step to step; nothing before the first."""

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what ``state`` gave, to the last bit.

        Raises:
            ValueError: it is another optimizer's.
        """


class Momentum:
    """``v <- momentum v + mean``, as ``torch.optim.SGD`` without dampening."""

    def __init__(self, momentum: float = 0.0) -> None:
        """Raises ValueError unless 0 <= momentum < 1."""
        _check_decay("momentum", momentum)
        self._momentum = momentum
        self._velocity_D: Tensor | None = None

    def direction(self, mean_D: Tensor, noise_std: float) -> Tensor:  # noqa: ARG002
        """See :class:`Optimizer`."""
        if self._velocity_D is None:
            self._velocity_D = torch.zeros_like(mean_D, dtype=torch.float32)
        return self._velocity_D.mul_(self._momentum).add_(mean_D)

    def state(self) -> dict[str, Tensor]:
        """See :class:`Optimizer`."""
        return {} if self._velocity_D is None else {"velocity": self._velocity_D.clone()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """See :class:`Optimizer`."""
        _check_names(state, {"velocity"})
        self._velocity_D = state["velocity"].float().clone() if state else None


class AdamBC:
    """Adam whose second moment is freed of the noise's known share.

    The noise of privacy adds its variance to the second moment of every coordinate, which turns
    plain Adam into momentum with a tiny step. Subtracting it restores Adam (DP-AdamBC, Tang,
    Shpilevskiy and Lécuyer 2024, arXiv 2312.14334). Where little but noise is left, the floor
    keeps the step bounded.
    """

    def __init__(
        self, momentum: float = 0.9, second_moment_decay: float = 0.999, floor: float = 1.0
    ) -> None:
        """Prepare the two moments.

        Args:
            momentum: beta 1.
            second_moment_decay: beta 2.
            floor: Smallest root of the second moment, in units of the noise's standard deviation.

        Raises:
            ValueError: a decay outside [0, 1) or a floor that is not positive.
        """
        _check_decay("momentum", momentum)
        _check_decay("second_moment_decay", second_moment_decay)
        if not (math.isfinite(floor) and floor > 0):
            raise ValueError(f"expected floor > 0, got {floor}")
        self._decays = (momentum, second_moment_decay)
        self._floor = floor
        self._moments: tuple[Tensor, Tensor] | None = None
        self._steps = 0

    def direction(self, mean_D: Tensor, noise_std: float) -> Tensor:
        """See :class:`Optimizer`."""
        if self._moments is None:
            self._moments = (torch.zeros_like(mean_D), torch.zeros_like(mean_D))
        (first_D, second_D), (beta1, beta2) = self._moments, self._decays
        self._steps += 1
        first_D.mul_(beta1).add_(mean_D, alpha=1 - beta1)
        second_D.mul_(beta2).addcmul_(mean_D, mean_D, value=1 - beta2)
        variance_D = second_D / (1 - beta2**self._steps) - noise_std**2
        root_D = variance_D.clamp_(min=max((self._floor * noise_std) ** 2, 1e-16)).sqrt_()
        return (first_D / (1 - beta1**self._steps) / root_D).float()

    def state(self) -> dict[str, Tensor]:
        """See :class:`Optimizer`."""
        if self._moments is None:
            return {}
        first_D, second_D = self._moments
        steps = torch.tensor(self._steps, dtype=torch.int64)
        return {"first": first_D.clone(), "second": second_D.clone(), "steps": steps}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """See :class:`Optimizer`."""
        _check_names(state, {"first", "second", "steps"})
        self._moments, self._steps = None, 0
        if state:
            self._moments = (state["first"].double().clone(), state["second"].double().clone())
            self._steps = int(state["steps"])


def optimizer_of(stage: StageConfig) -> Optimizer:
    """A fresh one, as a plan's stage says."""
    if stage.optimizer == "adam":
        return AdamBC(stage.momentum, stage.second_moment_decay)
    return Momentum(stage.momentum)


def _check_names(state: Mapping[str, Tensor], wanted: set[str]) -> None:
    if state.keys() not in (set(), wanted):
        raise ValueError(f"expected the state {sorted(wanted)}, got {sorted(state)}")


def _check_decay(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ValueError(f"expected 0 <= {name} < 1, got {value}")
