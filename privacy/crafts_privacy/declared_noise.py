"""What a declared mechanism implies for the delta that comes with it.

A site runs T steps of SGD with momentum mu on the noisy mean gradient (``PatientSGD``)::

    u_t = mu u_{t-1} + g_t,   theta_t = theta_{t-1} - lr u_t,   u_0 = 0

where g_t is the clipped sum plus N(0, (noise_multiplier C)^2) per coordinate, divided by the
expected number of patients n = sample_rate * declared_patients. Unrolled, the delta is
``-lr sum_t c_{T-t+1} g_t`` with ``c_m = 1 + mu + ... + mu^(m-1)``. So the noise in each coordinate
of the delta is Gaussian with variance

    v = lr^2 (noise_multiplier C / n)^2 sum_{m=1..T} c_m^2

and the signal is at most ``S = lr C (P / n) sum_m c_m`` long if no step sees more than P patients.

Adam (``AdamBC``) divides an average of g_1..g_t by a root that is at least the noise's own standard
deviation s. So in units of s the noise of one step is at most 1 in each coordinate and the signal
at most C P / (n s) long; over T steps v <= (lr T)^2. These are upper bounds: how far the root grows
is the data's business, so a lower bound does not exist.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from crafts_core.plan_sections import StageConfig
from crafts_privacy.secure_aggregation.fixed_point import most_patients

TAIL_Z = 6.0
"""Gaussian tail of the bounds: an honest update falls outside with probability below 1e-7."""
ROUNDING = 0.01
"""Relative slack for half precision on the wire."""


class Declared(Protocol):
    """What a site says of its mechanism; ``RoundReply`` does."""

    @property
    def noise_multiplier(self) -> float: ...
    @property
    def max_grad_norm(self) -> float: ...
    @property
    def sample_rate(self) -> float: ...
    @property
    def steps(self) -> int: ...
    @property
    def declared_patients(self) -> int: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class NormBounds:
    """Which norms of a delta agree with its declared mechanism."""

    lowest: float
    highest: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DeclaredDelta:
    """What a delta consists of, if all that was declared is true."""

    noise_std: float
    """Of each coordinate's noise."""
    longest_signal: float
    """S: how far clipped gradients alone can move."""
    is_exact: bool
    """Whether the noise is Gaussian of that deviation; of Adam it is at most as long."""

    def bounds(self, num_coordinates: int, *, slack: float = 0.0) -> NormBounds:
        """Bounds on the norm, by the triangle inequality, each wider by ``slack`` of itself.

        The noise vector has norm ``noise_std (sqrt(D) +- z)``. Above ``noise + S`` the declared
        noise or clipping is understated; below ``noise - S`` the declared noise was not added.
        The lower bound says something only where the noise outweighs what gradients can do; it is
        zero elsewhere, and for Adam.
        """
        root = math.sqrt(num_coordinates)
        smallest_noise = self.noise_std * max(root - TAIL_Z, 0.0) if self.is_exact else 0.0
        longest = self.noise_std * (root + TAIL_Z) + self.longest_signal
        return NormBounds(
            lowest=max(smallest_noise - self.longest_signal, 0.0) * (1.0 - slack),
            highest=longest * (1.0 + slack),
        )


def momentum_sums(steps: int, momentum: float) -> tuple[float, float]:
    """``sum c_m`` and ``sum c_m^2`` over m = 1..steps."""
    first = second = weight = 0.0
    for _ in range(steps):
        weight = 1.0 + momentum * weight
        first += weight
        second += weight * weight
    return first, second


def noise_variance(declared: Declared, stage: StageConfig) -> float:
    """v: variance of the noise in one coordinate of the delta, from what the site declares.

    For Adam the largest that it can be.
    """
    if stage.optimizer == "adam":
        return float((stage.learning_rate * declared.steps) ** 2)
    _, squares = momentum_sums(declared.steps, stage.momentum)
    return float((stage.learning_rate * _noise_per_step(declared)) ** 2 * squares)


def declared_delta(declared: Declared, stage: StageConfig) -> DeclaredDelta:
    """Noise and signal of a delta of a private mechanism.

    P allows for a declared size that is rounded by a factor of two and for the spread of Poisson
    sampling: ``P = 2 n + 12 sqrt(n) + 12``.
    """
    patients = _expected_patients(declared)
    most_signal = declared.max_grad_norm * most_patients(patients) / patients
    noise_std = math.sqrt(noise_variance(declared, stage))
    if stage.optimizer == "adam":
        signal = noise_std * most_signal / _noise_per_step(declared)
        return DeclaredDelta(noise_std=noise_std, longest_signal=signal, is_exact=False)
    sums, _ = momentum_sums(declared.steps, stage.momentum)
    signal = stage.learning_rate * most_signal * sums
    return DeclaredDelta(noise_std=noise_std, longest_signal=signal, is_exact=True)


def weighted_sum_of(terms: Sequence[tuple[float, DeclaredDelta]]) -> DeclaredDelta:
    """Of independent deltas of one stage, each times its weight."""
    stds = [weight * delta.noise_std for weight, delta in terms]
    is_exact = all(delta.is_exact for _, delta in terms)
    return DeclaredDelta(
        noise_std=math.hypot(*stds) if is_exact else math.fsum(stds),
        longest_signal=math.fsum(weight * delta.longest_signal for weight, delta in terms),
        is_exact=is_exact,
    )


def norm_bounds(declared: Declared, stage: StageConfig, num_coordinates: int) -> NormBounds:
    """Bounds on |delta| for a private mechanism, rounded to half precision on the way."""
    return declared_delta(declared, stage).bounds(num_coordinates, slack=ROUNDING)


def _noise_per_step(declared: Declared) -> float:
    """s: standard deviation of the noise in a coordinate of one step's mean gradient."""
    return declared.noise_multiplier * declared.max_grad_norm / _expected_patients(declared)


def _expected_patients(declared: Declared) -> float:
    return declared.sample_rate * declared.declared_patients
