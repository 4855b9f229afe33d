"""Which patients take part in a step: Poisson sampling from the operating system's entropy.

The accountant's amplification by sampling holds only if who was drawn stays secret and each
patient is drawn independently; a shuffle or a seeded generator gives neither.
"""

import os
from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

RandomBytes = Callable[[int], bytes]
"""``random_bytes(n)`` returns n bytes; ``os.urandom`` everywhere but in tests."""


class PatientSampler(Protocol):
    """Draws the patients of one step."""

    def sample(self, num_patients: int, sample_rate: float) -> NDArray[np.int64]:
        """Indices of the patients drawn; each of ``num_patients`` with ``sample_rate``."""


class PoissonSampler:
    """Independent draws from the operating system's cryptographic generator. It has no seed."""

    def sample(self, num_patients: int, sample_rate: float) -> NDArray[np.int64]:
        """See :class:`PatientSampler`."""
        return poisson_sample(num_patients, sample_rate, os.urandom)


def poisson_sample(
    num_patients: int, sample_rate: float, random_bytes: RandomBytes
) -> NDArray[np.int64]:
    """Draw each patient independently; the result may be empty.

    The comparison is between 53-bit integers. The threshold is rounded down, so a patient is drawn
    with probability ``sample_rate`` or less than 2**-53 below it, never above.

    Raises:
        ValueError: ``num_patients`` is negative or ``sample_rate`` is not in (0, 1].
    """
    if num_patients < 0:
        raise ValueError(f"expected num_patients >= 0, got {num_patients}")
    if not 0 < sample_rate <= 1:
        raise ValueError(f"expected 0 < sample_rate <= 1, got {sample_rate}")
    threshold = np.uint64(int(sample_rate * 2.0**53))
    words = np.frombuffer(random_bytes(8 * num_patients), dtype=np.uint64)
    return np.flatnonzero((words >> np.uint64(11)) < threshold).astype(np.int64)
