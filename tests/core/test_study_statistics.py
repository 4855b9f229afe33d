"""Figures of a reader study against closed forms and second libraries."""

import math

import numpy as np
import pytest
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

from crafts_core.study.agreement import alpha, cohen, fleiss, mean_cohen
from crafts_core.study.detection import (
    Resampling,
    area,
    balanced_accuracy,
    counts_of,
    criterion,
    d_prime,
    interval,
    mean_of,
    over_readers,
    sensitivity,
    specificity,
)

NAN = math.nan


def counts(real: list[int], synthetic: list[int]) -> np.ndarray:
    return np.array([real, synthetic], dtype=float)


def test_shares_are_counted_by_hand() -> None:
    """20 real, of which 15 called real; 10 synthetic, of which 8 called synthetic."""
    table = counts([5, 5, 5, 3, 1, 1], [1, 0, 1, 2, 3, 3])
    assert sensitivity(table) == pytest.approx(0.8)
    assert specificity(table) == pytest.approx(0.75)
    assert balanced_accuracy(table) == pytest.approx(0.775)


def test_d_prime_has_the_log_linear_correction() -> None:
    """Hautus 1995: (hits + 0.5) / (signals + 1), (alarms + 0.5) / (noise + 1), of as many each."""
    table = counts([3, 2, 1, 2, 1, 1], [1, 0, 1, 2, 3, 3])
    hit, alarm = norm.ppf(8.5 / 11), norm.ppf(4.5 / 11)
    assert d_prime(table) == pytest.approx(hit - alarm)
    assert criterion(table) == pytest.approx(-(hit + alarm) / 2)


def test_the_correction_makes_nothing_of_unequal_numbers() -> None:
    """Of twice as many real images twice as much is added: equal rates stay equal."""
    same = counts([10, 0, 10, 0, 0, 0], [5, 0, 5, 0, 0, 0])
    assert d_prime(same) == pytest.approx(0)
    assert criterion(same) == pytest.approx(-norm.ppf((1 / 3) / (10 + 2 / 3)))


def test_guessing_has_no_d_prime_and_half_the_area() -> None:
    same = counts([4, 2, 4, 6, 3, 1], [4, 2, 4, 6, 3, 1])
    assert d_prime(same) == pytest.approx(0)
    assert area(same) == balanced_accuracy(same) == pytest.approx(0.5)


def test_a_reader_who_is_never_wrong_has_a_finite_d_prime() -> None:
    never_wrong = counts([10, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 10])
    assert d_prime(never_wrong) == pytest.approx(2 * norm.ppf(10.5 / 11))
    assert area(never_wrong) == 1


def test_a_kind_that_was_not_read_has_no_figure() -> None:
    half = counts([3, 2, 0, 0, 0, 0], [0] * 6)
    assert all(math.isnan(f(half)) for f in (sensitivity, balanced_accuracy, d_prime, area))


def test_area_is_that_of_scikit_learn() -> None:
    rng = np.random.default_rng(4)
    kinds = rng.random(80) < 0.4
    scores = np.clip(rng.normal(3 + kinds, 1.5).round(), 1, 6)
    found = counts_of(scores[None], kinds, np.ones((1, 80)))[0, 0]
    assert area(found) == pytest.approx(roc_auc_score(kinds, scores))


def test_resampled_counts_are_those_of_a_loop() -> None:
    rng = np.random.default_rng(5)
    kinds = np.array([False, True, True, False, True])
    scores = rng.integers(1, 7, (2, 5)).astype(float)
    scores[1, 2] = NAN
    weights = rng.integers(0, 4, (3, 5)).astype(float)
    slow = np.zeros((3, 2, 2, 6))
    for b, r, i in np.ndindex(3, 2, 5):
        if not math.isnan(scores[r, i]):
            slow[b, r, int(kinds[i]), int(scores[r, i]) - 1] += weights[b, i]
    assert counts_of(scores, kinds, weights) == pytest.approx(slow)


def test_resamples_keep_the_number_of_each_kind_and_of_readers() -> None:
    kinds = np.array([True] * 7 + [False] * 4)
    drawn = Resampling.draw(kinds, 3, seed=0)
    assert set(drawn.images_BI[:, kinds].sum(1)) == {7.0}
    assert set(drawn.images_BI[:, ~kinds].sum(1)) == {4.0}
    assert set(drawn.readers_BR.sum(1)) == {3.0}


def test_bootstrap_interval_of_a_share_is_the_binomials() -> None:
    """Statistical: 200 images, 60 % called right; normal interval 0.6 +- 1.96 sqrt(pq/n)."""
    value = np.array([[1.0] * 120 + [0.0] * 80])
    drawn = Resampling.draw(np.zeros(200, dtype=bool), 1, seed=1)
    found = interval(over_readers(mean_of(value, drawn.images_BI)))
    half = 1.96 * math.sqrt(0.6 * 0.4 / 200)
    assert found == pytest.approx((0.6 - half, 0.6 + half), abs=0.01)


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    """Statistical, 120 studies of readers who guess: d' of 0 is within 95 %; control: 1 is not."""
    rng = np.random.default_rng(6)
    kinds = np.arange(60) % 2 == 0
    covered = []
    for seed in range(120):
        scores = rng.integers(1, 7, (1, 60)).astype(float)
        drawn = Resampling.draw(kinds, 1, seed=seed)
        low, high = interval(d_prime(counts_of(scores, kinds, drawn.images_BI))[:, 0])
        covered.append((low <= 0 <= high, low <= 1 <= high))
    of_guessing, of_one = np.mean(covered, axis=0)
    assert 0.91 <= of_guessing <= 0.99
    assert of_one < 0.5


def test_readers_who_differ_widen_the_interval() -> None:
    """Images alone say nothing of other readers."""
    value = np.vstack([np.full(100, 0.2), np.full(100, 0.8), np.full(100, 0.5)])
    drawn = Resampling.draw(np.zeros(100, dtype=bool), 3, seed=2)
    means_BR = mean_of(value, drawn.images_BI)
    assert interval(over_readers(means_BR)) == pytest.approx((0.5, 0.5))
    low, high = interval(over_readers(means_BR, drawn.readers_BR))
    assert (low, high) == pytest.approx((0.2, 0.8), abs=0.11)


def one_image_draws(rng: np.random.Generator, num_readers: int) -> np.ndarray:
    """Whether each reader is right about 40 images, half of them easy: readers agree on most."""
    is_easy_I = rng.random(40) < 0.5
    return (rng.random((num_readers, 40)) < np.where(is_easy_I, 0.95, 0.05)).astype(float)


def test_readers_of_the_same_images_are_no_further_images() -> None:
    """Statistical, 120 studies of 8 readers who agree: 0.5 is within 95 %.

    Control: were each answer an image of its own, intervals would be too narrow by far.
    """
    rng = np.random.default_rng(14)
    kinds = np.zeros(40, dtype=bool)
    covered = []
    for seed in range(120):
        value_RI = one_image_draws(rng, 8)
        weight_BI = Resampling.draw(kinds, 8, seed=seed).images_BI
        low, high = interval(over_readers(mean_of(value_RI, weight_BI)))
        apart = math.sqrt(value_RI.mean() * (1 - value_RI.mean()) / value_RI.size)
        covered.append((low <= 0.5 <= high, abs(value_RI.mean() - 0.5) <= 1.96 * apart))
    by_image, by_answer = np.mean(covered, axis=0)
    assert 0.88 <= by_image <= 0.985
    assert by_answer < 0.7


def test_the_bootstrap_of_images_and_readers_is_that_of_a_loop() -> None:
    """Its spread, against drawing readers and images by hand, an answer at a time."""
    rng = np.random.default_rng(12)
    value_RI = one_image_draws(rng, 5) + rng.normal(0, 0.2, (5, 1))
    drawn = Resampling.draw(np.zeros(40, dtype=bool), 5, seed=3)
    found = over_readers(mean_of(value_RI, drawn.images_BI), drawn.readers_BR)
    slow = []
    for _ in range(2000):
        images, readers = rng.integers(40, size=40), rng.integers(5, size=5)
        slow.append(np.mean([value_RI[reader, images].mean() for reader in readers]))
    assert found.std() == pytest.approx(np.std(slow), rel=0.08)
    assert interval(found) == pytest.approx(np.quantile(slow, [0.025, 0.975]), abs=0.02)


def test_a_reader_without_a_value_does_not_count() -> None:
    assert over_readers(np.array([0.2, NAN, 0.4])) == pytest.approx(0.3)
    assert interval(np.array([NAN, NAN, 1.0])) is None


def test_cohen_is_the_textbooks() -> None:
    """20 both yes, 5 and 10 apart, 15 both no: observed 0.7, expected 0.5."""
    first = [1.0] * 25 + [0.0] * 25
    second = [1.0] * 20 + [0.0] * 5 + [1.0] * 10 + [0.0] * 15
    assert cohen(first, second, is_ordinal=False) == pytest.approx(0.4)


def test_weighted_cohen_counts_squared_distance() -> None:
    """1 - sum of squared differences over that of all pairs."""
    first, second = [1, 2, 5, 6, 3], [1, 3, 4, 6, 1]
    observed = sum((a - b) ** 2 for a, b in zip(first, second, strict=True)) / 5
    expected = sum((a - b) ** 2 for a in first for b in second) / 25
    assert cohen(first, second, is_ordinal=True) == pytest.approx(1 - observed / expected)


def test_fleiss_is_that_of_wikipedia() -> None:
    """Ten subjects, fourteen raters, five categories: 0.210."""
    table = [
        [0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1],
        [7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7],
    ]  # fmt: skip
    ratings = np.array([np.repeat(np.arange(5.0), row) for row in table]).T
    assert fleiss(ratings) == pytest.approx(0.210, abs=5e-4)


def test_alpha_is_krippendorffs_own_example() -> None:
    """Krippendorff 2011, example C: nominal 0.743, ordinal 0.815."""
    ratings = np.array([
        [1, 2, 3, 3, 2, 1, 4, 1, 2, NAN, NAN, NAN],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, NAN, 3],
        [NAN, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, NAN],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, NAN],
    ])  # fmt: skip
    assert alpha(ratings, is_ordinal=False) == pytest.approx(0.743, abs=5e-4)
    assert alpha(ratings, is_ordinal=True) == pytest.approx(0.815, abs=5e-4)


def test_readers_who_always_say_the_same_have_no_kappa() -> None:
    same = np.ones((2, 6))
    assert cohen([1.0] * 4, [1.0] * 4, is_ordinal=False) is None
    assert (mean_cohen(same), fleiss(same), alpha(same, is_ordinal=False)) == (None, None, None)


def test_pairs_are_compared_on_what_both_have_read() -> None:
    values = np.array([[0, 1, 0, 1, NAN, 1], [0, 1, 0, 1, 1, NAN], [0, 1, 1, 0, NAN, NAN]])
    apart = cohen([0, 1, 0, 1], [0, 1, 1, 0], is_ordinal=False)
    assert mean_cohen(values) == pytest.approx((1 + 2 * apart) / 3)
