"""What the pages of a site show, as values: cohort, stores, ledger, what waits, what left.

For the owner alone: counts of patients and an attack's results are exact.
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from markupsafe import Markup
from pydantic import BaseModel, ValidationError

from crafts_client.attack_words import MEANING, verdict
from crafts_client.audit_record import read_record, weakness
from crafts_client.budget import Budget, budget_of
from crafts_client.code_hash import code_sha256
from crafts_client.errors import EnrolmentError
from crafts_client.foundations import foundations_here
from crafts_client.home import SiteHome
from crafts_client.offered_now import Offered
from crafts_client.offered_plans import OfferedPlan
from crafts_client.outbox import Outbox
from crafts_client.register import PatientRegister
from crafts_client.running import is_running
from crafts_client.site_certificate import expiry_warning
from crafts_client.site_ledger import existing_ledger
from crafts_client.spending_curve import Curve, curves_drawn, spending_curves
from crafts_client.transmissions import Transmission, transmissions_of
from crafts_core import charts
from crafts_core.foundation_manifest import FoundationError, read_manifest
from crafts_core.tiles import TileStore, TileStoreError
from crafts_core.tiles.cache_files import finished_cache
from crafts_privacy.charges import charged_to
from crafts_privacy.ledger_rows import LedgerEntry


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreLine:
    """The tiles that are trained on."""

    patients: int
    slides: int
    tiles: int
    withdrawn: int
    """Patients of the store whom no round reads any more."""
    trouble: str
    """Why no round could train on it; empty where one can."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanLine:
    """A plan that the coordinator offers."""

    study: str
    hash: str
    rounds: int | None
    target_epsilon: float | None
    epsilon_after: float | None
    verdict: str
    is_refused: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class AttackLine:
    """What one attack found; 0.5 is chance."""

    name: str
    found: float
    low: float
    high: float
    p_value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteView:
    """All of a home."""

    at: datetime
    name: str
    cohort: str
    declared_patients: int
    is_running: bool
    coordinator: str
    """Empty where the site is not enrolled."""
    expiry_warning: str
    """Of the site's certificate; empty while there is time."""
    store: StoreLine | None
    store_trouble: str
    budget: Budget
    curve: Markup
    after: Markup
    """What the limit's filter would count after each plan that fits."""
    plans: tuple[PlanLine, ...]
    asked_at: datetime | None
    asked_why: str
    waiting: tuple[str, ...]
    """Commands by which a person here would say yes to something."""
    left: tuple[Transmission, ...]
    """Newest first."""
    audit_at: str
    audit_weakness: str
    """Empty where the newest audit is of what trains here."""
    attacks: tuple[AttackLine, ...]
    attack_verdict: str
    """And what the figures mean; empty without any."""


def site_view(site: SiteHome, offered: Offered) -> SiteView:
    """Read it all now.

    Raises:
        CraftsError: the ledger, the register or a record of the home is not in order.
    """
    entries = _entries(site)
    now, budget = datetime.now(UTC), budget_of(site)
    store, trouble = _store(site)
    plans = tuple(_plan_line(site, each) for each in offered.plans)
    audit = read_record(site.audit_path)
    attacks = tuple(_attacks(read_record(site.leakage_path)))
    told = [verdict([each.p_value for each in attacks]), MEANING] if attacks else []
    return SiteView(
        at=now,
        name=site.config.name,
        cohort=site.config.cohort,
        declared_patients=site.config.declared_patients,
        is_running=is_running(site),
        coordinator=_coordinator(site),
        expiry_warning=expiry_warning(site),
        store=store,
        store_trouble=trouble,
        budget=budget,
        curve=curves_drawn(_curves(site, entries), limit=budget.epsilon_allowed, until=now),
        after=_bars_after(budget, plans),
        plans=plans,
        asked_at=offered.at,
        asked_why=offered.why,
        waiting=tuple(_waiting(site, offered)),
        left=tuple(reversed(left_view(site))),
        audit_at=str((audit or {}).get("at", ""))[:16].replace("T", " "),
        audit_weakness=weakness(audit, site, code_sha256()) or "",
        attacks=attacks,
        attack_verdict=" ".join(told),
    )


def left_view(site: SiteHome) -> tuple[Transmission, ...]:
    """Everything of this cohort that left, oldest first."""
    entries = [entry for entry in _entries(site) if entry.cohort == site.config.cohort]
    return transmissions_of(entries, Outbox(site.outbox_path).records())


def _entries(site: SiteHome) -> tuple[LedgerEntry, ...]:
    ledger = existing_ledger(site)
    return () if ledger is None else ledger.entries()


def _coordinator(site: SiteHome) -> str:
    from crafts_client.enrolment import coordinator_record

    try:
        return coordinator_record(site).fleet_address
    except EnrolmentError:
        return ""


def _curves(site: SiteHome, entries: tuple[LedgerEntry, ...]) -> tuple[Curve, ...]:
    charged, lifetime = charged_to(entries, site.config.cohort), site.policy.lifetime
    question = ("curve", lifetime, [entry.hash for entry in charged])
    return site.figures.of(tuple[Curve, ...], question, lambda: spending_curves(charged, lifetime))


def _bars_after(budget: Budget, plans: tuple[PlanLine, ...]) -> Markup:
    """What the filter that decides counts now, and would after each plan that the site takes."""
    wanted = [
        (f"after {each.study[:18]}", each.epsilon_after, None)
        for each in plans
        if each.epsilon_after is not None and not each.is_refused
    ]
    counted = [each.epsilon for each in budget.filters if each.holds and each.epsilon is not None]
    if not wanted or not counted:
        return Markup()
    return charts.bars(
        [("now", min(counted), None), *wanted],
        unit=f"epsilon counted, of {budget.epsilon_allowed:g} for life",
        mark=budget.epsilon_allowed,
    )


def _store(site: SiteHome) -> tuple[StoreLine | None, str]:
    """The store, or why there is none to show."""
    try:
        store = TileStore.open(site.tile_store_path, check_shards=False)
    except TileStoreError as error:
        return None, str(error)
    gone = PatientRegister(site.register_path).withdrawn
    trouble = ""
    try:
        finished_cache(store, read_manifest(site.foundation_path).hash)
    except (TileStoreError, FoundationError) as error:
        trouble = str(error)
    return (
        StoreLine(
            patients=store.num_patients,
            slides=len(store.index.column("slide").unique()),
            tiles=store.num_tiles,
            withdrawn=len(gone.intersection(store.patients)),
            trouble=trouble,
        ),
        "",
    )


def _plan_line(site: SiteHome, offered: OfferedPlan) -> PlanLine:
    """What this site says to a plan, or what keeps it from reading one."""
    plan, refused = offered.plan, "; ".join(offered.refused)
    if plan is None:
        return PlanLine(
            study="unreadable",
            hash="",
            rounds=None,
            target_epsilon=None,
            epsilon_after=None,
            verdict=refused,
            is_refused=True,
        )
    is_approved = plan.hash in site.approvals.all()
    open_plan = "not approved yet" if site.policy.require_approval else "allowed"
    verdict = refused or ("approved" if is_approved else open_plan)
    return PlanLine(
        study=plan.study.name,
        hash=plan.hash,
        rounds=plan.num_rounds,
        target_epsilon=plan.privacy.target_epsilon,
        epsilon_after=offered.epsilon_after,
        verdict=f"{verdict}; {offered.remark}" if offered.remark else verdict,
        is_refused=bool(refused),
    )


def _waiting(site: SiteHome, offered: Offered) -> Iterator[str]:
    """Plans, rosters and foundations that nobody here has said yes to, and no rule refuses."""
    approved, rosters = site.approvals.all(), site.roster_approvals.all()
    for each in offered.plans:
        if each.plan is None or each.refused:
            continue
        shown = each.plan.hash
        if site.policy.require_approval and each.plan.hash not in approved:
            yield f"crafts-client plan approve {shown}"
        if each.plan.aggregation.secure_aggregation and each.plan.hash not in rosters:
            yield f"crafts-client roster approve {shown}"
    with suppress(FoundationError):  # the store says that there is none
        for found in foundations_here(site):
            if not found.is_approved:
                yield f"crafts-client foundation approve {found.manifest.hash}"


class _Attack(BaseModel):
    name: str
    auc: float
    auc_interval: tuple[float, float]
    p_value: float


class _Copies(BaseModel):
    share_nearer_members: float
    interval: tuple[float, float]
    p_value: float


class _Leakage(BaseModel):
    """What is read of ``leakage.json``; its own model needs torch."""

    attacks: tuple[_Attack, ...]
    memorisation: _Copies


def _attacks(record: dict[str, Any] | None) -> Iterator[AttackLine]:
    """Of the newest attack, if there is one that this version can read."""
    if record is None:
        return
    try:
        found = _Leakage.model_validate(record)
    except ValidationError:
        return
    for each in found.attacks:
        low, high = each.auc_interval
        yield AttackLine(name=each.name, found=each.auc, low=low, high=high, p_value=each.p_value)
    copies = found.memorisation
    low, high = copies.interval
    yield AttackLine(
        name="images nearer to training tiles",
        found=copies.share_nearer_members,
        low=low,
        high=high,
        p_value=copies.p_value,
    )
