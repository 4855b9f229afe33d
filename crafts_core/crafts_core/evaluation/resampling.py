"""Patients drawn again: halves of them, bootstrap samples, and the intervals that these give.

Tiles of a patient are alike, so patients are what is counted and resampled.

Shape letters: N rows (images or tiles), P patients, B bootstrap samples.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float64]
Rows = npt.NDArray[np.int64]
Patients = npt.NDArray[np.int64]
"""For each row the number of its patient."""


class Interval(NamedTuple):
    """A 90 % interval."""

    low: float
    high: float


def halves(patient_M: Patients, rng: np.random.Generator) -> tuple[Rows, Rows]:
    """Rows of a random half of the patients, and of the others."""
    is_first = half_of_patients(int(patient_M.max()) + 1, rng)[patient_M]
    return np.flatnonzero(is_first), np.flatnonzero(~is_first)


def half_of_patients(count: int, rng: np.random.Generator) -> npt.NDArray[np.bool_]:
    """Which of so many patients are in a random half of them."""
    is_first_P = np.zeros(count, dtype=np.bool_)
    is_first_P[rng.permutation(count)[: count // 2]] = True
    return is_first_P


def repeats(rng: np.random.Generator, count: int) -> Vector:
    """How often each of ``count`` units (at least two) is drawn in one bootstrap sample.

    A sample of one unit only has no pair to measure and is drawn again; with four patients that is
    one in 64.
    """
    while True:
        repeats = np.bincount(rng.integers(count, size=count), minlength=count)
        if np.count_nonzero(repeats) > 1:
            return repeats.astype(np.float64)


def interval_of(values: list[float]) -> Interval:
    """Where the middle 90 % of resampled values lie."""
    low, high = np.quantile(values, [0.05, 0.95])
    return Interval(float(low), float(high))


def mean_interval(
    value_N: npt.ArrayLike, patient_N: Patients, *, num_bootstrap: int, seed: int
) -> Interval | None:
    """90 % bootstrap interval of a mean over rows, whole patients drawn.

    Returns:
        None where all rows are of one patient: there is nothing to draw from.
    """
    patient_N = np.unique(patient_N, return_inverse=True)[1]
    count = int(patient_N.max()) + 1
    if count < 2:
        return None
    rows_P = np.bincount(patient_N).astype(np.float64)
    sum_P = np.bincount(patient_N, weights=np.asarray(value_N, dtype=np.float64))
    rng = np.random.default_rng(seed)
    weight_BP = np.stack([repeats(rng, count) for _ in range(num_bootstrap)])
    return interval_of(list((weight_BP @ sum_P) / (weight_BP @ rows_P)))
