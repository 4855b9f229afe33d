"""Where privacy noise comes from: the operating system's entropy, on an integer grid.

Float32 noise leaks through its holes: a quarter of the values that x + noise can take for x = 0
are impossible for x = 1. Here the clipped sum is an exact integer vector (``clipping.to_grid_``)
and the noise is a Gaussian rounded to an integer, so the output is the rounded output of a
Gaussian mechanism, and rounding is post-processing.

What is proved: the sensitivity of the integer sum. What is argued: that a Gaussian computed in
float64 stands for a real one. Its standard deviation is about 2**24 grid steps; the uniform behind
it keeps 39 or more significant bits out to the tails, so every integer within reach is possible
and neighbouring integers differ in probability as they should to about 1e-6. And that words of a
key stream (``keystream``) stand for entropy, as they do wherever a key is drawn. Timing side
channels are out of scope.
"""

import math
from typing import Protocol

import torch
from torch import Tensor

from crafts_privacy.clipping import chunks_of
from crafts_privacy.keystream import Stream, key_stream

MAX_STD = 2.0**48
"""Largest noise, in grid steps, for which sum and noise stay exact in float64."""

_TAIL_BITS = 40


class NoiseSource(Protocol):
    """Adds Gaussian noise, rounded to integers, to an integer vector."""

    def add_(self, grid_sum_D: Tensor, std: float) -> None:
        """Add noise of standard deviation ``std`` grid steps, in place.

        Args:
            grid_sum_D: Integer-valued float64 vector on any device.
            std: Standard deviation in grid steps.
        """


class GridNoise:
    """Noise under a fresh key of the operating system each time, on the sum's device."""

    def add_(self, grid_sum_D: Tensor, std: float) -> None:
        """See :class:`NoiseSource`."""
        add_gaussian_integers_(grid_sum_D, std, key_stream(grid_sum_D.device))


class ExactNoise:
    """Exact discrete Gaussian noise (Canonne, Kamath and Steinke 2020) by OpenDP.

    No floating point is involved in the draw, so nothing about it is argued. About 30 microseconds
    a number, so it suits adapters, not full weights. The accountant's Gaussian stands for it: at
    thousands of grid steps to a standard deviation their privacy curves agree.
    """

    def __init__(self) -> None:
        """Load OpenDP.

        Raises:
            ImportError: it is not installed.
        """
        import opendp.prelude as opendp

        opendp.enable_features("contrib")
        self._opendp = opendp

    def add_(self, grid_sum_D: Tensor, std: float) -> None:
        """See :class:`NoiseSource`."""
        _check_noise(grid_sum_D, std)
        opendp = self._opendp
        # 64 bits: a number beyond what the type holds ends at its edge, and an edge is no noise.
        integers = opendp.vector_domain(opendp.atom_domain(T=opendp.i64))
        draw = opendp.m.make_gaussian(integers, opendp.l2_distance(T=float), scale=std)
        for chunk in chunks_of(grid_sum_D):
            noise = torch.tensor(draw([0] * chunk.numel()), dtype=torch.float64)
            chunk.add_(noise.to(grid_sum_D.device))


def add_gaussian_integers_(grid_sum_D: Tensor, std: float, stream: Stream) -> None:
    """Add rounded Gaussians to a float64 vector, chunk by chunk so that memory stays flat.

    Raises:
        ValueError: the vector is not float64, or ``std`` is outside what float64 holds exactly.
    """
    _check_noise(grid_sum_D, std)
    for chunk in chunks_of(grid_sum_D):
        chunk.add_(standard_normals(chunk.numel(), stream).mul_(std).round_())


def _check_noise(grid_sum_D: Tensor, std: float) -> None:
    if grid_sum_D.dtype != torch.float64:
        raise ValueError(f"expected a float64 sum, got {grid_sum_D.dtype}")
    if not 1.0 <= std <= MAX_STD:
        raise ValueError(f"expected a standard deviation of 1 to 2**48 grid steps, got {std}")


def standard_normals(num: int, stream: Stream) -> Tensor:
    """Independent N(0, 1) values, float64 (num,), by inversion of a uniform with fine tails.

    One word gives the sign and 53 bits k of the upper-tail probability (k + 1/2) / 2**54. Where
    k's leading bits are zero (one value in 8192), 1 - 2p would round coarsely: there a second word
    supplies the bits below, and p itself is inverted, so that values far out are spaced as finely
    as the grid needs.
    """
    words = stream(num)
    tail = (words >> 11) & (2**53 - 1)
    in_tail = (tail < 2**_TAIL_BITS).nonzero().squeeze(1)
    above, below = tail[in_tail].double(), (stream(len(in_tail)) >> 11) & (2**53 - 1)
    far = -torch.special.ndtri((above + (below.double() + 0.5) * 2.0**-53) * 2.0**-54)
    values = tail.double().add_(0.5).mul_(-(2.0**-53)).add_(1.0)
    values = values.erfinv_().mul_(math.sqrt(2.0))
    values[in_tail] = far
    return values.copysign_((words << 63).view(torch.float64))  # the lowest bit, as a sign
