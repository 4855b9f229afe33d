"""From what ran to what it cost: events in, (epsilon, delta) out.

Events compose; epsilons do not add up. The accountant of record is dp-accounting's privacy loss
distribution (PLD), whose result is an upper bound at every discretization; Opacus gives a second
opinion from its own code (PRV, or Rényi where PRV cannot cope). A patient's data are everything
that differs between neighbouring data sets, so epsilon here is per patient.
"""

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import lru_cache, partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from crafts_privacy.errors import CalibrationError

if TYPE_CHECKING:
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

FINE = 1e-4
"""Discretization of the privacy loss that is reported and enforced."""
COARSE = 1e-3
"""Discretization for searching; the same epsilon to 2e-4, ten times faster."""

_FINEST_RELATIVE = 5e-6
"""No finer than this times a rough epsilon, so that hopeless mechanisms stay affordable."""
_PRV, _RENYI = "opacus-prv", "opacus-rdp"
_PRV_ERROR = 0.01
"""What PRV may be off by; it adds that to its answer."""
_PRV_MAX_EPSILON = 40.0
"""Opacus' PRV needs memory that grows with epsilon; above this Rényi answers instead."""
MIN_NOISE_MULTIPLIER, MAX_NOISE_MULTIPLIER = 1e-3, 1e6
"""What a mechanism may have; weaker noise than the first is as good as none."""


class NeighboringRelation(StrEnum):
    """Which two data sets must look alike."""

    ADD_OR_REMOVE_ONE = "add_or_remove_one"
    """One has one patient more. The claim of this system."""
    REPLACE_ONE = "replace_one"
    """One patient is another person. Reported beside; costs up to twice as much."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrivacyEvent:
    """Steps of one Poisson-subsampled Gaussian mechanism over patients.

    A noise multiplier of zero is no privacy at all: its epsilon is infinite.
    """

    noise_multiplier: float
    sample_rate: float
    steps: int

    def __post_init__(self) -> None:
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier >= 0):
            raise ValueError(f"expected finite noise_multiplier >= 0, got {self.noise_multiplier}")
        if not 0 < self.sample_rate <= 1:
            raise ValueError(f"expected 0 < sample_rate <= 1, got {self.sample_rate}")
        if self.steps < 0:
            raise ValueError(f"expected steps >= 0, got {self.steps}")


class SecondOpinion(NamedTuple):
    """Epsilon by another library, and which of its accountants gave it."""

    epsilon: float
    accountant: str

    def agrees_with(self, epsilon: float) -> bool:
        """Whether this carries the figure of record.

        PRV must lie as near on both sides as its error allows, and 2 % or 0.02 more. Rényi is an
        upper bound, however loose, so only one that lies below speaks against the figure.
        """
        if not (math.isfinite(epsilon) and math.isfinite(self.epsilon)):
            return epsilon == self.epsilon == math.inf
        allowed = max(0.02 * epsilon, 0.02 + _PRV_ERROR)
        if self.accountant == _PRV:
            return abs(self.epsilon - epsilon) <= allowed
        return self.epsilon >= epsilon - allowed


def epsilon(
    events: Iterable[PrivacyEvent],
    delta: float,
    *,
    discretization: float = FINE,
    neighboring_relation: NeighboringRelation = NeighboringRelation.ADD_OR_REMOVE_ONE,
) -> float:
    """Epsilon of all events together, never understated where ``delta`` is 1e-10 or more.

    Below, what the library's transform rounds off shows: at 1e-11 and 1e5 steps 0.05 %.

    Returns:
        Zero when nothing ran, infinity when anything ran without noise.

    Raises:
        ValueError: ``delta`` is not in (0, 1).
    """
    _check_delta(delta)
    merged = merge(events)
    if not merged:
        return 0.0
    if any(event.noise_multiplier == 0 for event in merged):
        return math.inf
    discretization = max(discretization, _FINEST_RELATIVE * _rough_epsilon(merged, delta))
    return _epsilon(merged, delta, discretization, neighboring_relation)


@lru_cache(maxsize=1024)
def _epsilon(
    merged: tuple[PrivacyEvent, ...],
    delta: float,
    discretization: float,
    neighboring_relation: NeighboringRelation,
) -> float:
    """A round asks for it before and after, and every page and report again."""
    composed = _composed(merged, discretization, neighboring_relation)
    return float(composed.get_epsilon_for_delta(delta))


def epsilon_at_two_hospitals(
    apart: Iterable[PrivacyEvent], in_one_sum: Iterable[PrivacyEvent], delta: float
) -> float:
    """Epsilon for a patient who is at two hospitals.

    Args:
        apart: Steps of either hospital, each of whose noise protects its patients by itself.
        in_one_sum: Steps in which both hospitals are members of one sum. The patient is drawn at
            both, at one or at none, and may count for twice the bound under the noise of one sum:
            both gradients point the same way at worst, which is a mixture of Gaussians at 0, 1 and
            2 (Choquette-Choo et al. 2023, arXiv 2310.15526).
        delta: Of the promise.

    Returns:
        Infinity when anything ran without noise.
    """
    from dp_accounting.pld import privacy_loss_distribution as pld

    _check_delta(delta)
    alone, summed = merge(apart), merge(in_one_sum)
    if any(event.noise_multiplier == 0 for event in (*alone, *summed)):
        return math.inf
    if not summed:
        return epsilon(alone, delta)
    discretization = max(COARSE, _FINEST_RELATIVE * _rough_epsilon([*alone, *summed * 4], delta))
    composed = _composed(alone, discretization, NeighboringRelation.ADD_OR_REMOVE_ONE)
    for event in summed:
        rate = event.sample_rate
        step = pld.from_mixture_gaussian_mechanism(
            standard_deviation=event.noise_multiplier,
            sensitivities=[0.0, 1.0, 2.0],
            sampling_probs=[(1 - rate) ** 2, 2 * rate * (1 - rate), rate**2],
            value_discretization_interval=discretization,
        )
        composed = composed.compose(step.self_compose(event.steps))
    return float(composed.get_epsilon_for_delta(delta))


def max_true_positive_rate(events: Iterable[PrivacyEvent], false_positive_rate: float) -> float:
    """How often any attacker can be right that a patient was in, at a false positive rate.

    The upper bound over all attacks by the whole privacy curve: for every epsilon with its own
    delta, ``TPR <= exp(epsilon) FPR + delta`` and the same for the complement (Kairouz, Oh and
    Viswanath 2015). Tighter than the bound from one (epsilon, delta).

    Raises:
        ValueError: the rate is not in (0, 1).
    """
    if not 0 < false_positive_rate < 1:
        raise ValueError(f"expected 0 < false_positive_rate < 1, got {false_positive_rate}")
    merged = merge(events)
    if not merged:
        return false_positive_rate
    if any(event.noise_multiplier == 0 for event in merged):
        return 1.0
    largest = max(1.0, 2 * _rough_epsilon(merged, 1e-6))
    relation = NeighboringRelation.ADD_OR_REMOVE_ONE
    composed = _composed(merged, max(COARSE, _FINEST_RELATIVE * largest), relation)
    epsilons = np.linspace(0.0, largest, 400)
    deltas = np.asarray(composed.get_delta_for_epsilon(epsilons))
    return min(map(partial(true_positive_rate, false_positive_rate), epsilons, deltas))


def true_positive_rate(false_positive_rate: float, epsilon: float, delta: float) -> float:
    """The same by one (epsilon, delta) alone."""
    by_positive = math.exp(min(epsilon, 700.0)) * false_positive_rate + delta
    by_negative = 1 - math.exp(-epsilon) * (1 - false_positive_rate - delta)
    return float(min(1.0, by_positive, by_negative))


def epsilon_second_opinion(events: Iterable[PrivacyEvent], delta: float) -> SecondOpinion:
    """Epsilon under add-or-remove-one by Opacus: PRV where it copes, else Rényi.

    PRV is an upper bound that exceeds PLD by its error allowance; Rényi is looser.
    """
    _check_delta(delta)
    merged = merge(events)
    if not merged:
        return SecondOpinion(0.0, _PRV)
    if any(event.noise_multiplier == 0 for event in merged):
        return SecondOpinion(math.inf, _RENYI)
    return _opinion_of_opacus(merged, delta)


@lru_cache(maxsize=64)
def _opinion_of_opacus(merged: tuple[PrivacyEvent, ...], delta: float) -> SecondOpinion:
    """Seconds of work; a report asks for a run and for a life that may be the same."""
    # Opacus imports much of torch; only this function needs it.
    from opacus.accountants import PRVAccountant, RDPAccountant

    history = [(event.noise_multiplier, event.sample_rate, event.steps) for event in merged]
    renyi = RDPAccountant()
    renyi.history = history
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # log(0) where q = 1, and hints about Rényi orders
        bound = float(renyi.get_epsilon(delta))
        if bound <= _PRV_MAX_EPSILON:
            prv = PRVAccountant()
            prv.history = history
            value = float(prv.get_epsilon(delta, eps_error=_PRV_ERROR))
            if math.isfinite(value):
                return SecondOpinion(value, _PRV)
    return SecondOpinion(bound, _RENYI)


def calibrate_noise_multiplier(
    *,
    target_epsilon: float,
    delta: float,
    sample_rate: float,
    steps: int,
    spent: Sequence[PrivacyEvent] = (),
) -> float:
    """Smallest noise multiplier, to about 0.1 %, with which ``steps`` more keep the target.

    Searched coarsely, then verified at the discretization that is enforced: ``spent`` and the new
    steps together never exceed the target. Rounded up to four significant digits, so that it
    survives being written down.

    Raises:
        CalibrationError: what is spent already leaves nothing.
        ValueError: an argument is out of range.
    """
    if not (math.isfinite(target_epsilon) and target_epsilon > 0):
        raise ValueError(f"expected finite target_epsilon > 0, got {target_epsilon}")
    if steps < 1:
        raise ValueError(f"expected steps >= 1, got {steps}")
    return _calibrated(target_epsilon, delta, sample_rate, steps, merge(spent))


@lru_cache(maxsize=64)
def _calibrated(
    target_epsilon: float,
    delta: float,
    sample_rate: float,
    steps: int,
    spent: tuple[PrivacyEvent, ...],
) -> float:
    """Seconds of work; every round of a plan asks for the same."""
    from scipy.optimize import brentq  # half a second: to read a ledger needs none of it

    coarse = max(COARSE, 1e-4 * target_epsilon)

    def cost(noise_multiplier: float, discretization: float) -> float:
        event = PrivacyEvent(
            noise_multiplier=noise_multiplier, sample_rate=sample_rate, steps=steps
        )
        return epsilon([*spent, event], delta, discretization=discretization)

    def excess(log_noise: float) -> float:
        """Smooth, nearly a line: found in five looks where halving takes eleven."""
        return math.log(max(cost(math.exp(log_noise), coarse), 1e-9) / target_epsilon)

    high = 1.0
    while cost(high, coarse) > target_epsilon:
        high *= 2.0
        if high > MAX_NOISE_MULTIPLIER:
            raise CalibrationError(
                f"no noise keeps {steps} more steps within epsilon {target_epsilon:g} at delta "
                f"{delta:g}: {epsilon(spent, delta):.3f} is spent already; lower the steps, raise "
                "epsilon or delta, or end the study"
            )
    low = high / 2.0
    while low >= MIN_NOISE_MULTIPLIER and cost(low, coarse) <= target_epsilon:
        low, high = low / 2.0, low
    low = max(low, MIN_NOISE_MULTIPLIER)
    if cost(low, coarse) > target_epsilon:
        low = math.exp(brentq(excess, math.log(low), math.log(high), xtol=2e-4))
    noise_multiplier = _round_up(low)
    while cost(noise_multiplier, FINE) > target_epsilon:
        noise_multiplier = _round_up(noise_multiplier * 1.0002)
    return noise_multiplier


def steps_left(
    kind: PrivacyEvent,
    *,
    max_epsilon: float,
    delta: float,
    spent: Sequence[PrivacyEvent] = (),
    most: int = 1_000_000,
) -> int:
    """How many more steps of ``kind`` a budget allows after ``spent``; at most ``most``.

    The answer to "what is left": epsilons neither add up nor subtract. Searched coarsely, then
    stepped down until the discretization that is enforced agrees, so it is never too many.

    Args:
        kind: Noise multiplier and sample rate; its own steps do not matter.
        max_epsilon: The budget at ``delta``.
        delta: Of the promise.
        spent: What the cohort was charged so far.
        most: Where the search ends.
    """

    def fits(steps: int, discretization: float) -> bool:
        event = replace(kind, steps=steps)
        return epsilon([*spent, event], delta, discretization=discretization) <= max_epsilon

    if not fits(1, FINE):
        return 0
    low, high = 1, 2
    while high <= most and fits(high, COARSE):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle, COARSE) else (low, middle)
    while low > 1 and not fits(low, FINE):
        low -= max(1, low // 1000)
    return low


def merge(events: Iterable[PrivacyEvent]) -> tuple[PrivacyEvent, ...]:
    """Events of one kind as one event with their steps added, in a fixed order.

    The composition is the same; its cost then depends on kinds, not on rounds, and equal histories
    give the same epsilon to the last bit however they were cut into rounds.
    """
    steps_of: dict[tuple[float, float], int] = {}
    for event in events:
        kind = (event.noise_multiplier, event.sample_rate)
        steps_of[kind] = steps_of.get(kind, 0) + event.steps
    return tuple(
        PrivacyEvent(noise_multiplier=noise_multiplier, sample_rate=sample_rate, steps=steps)
        for (noise_multiplier, sample_rate), steps in sorted(steps_of.items())
        if steps > 0
    )


def _composed(
    merged: Sequence[PrivacyEvent],
    discretization: float,
    neighboring_relation: NeighboringRelation,
) -> "PrivacyLossDistribution":
    """What dp-accounting's ``PLDAccountant`` composes, to the last bit."""
    from dp_accounting.pld import privacy_loss_distribution as pld

    composed = pld.identity(value_discretization_interval=discretization)
    for event in merged:
        noise_multiplier, sample_rate = event.noise_multiplier, event.sample_rate
        if sample_rate == 1.0:  # closed form, no sampling
            noise_multiplier /= math.sqrt(event.steps)
        step = _one_step(noise_multiplier, sample_rate, discretization, neighboring_relation)
        composed = composed.compose(step if sample_rate == 1.0 else step.self_compose(event.steps))
    return composed


@lru_cache(maxsize=16)
def _one_step(
    noise_multiplier: float,
    sample_rate: float,
    discretization: float,
    neighboring_relation: NeighboringRelation,
) -> "PrivacyLossDistribution":
    """Nearly all the work, and the same in every round of a study."""
    import dp_accounting  # takes a second: to read a ledger needs none of it
    from dp_accounting.pld import privacy_loss_distribution as pld

    return pld.from_gaussian_mechanism(
        standard_deviation=noise_multiplier,
        value_discretization_interval=discretization,
        sampling_prob=sample_rate,
        neighboring_relation=dp_accounting.NeighboringRelation[neighboring_relation.name],
    )


def _rough_epsilon(events: Sequence[PrivacyEvent], delta: float) -> float:
    """The size of epsilon by the central limit; neither a bound nor ever reported."""
    mu_squared = 0.0
    for event in events:
        inverse = min(event.noise_multiplier**-2, 500.0)
        amplified = event.sample_rate**2 * math.expm1(inverse)
        mu_squared += event.steps * min(event.noise_multiplier**-2, amplified)
    return mu_squared / 2 + math.sqrt(2 * mu_squared * math.log(1 / delta))


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise ValueError(f"expected 0 < delta < 1, got {delta}")


def _round_up(value: float) -> float:
    """To four significant digits, never down."""
    digits = 3 - math.floor(math.log10(value))
    rounded = round(value, digits)
    return rounded if rounded >= value else round(value + 10.0**-digits, digits)
