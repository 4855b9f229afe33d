"""The statistics of an audit: what was seen to a p-value, and right guesses to a bound on epsilon.

Letters: T steps, N patients, D coordinates.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

FALSE_ALARM = 1e-6
"""A right engine fails one statistic with this probability."""

CONFIDENCE = 0.95
"""Of the one-run lower bound."""

Vector = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class OneRun:
    """Lower bounds on epsilon from right guesses, at 95 % confidence."""

    claimed_epsilon: float
    delta: float
    num_canaries: int
    num_right: int
    bound: float
    ceiling: float
    control: float
    """The bound where the same engine runs without noise; it must exceed the claim."""

    @property
    def passed(self) -> bool:
        return self.bound <= self.claimed_epsilon < min(self.ceiling, self.control)


def one_run(
    *, claimed_epsilon: float, delta: float, num_canaries: int, num_right: int, without_noise: int
) -> OneRun:
    """The three bounds: of what was guessed right, of all, and of the same without noise."""
    bound, control, ceiling = (
        epsilon_lower_bound(num_guesses=num_canaries, num_right=count, delta=delta)
        for count in (num_right, without_noise, num_canaries)
    )
    return OneRun(
        claimed_epsilon=claimed_epsilon,
        delta=delta,
        num_canaries=num_canaries,
        num_right=num_right,
        bound=bound,
        ceiling=ceiling,
        control=control,
    )


def p_scale(standardised: Vector) -> float:
    """Two-sided: have these independent Gaussians variance one?"""
    return two_sided(stats.chi2(standardised.size), float((standardised**2).sum()))


def p_shape(standardised: Vector) -> float:
    """Are they standard Gaussians?"""
    return float(stats.kstest(standardised.ravel(), "norm").pvalue)


def p_fresh(noise_TD: Vector) -> float:
    """The largest correlation of two steps' noise; Bonferroni over all pairs."""
    lengths = np.linalg.norm(noise_TD, axis=1, keepdims=True)
    if not (lengths > 0).all():
        return 0.0
    unit_TD = noise_TD / lengths
    upper = np.triu_indices(len(unit_TD), k=1)
    largest = np.abs(unit_TD @ unit_TD.T)[upper].max()
    num_coordinates = noise_TD.shape[1]
    # Squared correlation of independent Gaussians is Beta(1/2, (D - 1) / 2).
    single = stats.beta.sf(largest**2, 0.5, (num_coordinates - 1) / 2)
    return float(min(1.0, len(upper[0]) * single))


def p_rate(drawn_TN: Vector, sample_rate: float) -> float:
    """Is a patient drawn as often as claimed, and at most once a step?"""
    if drawn_TN.max(initial=0.0) > 1:
        return 0.0
    return float(stats.binomtest(int(drawn_TN.sum()), drawn_TN.size, sample_rate).pvalue)


def p_spread(drawn_TN: Vector, sample_rate: float) -> float:
    """Sum of squared deviations of the sample sizes, chi-squared by the central limit."""
    steps, num = drawn_TN.shape
    deviation_T = drawn_TN.sum(axis=1) - num * sample_rate
    scaled = float((deviation_T**2).sum()) / (num * sample_rate * (1 - sample_rate))
    return two_sided(stats.chi2(steps), scaled)


def p_rotation(drawn_TN: Vector, sample_rate: float) -> float:
    """Agreement of who is drawn in neighbouring steps; a shuffled deck alternates."""
    centred_TN = drawn_TN - sample_rate
    products = centred_TN[1:] * centred_TN[:-1]
    variance = sample_rate * (1 - sample_rate)
    return of_z(float(products.sum() / (variance * math.sqrt(products.size))))


def of_z(z: float) -> float:
    """Two-sided."""
    return float(2 * stats.norm.sf(abs(z)))


def two_sided(distribution: "stats.rv_continuous_frozen", value: float) -> float:
    """Twice the smaller tail."""
    return float(2 * min(distribution.cdf(value), distribution.sf(value)))


def epsilon_lower_bound(*, num_guesses: int, num_right: int, delta: float) -> float:
    """The smallest epsilon that so many right guesses do not contradict, at 95 % confidence.

    Theorem 5.2 of arXiv 2305.08846, with a guess for every canary.
    """
    if _surprise(num_guesses, num_right, 0.0, delta) > 1 - CONFIDENCE:
        return 0.0
    low, high = 0.0, 1.0
    while high < 64 and _surprise(num_guesses, num_right, high, delta) <= 1 - CONFIDENCE:
        low, high = high, 2 * high
    while high - low > 1e-4:
        middle = (low + high) / 2
        contradicted = _surprise(num_guesses, num_right, middle, delta) <= 1 - CONFIDENCE
        low, high = (middle, high) if contradicted else (low, middle)
    return low


def _surprise(num_guesses: int, num_right: int, epsilon: float, delta: float) -> float:
    """Probability bound of at least ``num_right`` right guesses under (epsilon, delta)-DP."""
    right = stats.binom(num_guesses, 1 / (1 + math.exp(-epsilon)))
    # tail_V[i - 1] is P[V - i <= successes < V]: what delta can lift above the threshold.
    below_V = right.pmf(np.arange(num_right - 1, -1, -1))
    tail_V = np.cumsum(below_V)
    lift = float((tail_V / np.arange(1, num_right + 1)).max()) if num_right else 0.0
    return float(min(1.0, right.sf(num_right - 1) + 2 * num_guesses * delta * lift))
