"""Distances that others report: closed forms, obvious loops, and intervals that hold the truth."""

import itertools

import numpy as np
import pytest

from crafts_core.evaluation.fidelity import kernel_distance, kernel_floor
from crafts_core.evaluation.known_distances import (
    cmmd_kernel,
    frechet_distance,
    frechet_interval,
    kid_kernel,
)


def rows(seed: int, count: int, *, shift: float = 0.0, patients: int = 0) -> np.ndarray:
    """Features of one distribution; those of a patient lie around a centre of its own."""
    rng = np.random.default_rng(seed)
    own = rng.standard_normal((patients, 4)).repeat(count // patients, 0) if patients else 0.0
    return rng.standard_normal((count, 4)) + shift + own


@pytest.mark.parametrize(
    ("kernel", "value"),
    [
        (kid_kernel, lambda x, y: (sum(x * y) / len(x) + 1) ** 3),
        (
            cmmd_kernel,
            lambda x, y: 1000 * np.exp(-sum((x / norm(x) - y / norm(y)) ** 2) / (2 * 10**2)),
        ),
    ],
)
def test_they_are_double_sums_over_pairs_of_different_patients(kernel, value) -> None:
    x, y = rows(1, 6, shift=1.0), rows(2, 8)
    of_x, of_y = np.array([9, 9, 8, 8, 7, 7]), np.arange(8) // 2

    def mean(first, second) -> float:
        pairs = itertools.product(first, second)
        return np.mean([value(a, b) for (p, a), (q, b) in pairs if p != q])

    found, _ = kernel_distance(kernel, x, y, of_x, of_y, num_bootstrap=20, seed=0)
    told_x, told_y = list(zip(of_x, x, strict=True)), list(zip(of_y, y, strict=True))
    slow = mean(told_x, told_x) + mean(told_y, told_y) - 2 * mean(told_x, told_y)
    assert found == pytest.approx(slow)


def norm(x: np.ndarray) -> float:
    return float(np.sqrt(sum(x**2)))


def test_floors_lie_around_zero() -> None:
    y = rows(3, 60, patients=20)
    kernel = kid_kernel(y, y)
    floor, (low, high) = kernel_floor(kernel, np.arange(60) // 3, num_splits=200, seed=0)
    assert low < floor < high
    assert abs(floor) < 0.1 * (high - low)


def test_frechet_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    """What is true of as many patients: the mean over many draws of them."""

    def sides(seed: int) -> tuple[np.ndarray, ...]:
        x = rows(2 * seed, 200, shift=0.5, patients=50)
        return (
            x,
            rows(2 * seed + 1, 200, patients=50),
            np.arange(200) // 4 + 50,
            np.arange(200) // 4,
        )

    truth = np.mean([frechet_distance(*sides(seed)[:2]) for seed in range(300)])
    intervals = [frechet_interval(*sides(1000 + seed), seed=0) for seed in range(200)]
    share = np.mean([low <= truth <= high for low, high in intervals])
    assert 0.8 < share < 0.97


def test_one_group_that_holds_all_images_has_no_interval() -> None:
    x, y = rows(1, 4), rows(2, 40)
    assert frechet_interval(x, y, np.full(4, 10), np.arange(40) // 4, seed=0) is None
