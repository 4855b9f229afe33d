"""What steps cost together, as the privacy report shows it."""

import math
from collections import Counter
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from crafts_privacy import accounting
from crafts_privacy.accounting import NeighboringRelation, PrivacyEvent
from crafts_privacy.lifetime import Lifetime, PlanCharges

FALSE_POSITIVE_RATE = 0.01


class Spending(BaseModel):
    """The cost of some events together. None where steps ran without noise: no bound exists.

    Of events fixed beforehand, as those of one plan are. Where plans were chosen along the way, the
    filters' limit is what holds.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    events: int
    steps: int
    epsilon: float | None
    """Add or remove one patient: the claim. By privacy loss distributions (dp-accounting)."""
    epsilon_replace_one: float | None
    """One patient is another person: reported beside."""
    epsilon_second_opinion: float | None
    second_accountant: str
    epsilon_seen_twice: float | None
    """For a patient who is also at another hospital that ran as much: both composed, or both in
    the same sums where this one's steps were of sums."""
    max_true_positive_rate: float
    """How often any attacker can be right that a patient took part, at 1 % false alarms."""


def lifetime_spending(
    limit: Lifetime, plans: Sequence[PlanCharges], *, summed: Sequence[PrivacyEvent] = ()
) -> Spending:
    """Of everything charged, ``summed`` of it in sums over sites.

    Odds of an attack are by the curve of one plan, else by the limit. Where no filter keeps the
    limit, nothing bounds the odds.
    """
    events = [event for plan in plans for event in plan.events]
    spent = spending_of(events, limit.delta, summed=summed)
    if len(plans) <= 1 or spent.epsilon is None:
        return spent
    odds = 1.0
    if limit.state(plans).holds:
        odds = accounting.true_positive_rate(FALSE_POSITIVE_RATE, limit.max_epsilon, limit.delta)
    return spent.model_copy(update={"max_true_positive_rate": odds})


def spending_of(
    events: Sequence[PrivacyEvent], delta: float, *, summed: Sequence[PrivacyEvent] = ()
) -> Spending:
    """By every accountant.

    Args:
        events: All of them.
        delta: Of the promise.
        summed: Those of ``events`` that were steps over several sites.
    """
    opinion = accounting.epsilon_second_opinion(events, delta)
    replace_one = accounting.epsilon(
        events, delta, neighboring_relation=NeighboringRelation.REPLACE_ONE
    )
    return Spending(
        events=len(events),
        steps=sum(event.steps for event in events),
        epsilon=_finite(accounting.epsilon(events, delta)),
        epsilon_replace_one=_finite(replace_one),
        epsilon_second_opinion=_finite(opinion.epsilon),
        second_accountant=opinion.accountant,
        epsilon_seen_twice=_finite(_seen_twice(events, summed, delta)),
        max_true_positive_rate=accounting.max_true_positive_rate(events, FALSE_POSITIVE_RATE),
    )


def _seen_twice(
    events: Sequence[PrivacyEvent], summed: Sequence[PrivacyEvent], delta: float
) -> float:
    apart = Counter(events) - Counter(summed)
    return accounting.epsilon_at_two_hospitals([*apart.elements()] * 2, summed, delta)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
