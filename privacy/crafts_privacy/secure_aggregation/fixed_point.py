"""Integers of a sum in the group of numbers modulo 2**32, and back.

The engine's sums are integers already (``clipping.to_grid_``), so nothing is rounded on the way and
the sum over sites is exact. A sum that does not fit wraps: that spoils a step and costs no privacy,
as it is post-processing; ``largest_grid_bits`` says with which grid it never does.

Letters: D all coordinates.
"""

import math

import numpy as np
import torch
from torch import Tensor

from crafts_privacy.clipping import chunks_of
from crafts_privacy.secure_aggregation.masking import Group

MIN_GRID_BITS, MAX_GRID_BITS = 12, 22
TAIL_Z = 9.0
"""Standard deviations that noise never passes in any coordinate."""


def to_group(sum_D: Tensor) -> Group:
    """Integer-valued float64 modulo 2**32, on the CPU."""
    vector_D = np.empty(len(sum_D), dtype=np.uint32)
    start = 0
    for chunk_D in chunks_of(sum_D):
        words = chunk_D.to(torch.int64).bitwise_and_(2**32 - 1).cpu().numpy()
        vector_D[start : start + len(words)] = words
        start += len(words)
    return vector_D


def from_group(vector_D: Group) -> Tensor:
    """The integers from -2**31 to 2**31 - 1 that the group's numbers stand for, float64."""
    return torch.from_numpy(vector_D.view(np.int32).astype(np.float64))


def most_patients(expected_patients: float) -> float:
    """How many patients a step may draw where so many are expected.

    It allows for declared sizes that are rounded by a factor of two, and for the spread of Poisson
    sampling.
    """
    return 2.0 * expected_patients + 12.0 * math.sqrt(expected_patients) + 12.0


def sum_fits(grid_bits: int, *, expected_patients: float, total_noise_multiplier: float) -> bool:
    """Whether a sum of clipped gradients and noise stays within the group's signed numbers."""
    longest = most_patients(expected_patients) + TAIL_Z * total_noise_multiplier
    return longest * 2.0 ** (grid_bits + 1) < 2.0**31


def largest_grid_bits(*, expected_patients: float, total_noise_multiplier: float) -> int:
    """The finest grid on which the sum fits.

    Raises:
        ValueError: it fits on none.
    """
    for grid_bits in range(MAX_GRID_BITS, MIN_GRID_BITS - 1, -1):
        if sum_fits(
            grid_bits,
            expected_patients=expected_patients,
            total_noise_multiplier=total_noise_multiplier,
        ):
            return grid_bits
    raise ValueError(
        f"sums over {expected_patients:.0f} expected patients with noise of "
        f"{total_noise_multiplier:.0f} do not fit into 32 bits; lower the sample rate or the "
        "noise, take stages anchors and colour out, or take fewer sites"
    )
