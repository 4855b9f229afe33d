"""The limit on a cohort's life, whoever chooses the plans and whatever they saw before.

A coordinator may choose its next plan after it has seen what earlier ones released. The privacy
loss distribution of everything charged is then no bound: among plans that fit equally well, one
whose losses are rare and large can be picked where the loss so far makes them hurt most (natural
filters "are not free", arXiv 2602.15815; in ``tests/privacy/test_lifetime.py`` three plans that
each keep delta 1e-3 make 1.59e-3 by the choice between them). What bounds it is a privacy filter
(Rogers, Roth, Ullman and Vadhan 2016): a rule fixed beforehand that looks only at the parameters of
what was charged and of what is asked for. A policy declares one of these, or several:

``sums``
    A plan charges its own target epsilon and delta whole with its first round; epsilons and deltas
    add up (basic composition, a valid filter by Rogers et al.). Within a plan privacy loss
    distributions count: its noise and sampling are fixed by its hash, the coordinator chooses only
    what they are applied to and when to stop, and the target covers all the steps that the ledger
    ever allows, so a plan is one interactive mechanism of its (target epsilon, delta). A plan that
    releases something before training has steps of two kinds; the ledger keeps room for as many
    of each release as it may ever charge (one in each run that a person allowed, two where sums
    over sites may stay closed), or the next kind could be picked as the next plan could. (Software
    that calibrates otherwise changes the noise of a plan under way; when that is installed is no
    choice of whoever sees releases.)
``renyi:ORDER``
    Every charged step counts with its Rényi divergence at the one order, which for a sampled
    Gaussian is the same whatever was seen before; the sum, converted to epsilon at the limit's
    delta, stays within the limit (the Rényi filter of Feldman and Zrnic 2021).

Rounds of several plans may interleave: both kinds of filter hold for interactive mechanisms asked
in any order (Haney et al. 2023).

Of several declared filters one that holds is enough, each at an equal share of the limit's delta.
At the whole delta that would be no filter: one branch of a strategy could end in the room of the
one, another in the room of the other. At a share it is. Every figure only grows, so a transcript
that ends within filter i was within it all along; the strategy that stops as soon as filter i would
be passed has the same probability for it and is (epsilon, share)-private. Split any event by the
first filter that its transcripts end within, and add up: the shares make the whole delta.

A filter bounds what it admits. It says nothing about a limit that a site raises, or another filter
that a site chooses, once something was released; the ledger holds a cohort to the filters of its
first charge.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal

from crafts_core.delta_text import delta_text
from crafts_privacy import accounting
from crafts_privacy.accounting import PrivacyEvent
from crafts_privacy.filters import SUMS, renyi_order


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanLimit:
    """What one plan may spend of a cohort, over all of its runs: its own target."""

    max_epsilon: float
    delta: float


@dataclass(frozen=True, slots=True, kw_only=True)
class AloneLimit:
    """What a cohort may be charged if every other site and the coordinator work together."""

    own_noise_multiplier: float | None
    """The smallest share of noise that the site may add to the sum that it asks a charge for; None
    where it adds all of the noise itself."""
    max_epsilon: float
    """Of everything that the cohort was charged, each with the share that was added."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanCharges:
    """What one plan was charged to a cohort."""

    plan_hash: str
    limit: PlanLimit | None
    """What it declared; None if it was charged before the ledger wrote that down."""
    events: tuple[PrivacyEvent, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class FilterState:
    """What a filter counts of a cohort's life, beside its share of the limit."""

    name: str
    epsilon: float
    delta: float
    max_epsilon: float
    max_delta: float

    @property
    def holds(self) -> bool:
        """Whether the limit is kept; false where a number is not one."""
        within = self.epsilon <= self.max_epsilon and self.delta <= self.max_delta
        return within or self.max_epsilon == math.inf

    @property
    def is_full(self) -> bool:
        """Whether nothing new fits."""
        sums_full = self.name == SUMS and self.delta >= self.max_delta
        return self.epsilon >= self.max_epsilon or sums_full

    def __str__(self) -> str:
        return (
            f"{self.name} counts epsilon {self.epsilon:.3f} of {self.max_epsilon:g} at delta "
            f"{delta_text(self.delta)} of {delta_text(self.max_delta)}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Lifetime:
    """The limit of a policy and the filters that it declares."""

    max_epsilon: float
    delta: float
    filters: tuple[str, ...]

    def states(self, plans: Sequence[PlanCharges]) -> tuple[FilterState, ...]:
        """What each declared filter counts."""
        return tuple(self._state(name, plans) for name in self.filters)

    def state(self, plans: Sequence[PlanCharges]) -> FilterState:
        """The filter that decides: one that holds, of those the one that counts least."""
        return min(self.states(plans), key=lambda state: (not state.holds, state.epsilon))

    def is_full(self, plans: Sequence[PlanCharges]) -> bool:
        """Whether no further plan fits."""
        return all(state.is_full for state in self.states(plans))

    def steps_left(
        self, plans: Sequence[PlanCharges], wanted: PlanCharges, kind: PrivacyEvent
    ) -> int:
        """How many more steps of ``kind`` a plan may take: by its own target, then by the filters.

        Args:
            plans: What the cohort was charged so far.
            wanted: The plan's hash and limit; its events do not matter. Without a limit it has no
                steps left until a round of it has written one down.
            kind: Noise multiplier and sample rate; its steps do not matter.
        """
        limit = wanted.limit
        if limit is None:
            return 0
        same = (plan.events for plan in plans if plan.plan_hash == wanted.plan_hash)
        spent = next(same, ())
        high = 1 + accounting.steps_left(
            kind, max_epsilon=limit.max_epsilon, delta=limit.delta, spent=spent
        )
        low = 0
        while high - low > 1:
            middle = (low + high) // 2
            after = with_charge(plans, wanted.plan_hash, limit, replace(kind, steps=middle))
            low, high = (middle, high) if self.state(after).holds else (low, middle)
        return low

    def plans_left(
        self,
        plans: Sequence[PlanCharges],
        limit: PlanLimit,
        *events: PrivacyEvent,
        most: int = 100,
    ) -> int:
        """How many more plans of this target fit that run all of ``events``; at most ``most``."""
        for number in range(most):
            plans = with_charge(plans, f"further plan {number}", limit, *events)
            if not self.state(plans).holds:
                return number
        return most

    def _state(self, name: str, plans: Sequence[PlanCharges]) -> FilterState:
        share = self.delta / len(self.filters)
        if name == SUMS:
            limits = [plan.limit or _undeclared(plan, share) for plan in plans]
            epsilon = _sum(limit.max_epsilon for limit in limits)
            delta = _sum(limit.delta for limit in limits)
        else:
            events = [event for plan in plans for event in plan.events]
            epsilon, delta = renyi_epsilon(events, share, order=renyi_order(name)), share
        return FilterState(
            name=name, epsilon=epsilon, delta=delta, max_epsilon=self.max_epsilon, max_delta=share
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What a charge was made for and under, as the ledger writes it beside the charge."""

    limit: PlanLimit
    filters: tuple[str, ...]
    request_hash: str
    """SHA-256 of what exactly was asked for, the adapter among it."""
    own_noise_multiplier: float | None = None
    """Of a sum: the smallest share of noise that the site may add."""
    attempt: int = 1
    """At the round's sum."""

    def to_text(self) -> str:
        """JSON, which has no infinity: no target is null."""
        target = self.limit.max_epsilon
        values = {
            "target_epsilon": target if target != math.inf else None,
            "delta": self.limit.delta,
            "filters": self.filters,
            "request": self.request_hash,
        }
        if self.own_noise_multiplier is not None:
            values["own_noise_multiplier"] = self.own_noise_multiplier
        if self.own_noise_multiplier is not None or self.attempt > 1:
            values["attempt"] = self.attempt
        return json.dumps(values, sort_keys=True)

    @classmethod
    def of_text(cls, text: str) -> "Terms":
        """The terms again.

        Raises:
            ValueError: this was never written by ``to_text``.
        """
        try:
            values = json.loads(text)
            target = values["target_epsilon"]
            limit = PlanLimit(
                max_epsilon=math.inf if target is None else float(target),
                delta=float(values["delta"]),
            )
            own = values.get("own_noise_multiplier")
            return cls(
                own_noise_multiplier=None if own is None else float(own),
                attempt=int(values.get("attempt", 1)),
                limit=limit,
                filters=tuple(map(str, values["filters"])),
                request_hash=str(values["request"]),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"no terms of a charge: {error}") from error


def with_charge(
    plans: Sequence[PlanCharges], plan_hash: str, limit: PlanLimit | None, *events: PrivacyEvent
) -> tuple[PlanCharges, ...]:
    """The charges once a plan was charged some more; that plan is the last of them.

    A plan's hash covers its limit. Where two are named all the same, the larger counts.
    """
    before = [plan for plan in plans if plan.plan_hash == plan_hash]
    limits = [each for each in (limit, *(plan.limit for plan in before)) if each is not None]
    changed = PlanCharges(
        plan_hash=plan_hash,
        limit=_larger(limits) if limits else None,
        events=(*(event for plan in before for event in plan.events), *events),
    )
    return (*(plan for plan in plans if plan.plan_hash != plan_hash), changed)


def with_promised(
    charged: Sequence[PrivacyEvent], promised: Sequence[PrivacyEvent]
) -> tuple[PrivacyEvent, ...]:
    """What a plan was charged, and of what it promised to charge at most so often what it was not.

    Not a sum: what is among the charges already is not counted twice.
    """
    return tuple((Counter(charged) | Counter(promised)).elements())


def renyi_epsilon(events: Iterable[PrivacyEvent], delta: float, *, order: int) -> float:
    """Epsilon by Rényi divergence at one order; valid also for events chosen along the way."""
    import dp_accounting  # takes a second: to read a ledger needs none of it
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant([order])
    for event in accounting.merge(events):
        step = dp_accounting.PoissonSampledDpEvent(
            event.sample_rate, dp_accounting.GaussianDpEvent(event.noise_multiplier)
        )
        accountant.compose(step, event.steps)
    return float(accountant.get_epsilon(delta))


def _larger(limits: Sequence[PlanLimit]) -> PlanLimit:
    return PlanLimit(
        max_epsilon=max(limit.max_epsilon for limit in limits),
        delta=max(limit.delta for limit in limits),
    )


def _undeclared(plan: PlanCharges, share: float) -> PlanLimit:
    """A plan charged before targets were written down takes all of the delta: nothing joins it."""
    return PlanLimit(max_epsilon=accounting.epsilon(plan.events, share), delta=share)


def _sum(values: Iterable[float]) -> float:
    """Of the numbers as they are written, so that 0.1 and 0.2 fit into 0.3."""
    return float(sum((Decimal(repr(float(value))) for value in values), Decimal(0)))
