"""Distances against slow obvious loops and closed forms; intervals that respect patients."""

import numpy as np
import pytest

from crafts_core.evaluation.fidelity import (
    Reference,
    frechet_distance,
    mmd_squared,
    mmd_to_reference,
    real_floor,
)


def _reference(seed: int = 0, patients: int = 12, tiles: int = 5, spread: float = 0.0) -> Reference:
    rng = np.random.default_rng(seed)
    names = np.repeat([f"p{i}" for i in range(patients)], tiles)
    own = np.repeat(rng.standard_normal((patients, 6)) * spread, tiles, axis=0)
    return Reference.fit(rng.standard_normal((patients * tiles, 6)) + own, names)


def test_mmd_is_the_double_sum_over_different_rows() -> None:
    reference = _reference()
    x = reference.scale(np.random.default_rng(1).standard_normal((7, 6)) + 1)
    y = reference.features_MD

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        square = float(((a - b) ** 2).sum()) / (2 * reference.median_square)
        return sum(np.exp(-square / width) for width in (0.25, 0.5, 1, 2, 4)) / 5

    within_x = [kernel(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j]
    within_y = [kernel(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j]
    across = [kernel(a, b) for a in x for b in y]
    slow = np.mean(within_x) + np.mean(within_y) - 2 * np.mean(across)
    fast = mmd_squared(reference.kernel(x, x), reference.kernel(y, y), reference.kernel(x, y))
    assert fast == pytest.approx(slow, abs=1e-12)


def test_mmd_of_the_same_distribution_is_zero_on_average() -> None:
    reference = _reference(patients=20)
    rng = np.random.default_rng(2)
    values = [
        mmd_to_reference(rng.standard_normal((60, 6)), reference, num_bootstrap=20, seed=0)[0]
        for _ in range(40)
    ]
    # The reference itself is one fixed draw, so the mean is near zero and not exactly zero.
    assert abs(np.mean(values)) < 0.02
    shifted = mmd_to_reference(
        rng.standard_normal((60, 6)) + 1, reference, num_bootstrap=20, seed=0
    )
    assert shifted[0] > 0.1


def test_repeats_in_a_bootstrap_do_not_add_distance() -> None:
    """Counting a row's repeats as pairs would: the weighted estimate must stay near the plain."""
    reference = _reference(patients=40)
    x = np.random.default_rng(3).standard_normal((200, 6))
    distance, interval = mmd_to_reference(x, reference, num_bootstrap=200, seed=0)
    assert interval.low < distance < interval.high


def test_intervals_are_wider_when_tiles_of_a_patient_are_alike() -> None:
    x = np.random.default_rng(4).standard_normal((300, 6))
    widths = []
    for spread in (0.0, 2.0):
        reference = _reference(patients=15, tiles=20, spread=spread)
        _, interval = mmd_to_reference(x, reference, num_bootstrap=200, seed=0)
        widths.append(interval.high - interval.low)
    assert widths[1] > 1.5 * widths[0]


def test_frechet_distance_of_gaussians_has_its_closed_form() -> None:
    rng = np.random.default_rng(5)
    x = rng.standard_normal((200_000, 3)) * [1.0, 2.0, 3.0]
    y = rng.standard_normal((200_000, 3)) * [2.0, 2.0, 1.0] + [1.0, 0.0, -2.0]
    closed = (1 + 0 + 4) + (1 - 2) ** 2 + 0 + (3 - 1) ** 2
    assert frechet_distance(x, y) == pytest.approx(closed, rel=0.02)


def test_frechet_distance_to_itself_is_zero_even_with_fewer_rows_than_features() -> None:
    x = np.random.default_rng(6).standard_normal((20, 50))
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-6)


def test_the_floor_is_small_and_grows_with_differences_between_patients() -> None:
    plain, _ = real_floor(_reference(patients=20), num_splits=60, seed=0)
    varied, interval = real_floor(_reference(patients=20, spread=1.5), num_splits=60, seed=0)
    assert abs(plain) < 0.01 < varied
    assert interval.low <= varied <= interval.high


def test_one_exploding_feature_does_not_decide() -> None:
    reference = _reference()
    x = np.random.default_rng(7).standard_normal((60, 6))
    x[:, 0] = 1e12
    assert mmd_to_reference(x, reference, num_bootstrap=20, seed=0)[0] < 1.0


def test_too_few_patients_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 4"):
        Reference.fit(np.zeros((6, 3)), np.array(["a", "a", "b", "b", "c", "c"]))


def test_images_that_belong_together_are_resampled_together() -> None:
    """Five copies of each image are no more evidence; taken one by one they would seem to be."""
    reference = _reference(patients=20)
    x = np.repeat(np.random.default_rng(4).standard_normal((12, 6)) + 1, 5, axis=0)
    names = np.repeat([f"q{row}" for row in range(12)], 5)

    def width(groups: np.ndarray | None) -> float:
        _, (low, high) = mmd_to_reference(x, reference, num_bootstrap=200, seed=0, groups=groups)
        return high - low

    assert width(names) > 1.5 * width(None)
