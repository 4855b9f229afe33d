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
from dataclasses import dataclass

from crafts_core.exchange import RoundReply
from crafts_core.plan import StageConfig
from crafts_privacy.secure_aggregation.fixed_point import most_patients

TAIL_Z = 6.0
"""Gaussian tail of the bounds: an honest update falls outside with probability below 1e-7."""
ROUNDING = 0.01
"""Relative slack for half precision on the wire."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NormBounds:
    """Which norms of a delta agree with its declared mechanism."""

    lowest: float
    highest: float


def momentum_sums(steps: int, momentum: float) -> tuple[float, float]:
    """``sum c_m`` and ``sum c_m^2`` over m = 1..steps."""
    first = second = weight = 0.0
    for _ in range(steps):
        weight = 1.0 + momentum * weight
        first += weight
        second += weight * weight
    return first, second


def noise_variance(reply: RoundReply, stage: StageConfig) -> float:
    """v: variance of the noise in one coordinate of the delta, from what the site declares.

    For Adam the largest that it can be.
    """
    if stage.optimizer == "adam":
        return float((stage.learning_rate * reply.steps) ** 2)
    _, squares = momentum_sums(reply.steps, stage.momentum)
    return float((stage.learning_rate * _noise_per_step(reply)) ** 2 * squares)


def norm_bounds(reply: RoundReply, stage: StageConfig, num_coordinates: int) -> NormBounds:
    """Bounds on |delta| for a private mechanism, by the triangle inequality.

    The noise vector has norm ``sqrt(v) (sqrt(D) +- z)``, the signal at most S. Above
    ``noise + S`` the declared noise or clipping is understated; below ``noise - S`` the declared
    noise was not added. P allows for a declared size that is rounded by a factor of two and for
    the spread of Poisson sampling: ``P = 2 n + 12 sqrt(n) + 12``. The lower bound says something
    only where the noise outweighs what gradients can do; it is zero elsewhere,
    and for Adam.
    """
    patients = _expected_patients(reply)
    most_signal = reply.max_grad_norm * most_patients(patients) / patients
    deviation = math.sqrt(noise_variance(reply, stage))
    root = math.sqrt(num_coordinates)
    if stage.optimizer == "adam":
        highest = deviation * (root + TAIL_Z + most_signal / _noise_per_step(reply))
        return NormBounds(lowest=0.0, highest=highest * (1.0 + ROUNDING))
    sums, _ = momentum_sums(reply.steps, stage.momentum)
    signal = stage.learning_rate * most_signal * sums
    smallest_noise = deviation * max(root - TAIL_Z, 0.0)
    return NormBounds(
        lowest=max(smallest_noise - signal, 0.0) * (1.0 - ROUNDING),
        highest=(deviation * (root + TAIL_Z) + signal) * (1.0 + ROUNDING),
    )


def _noise_per_step(reply: RoundReply) -> float:
    """s: standard deviation of the noise in a coordinate of one step's mean gradient."""
    return reply.noise_multiplier * reply.max_grad_norm / _expected_patients(reply)


def _expected_patients(reply: RoundReply) -> float:
    return reply.sample_rate * reply.declared_patients
