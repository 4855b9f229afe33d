"""What a cohort's limit for life is, what its filters count, and what is left: in steps and plans.

Epsilons do not subtract: what is left is told as what still may run.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from crafts_client.home import SiteConfig, SiteHome
from crafts_client.mechanism import limit_of, mechanism_of, releases_to_come
from crafts_client.site_ledger import existing_ledger
from crafts_core.delta_text import delta_times_patients
from crafts_core.plan import Plan, PlanError
from crafts_privacy import accounting
from crafts_privacy.accounting import PrivacyEvent
from crafts_privacy.charges import SumCharge, charged_to, charges_of_sums
from crafts_privacy.ledger import FiltersChangedError, Ledger, LedgerError
from crafts_privacy.ledger_export import LedgerExport
from crafts_privacy.lifetime import FilterState, Lifetime, PlanCharges, with_charge
from crafts_privacy.plan_check import noise_problems
from crafts_privacy.plan_noise import release_events


class _Told(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class FilterCount(_Told):
    """What one filter of the policy counts. None where nothing bounds it."""

    name: str
    epsilon: float | None
    delta: float
    max_epsilon: float
    max_delta: float
    holds: bool
    text: str

    @classmethod
    def of(cls, state: FilterState) -> "FilterCount":
        """What a filter has counted, in numbers that JSON has."""
        return cls(
            name=state.name,
            epsilon=state.epsilon if math.isfinite(state.epsilon) else None,
            delta=state.delta,
            max_epsilon=state.max_epsilon,
            max_delta=state.max_delta,
            holds=state.holds,
            text=str(state),
        )

    def __str__(self) -> str:
        return self.text


class PlanLeft(_Told):
    """A plan that is charged: by its own target and the filters together."""

    plan: str
    steps_charged: int
    steps_left: int

    @classmethod
    def of(cls, lifetime: Lifetime, plans: Sequence[PlanCharges], plan: PlanCharges) -> "PlanLeft":
        """What a plan was charged for, and how much more of its last event fits."""
        return cls(
            plan=plan.plan_hash,
            steps_charged=sum(event.steps for event in plan.events),
            steps_left=lifetime.steps_left(plans, plan, plan.events[-1]),
        )

    def __str__(self) -> str:
        return f"{self.plan[:16]} ran {self.steps_charged} steps, {self.steps_left} more fit"


class Budget(_Told):
    """What ``crafts-client budget`` prints."""

    cohort: str
    epsilon_allowed: float
    delta: float
    delta_times_declared_patients: float
    filters: tuple[FilterCount, ...]
    within_the_limit: bool
    plans: tuple[PlanLeft, ...]
    further_plans_fit: bool
    """Some, however small; what a certain one may run is asked with ``--plan``."""
    steps: int
    epsilon_spent: float | None
    """Of these steps, had all of them been fixed beforehand; the filters hold without that."""


def budget_of(site: SiteHome) -> Budget:
    """Everything about the cohort's life.

    Raises:
        LedgerError: the ledger cannot say, or the policy declares other filters than it began with.
    """
    plans = charged_plans(site, existing_ledger(site))
    question = ("budget", site.config.cohort, site.config.declared_patients, site.policy.lifetime)
    return site.figures.of(Budget, (*question, plans), lambda: _counted(site, plans))


def _counted(site: SiteHome, plans: Sequence[PlanCharges]) -> Budget:
    cohort, lifetime = site.config.cohort, site.policy.lifetime
    events = [event for plan in plans for event in plan.events]
    spent = accounting.epsilon(events, lifetime.delta)
    return Budget(
        cohort=cohort,
        epsilon_allowed=lifetime.max_epsilon,
        delta=lifetime.delta,
        delta_times_declared_patients=delta_times_patients(
            lifetime.delta, site.config.declared_patients
        ),
        filters=tuple(map(FilterCount.of, lifetime.states(plans))),
        within_the_limit=lifetime.state(plans).holds,
        plans=tuple(PlanLeft.of(lifetime, plans, plan) for plan in plans),
        further_plans_fit=not lifetime.is_full(plans),
        steps=sum(event.steps for event in events),
        epsilon_spent=spent if math.isfinite(spent) else None,
    )


def left_for(site: SiteHome, path: Path) -> dict[str, Any]:
    """What is left for a plan, and for further ones that declare and run as much."""
    plan, lifetime = Plan.load(path), site.policy.lifetime
    plans = charged_plans(site, existing_ledger(site))
    question = ("left", plan.hash, site.config.declared_patients, lifetime, plans)
    return site.figures.of(
        dict[str, Any], question, lambda: _left_for(plan, plans, lifetime, site.config)
    )


def _left_for(
    plan: Plan, plans: Sequence[PlanCharges], lifetime: Lifetime, config: SiteConfig
) -> dict[str, Any]:
    if problem := next(noise_problems(plan), None):
        raise PlanError(problem)
    mechanism = mechanism_of(plan, declared_patients=config.declared_patients)
    limit, whole = limit_of(plan, lifetime), mechanism.event(plan.total_steps)
    charged = [event for each in plans if each.plan_hash == plan.hash for event in each.events]
    to_come = releases_to_come(plan, charged)
    if to_come:  # they come before any step of training, and are charged to the same target
        plans = with_charge(plans, plan.hash, limit, *to_come)
    wanted = PlanCharges(plan_hash=plan.hash, limit=limit, events=())
    return {
        "steps_left_of_this_plan": lifetime.steps_left(plans, wanted, whole),
        "steps_of_this_plan": plan.total_steps,
        "noise_multiplier_of_this_plan": mechanism.noise_multiplier,
        "further_plans_like_this_one": lifetime.plans_left(
            plans, limit, *release_events(plan), whole
        ),
    }


def epsilon_at_all_sites(
    site: SiteHome, ledger: Ledger | None, exports: Sequence[LedgerExport]
) -> float:
    """Of a patient of this cohort who is at other sites as well: the steps of all of them.

    Steps that two of the sites took in one sum share its noise, and count as such.

    Raises:
        LedgerError: a patient would be at three members of one sum, which nothing here counts.
    """
    entries = () if ledger is None else ledger.entries()
    ours = charged_to(entries, site.config.cohort)
    apart = Counter(entry.event for entry in ours)
    for export in exports:
        apart += Counter(export.charged)
    in_one_sum: list[PrivacyEvent] = []
    members = [charges_of_sums(entries, ours), *(export.of_sums for export in exports)]
    for here, there in _shared(members):
        apart -= Counter((here, there))
        # Each calibrated for itself: the weaker noise is what the sum has for certain.
        in_one_sum.append(min(here, there, key=_noise_of))
    return accounting.epsilon_at_two_hospitals(apart.elements(), in_one_sum, site.policy.max_delta)


def _shared(
    members: Sequence[Sequence[SumCharge]],
) -> Iterator[tuple[PrivacyEvent, PrivacyEvent]]:
    """Charges of two ledgers for one sum, whichever two of them."""
    charges: dict[str, list[list[PrivacyEvent]]] = {}
    for number, ledger in enumerate(members):
        for charge in ledger:
            of_sum = charges.setdefault(charge.request_hash, [[] for _ in members])
            of_sum[number].append(charge.event)
    for of_sum in charges.values():
        held = [events for events in of_sum if events]
        if len(held) > 2:
            raise LedgerError(
                "three of these ledgers hold charges for one sum; a patient at three members of "
                "one sum is not counted, so ask with fewer of them at a time"
            )
        if len(held) == 2:
            # Of what a site was charged twice for, one vector left: say the weaker one.
            yield from zip(*(sorted(events, key=_noise_of) for events in held), strict=False)


def _noise_of(event: PrivacyEvent) -> float:
    return event.noise_multiplier


def charged_plans(site: SiteHome, ledger: Ledger | None) -> tuple[PlanCharges, ...]:
    """What the cohort was charged, under the filters that the policy declares.

    Raises:
        FiltersChangedError: it began under others.
    """
    if ledger is None:
        return ()
    ledger.check_filters(site.config.cohort, site.policy.lifetime_filters)
    return ledger.plans(site.config.cohort)


def doubts(site: SiteHome, ledger: Ledger | None, plans: Sequence[PlanCharges]) -> Iterator[str]:
    """Where no filter of the policy bounds the cohort's life."""
    state = site.policy.lifetime.state(plans)
    if not state.holds:
        yield f"lifetime budget: {state}"
    try:
        charged_plans(site, ledger)
    except FiltersChangedError as error:
        yield f"lifetime budget: {error}"
