"""The plans that the coordinator offers, and what this site would say to each.

What comes over the wire is the coordinator's word: a plan that cannot be read, or whose signature
is not valid, is told of and hides no other.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from crafts_client.budget import charged_plans
from crafts_client.errors import EnrolmentError
from crafts_client.home import SiteHome
from crafts_client.mechanism import limit_of, mechanisms_of, releases_to_come
from crafts_client.policy import PolicyError
from crafts_client.signed_plan import open_signed_plan
from crafts_client.site_ledger import existing_ledger
from crafts_core.exchange import SignedPlan
from crafts_core.foundation_manifest import read_manifest
from crafts_core.plan import Plan, PlanError
from crafts_core.plan_targets import target_problems
from crafts_privacy.errors import CalibrationError, FiltersChangedError
from crafts_privacy.lifetime import FilterState, PlanCharges, with_charge
from crafts_privacy.plan_check import noise_problems
from crafts_privacy.plan_noise import release_events

_PREFIX = re.compile(r"[0-9a-f]{16,64}")
_WHOLE = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class OfferedPlan:
    """One plan as it was offered; ``plan`` is None where it cannot be read."""

    plan: Plan | None
    refused: tuple[str, ...]
    """Why this site would not take part: signature, policy, noise floor, spent budget."""
    epsilon_after: float | None = None
    """Of the cohort's life, as its filter counts it, once the site took part in all of the plan;
    None where nothing bounds it."""
    remark: str = ""
    """Where the site would take part, and not to the end."""
    noise_multiplier: float | None = None
    """Of every step; None where the plan is refused, or trains without noise."""
    has_finished: bool = False
    """Whether the coordinator says that its run is over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Counted:
    """What the accountants say to a plan that the policy allows."""

    refused: tuple[str, ...] = ()
    epsilon_after: float | None = None
    remark: str = ""
    noise_multiplier: float | None = None


def judge(site: SiteHome, signed: SignedPlan, *, anew: bool = False) -> OfferedPlan:
    """What this site would say to a plan. Changes nothing.

    Args:
        site: As it is set up now.
        signed: As the coordinator sent it.
        anew: Believe no figure that was kept: for whoever decides by the answer.

    Raises:
        LedgerError: the ledger cannot say what was spent.
    """
    refused: list[str] = []
    try:
        plan: Plan | None = open_signed_plan(signed, site.policy)
    except PolicyError as error:
        refused.append(str(error))
        plan = _readable(signed.json)
    except PlanError as error:
        return OfferedPlan(plan=None, refused=(str(error),))
    if plan is None:
        return OfferedPlan(plan=None, refused=(*refused, "it cannot be read"))
    size = site.config.declared_patients
    refused += [str(error) for error in site.policy.violations(plan, declared_patients=size)]
    if plan.study.foundation == read_manifest(site.foundation_path).hash:
        refused += target_problems(plan, site.foundation_path)
    if refused or plan.privacy.target_epsilon is None:  # calibrate only what is asked in earnest
        return OfferedPlan(plan=plan, refused=tuple(refused))
    counted = _with_budget(site, plan, anew=anew)
    return OfferedPlan(
        plan=plan,
        refused=counted.refused,
        epsilon_after=counted.epsilon_after,
        remark=counted.remark,
        noise_multiplier=counted.noise_multiplier,
    )


def offered_plans(site: SiteHome) -> Iterator[OfferedPlan]:
    """Every plan of the coordinator.

    Raises:
        EnrolmentError: the coordinator cannot be asked.
    """
    for signed, has_finished in _signed_plans(site):
        yield replace(_told(site, signed), has_finished=has_finished)


def offered_plan(
    site: SiteHome, plan_hash: str, *, to_approve: bool = False
) -> tuple[Plan, OfferedPlan]:
    """The one plan whose hash begins so; no other is judged.

    Args:
        site: Who asks.
        plan_hash: At least 16 digits, to look at it.
        to_approve: All 64 are needed: whoever makes plans makes two that begin with the same 16 in
            minutes, shows one, and offers the other next. No figure that was kept is believed.

    Raises:
        EnrolmentError: too few digits; or no plan, or several, begin so.
    """
    if not _PREFIX.fullmatch(plan_hash):
        raise EnrolmentError(
            f"expected at least 16 hexadecimal digits of a plan's hash, got {plan_hash!r}; see "
            "crafts-client plan list"
        )
    if to_approve and len(plan_hash) < _WHOLE:
        raise EnrolmentError(
            f"expected all {_WHOLE} digits of the plan's hash, as crafts-client plan show "
            f"{plan_hash} says them: two plans can be made to begin alike"
        )
    found: dict[str, tuple[Plan, SignedPlan]] = {}
    for signed, _ in _signed_plans(site):
        plan = _readable(signed.json)
        if plan is not None and plan.hash.startswith(plan_hash):
            found[plan.hash] = plan, signed
    if len(found) != 1:
        advice = "; give more digits of one" if found else ""
        raise EnrolmentError(
            f"{', '.join(found) or 'no plan'} begins with {plan_hash!r}{advice}; see crafts-client "
            "plan list"
        )
    ((plan, signed),) = found.values()
    return plan, _told(site, signed, anew=to_approve)


def runs_so_far(site: SiteHome, plan: Plan) -> int:
    """How many runs of a plan the ledger has seen."""
    ledger = existing_ledger(site)
    entries = () if ledger is None else ledger.entries()
    return len({entry.run_id for entry in entries if entry.plan_hash == plan.hash})


def _signed_plans(site: SiteHome) -> tuple[tuple[SignedPlan, bool], ...]:
    """As they were sent, each with whether it has finished."""
    from crafts_client.enrolment import Registrar  # grpc takes its time to import

    with Registrar(site) as registrar:
        return tuple(
            (
                SignedPlan(json=each.json, signature=each.signature, public_key=each.public_key),
                each.has_finished,
            )
            for each in registrar.call("ListPlans").plans
        )


def _told(site: SiteHome, signed: SignedPlan, *, anew: bool = False) -> OfferedPlan:
    """As ``judge``; what a plan's extremes break in it refuses that plan and hides no other."""
    try:
        return judge(site, signed, anew=anew)
    except (ArithmeticError, ValueError, MemoryError) as error:
        why = f"what it costs cannot be computed here ({type(error).__name__})"
        return OfferedPlan(plan=_readable(signed.json), refused=(why,))


def _with_budget(site: SiteHome, plan: Plan, *, anew: bool) -> _Counted:
    """The rules that need the calibrated noise: its floor, and what is left of the lifetime."""
    try:
        plans = charged_plans(site, existing_ledger(site))
    except FiltersChangedError as error:
        return _Counted(refused=(str(error),))
    if anew:
        return _counted(site, plan, plans)
    size = site.config.declared_patients
    question = ("offered", plan.hash, size, site.policy.model_dump_json(), plans)
    return site.figures.of(_Counted, question, lambda: _counted(site, plan, plans))


def _counted(site: SiteHome, plan: Plan, plans: tuple[PlanCharges, ...]) -> _Counted:
    problems = tuple(noise_problems(plan))
    if problems:
        return _Counted(refused=problems)
    policy = site.policy
    try:
        mechanisms = mechanisms_of(plan, declared_patients=site.config.declared_patients)
        for each in mechanisms:
            policy.check_noise(plan, each)
    except (PolicyError, CalibrationError) as error:
        return _Counted(refused=(str(error),))
    charged = [event for known in plans if known.plan_hash == plan.hash for event in known.events]
    to_come = releases_to_come(plan, charged)
    released = set(release_events(plan))
    done = sum(event.steps for event in charged if event not in released)
    lifetime = policy.lifetime
    limit = limit_of(plan, lifetime)

    def after(steps: int) -> FilterState:
        new = [*to_come, mechanisms[0].event(steps)]
        return lifetime.state(with_charge(plans, plan.hash, limit, *new))

    all_of_it = after(max(0, plan.total_steps - done))
    one_more = after(min(stage.local_steps for stage in plan.trained))
    refused: tuple[str, ...] = ()
    remark = ""
    if not one_more.holds:
        refused = (f"lifetime budget: not one more round fits: with it {one_more}",)
    elif not all_of_it.holds:
        remark = f"the lifetime budget ends before its last round: with all of it {all_of_it}"
    return _Counted(
        refused=refused,
        epsilon_after=all_of_it.epsilon,
        remark=remark,
        noise_multiplier=None if refused else mechanisms[0].noise_multiplier,
    )


def _readable(text: str) -> Plan | None:
    """A plan that nobody vouches for, to look at."""
    try:
        return Plan.parse(json.loads(text))
    except (ValueError, RecursionError, PlanError):
        return None
