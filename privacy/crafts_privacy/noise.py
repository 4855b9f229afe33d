"""Where privacy noise comes from: the operating system's entropy, on an integer grid.

Float32 noise leaks through its holes: a quarter of the values that x + noise can take for x = 0
are impossible for x = 1. Here the clipped sum is an exact integer vector (``clipping.to_grid_``)
and the noise is a Gaussian rounded to an integer, so the output is the rounded output of a
Gaussian mechanism, and rounding is post-processing.

What is proved: the sensitivity of the integer sum. What is argued: that a Gaussian computed in
float64 stands for a real one. Its standard deviation is about 2**24 grid steps; the uniform behind
it keeps 40 or more significant bits out to the tails, so every integer within reach is possible
and neighbouring integers differ in probability as they should to about 1e-6. Timing side channels
are out of scope.
"""

import os
from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import ndtri
from torch import Tensor

RandomBytes = Callable[[int], bytes]
"""``random_bytes(n)`` returns n bytes; ``os.urandom`` everywhere but in tests."""

MAX_STD = 2.0**48
"""Largest noise, in grid steps, for which sum and noise stay exact in float64."""

_CHUNK = 1 << 20
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
    """Noise from the operating system's cryptographic generator. It has no seed."""

    def add_(self, grid_sum_D: Tensor, std: float) -> None:
        """See :class:`NoiseSource`."""
        add_gaussian_integers_(grid_sum_D, std, os.urandom)


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
        integers = opendp.vector_domain(opendp.atom_domain(T=int))
        draw = opendp.m.make_gaussian(integers, opendp.l2_distance(T=float), scale=std)
        for chunk in torch.split(grid_sum_D, _CHUNK):
            noise = torch.tensor(draw([0] * chunk.numel()), dtype=torch.float64)
            chunk.add_(noise.to(grid_sum_D.device))


def add_gaussian_integers_(grid_sum_D: Tensor, std: float, random_bytes: RandomBytes) -> None:
    """Add rounded Gaussians to a float64 vector, chunk by chunk so that memory stays flat.

    Raises:
        ValueError: the vector is not float64, or ``std`` is outside what float64 holds exactly.
    """
    _check_noise(grid_sum_D, std)
    for chunk in torch.split(grid_sum_D, _CHUNK):
        noise = np.rint(std * standard_normals(chunk.numel(), random_bytes))
        chunk.add_(torch.from_numpy(noise).to(grid_sum_D.device))


def _check_noise(grid_sum_D: Tensor, std: float) -> None:
    if grid_sum_D.dtype != torch.float64:
        raise ValueError(f"expected a float64 sum, got {grid_sum_D.dtype}")
    if not 1.0 <= std <= MAX_STD:
        raise ValueError(f"expected a standard deviation of 1 to 2**48 grid steps, got {std}")


def standard_normals(num: int, random_bytes: RandomBytes) -> NDArray[np.float64]:
    """Independent N(0, 1) values by inversion of a uniform with fine tails.

    One word gives the sign and 53 bits of the upper-tail probability. Where the leading bits are
    zero (one value in 8192), a second word supplies the bits below, so that values far out are
    spaced as finely as the grid needs.
    """
    words = _words(num, random_bytes)
    tail_probability = (words >> np.uint64(11)).astype(np.float64)
    in_tail = np.flatnonzero(tail_probability < 2.0**_TAIL_BITS)
    below = (_words(in_tail.size, random_bytes) >> np.uint64(11)).astype(np.float64)
    within_cell = np.full(num, 0.5)
    within_cell[in_tail] = (below + 0.5) * 2.0**-53
    magnitude: NDArray[np.float64] = -ndtri((tail_probability + within_cell) * 2.0**-54)
    negative = (words & np.uint64(1)).astype(bool)
    return np.where(negative, -magnitude, magnitude)


def _words(num: int, random_bytes: RandomBytes) -> NDArray[np.uint64]:
    return np.frombuffer(random_bytes(8 * num), dtype=np.uint64)
