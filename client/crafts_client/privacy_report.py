"""What a site's privacy officer wants to know, from the site's own files, with what is not shown.

Follows NIST SP 800-226 (unit of privacy, neighbouring relation, parameters, mechanism, trust) and
the questions of EDPB Opinion 28/2024 (who could learn what of a person from the model, and how one
knows). Every figure comes from the ledger, the policy, the outbox' records and the newest audit.
What they do not carry is listed in ``unsubstantiated``: a report that has such a line must not be
signed. What an attack found is computed from patients without noise, so it is in a report only if
asked for, in files of another name that are the owner's alone.
"""

import math
import platform
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from markupsafe import Markup
from pydantic import BaseModel, ConfigDict, Field

from crafts_client.audit_record import LIBRARIES, read_record, weakness
from crafts_client.budget import FilterCount, doubts
from crafts_client.code_hash import code_sha256
from crafts_client.errors import HomeError
from crafts_client.home import SiteConfig, SiteHome
from crafts_client.outbox import Outbox, ReleaseRecord
from crafts_client.site_ledger import existing_ledger
from crafts_client.spending import Spending, lifetime_spending, spending_of
from crafts_client.spending_curve import Curve, curves_drawn, spending_curves
from crafts_client.sum_report import (
    SumReport,
    doubts_about_sums,
    num_summed_updates,
    sum_report,
    summed_entries,
)
from crafts_client.transmissions import Transmission, transmissions_of
from crafts_core import __version__, charts
from crafts_core.delta_text import delta_text, delta_times_patients
from crafts_core.durable import write_file
from crafts_core.pages import page_environment
from crafts_privacy import accounting
from crafts_privacy.accounting import PrivacyEvent, SecondOpinion
from crafts_privacy.charges import charged_to, last_holders
from crafts_privacy.ledger import EntryKind, Ledger, LedgerEntry, LedgerPlaceError
from crafts_privacy.noise import ExactNoise, GridNoise

_LIBRARIES = (*LIBRARIES, "flwr")


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class RunSpending(_Record):
    """One run of one plan."""

    run_id: str
    plan_hash: str
    stages: tuple[str, ...]
    rounds: int
    spent: Spending


class PlanSent(_Record):
    """What left for one plan, and what the plan was charged."""

    plan_hash: str
    runs: tuple[str, ...]
    stages: tuple[str, ...]
    updates: int
    first: datetime
    last: datetime
    num_bytes: int | None
    """Of all of them; None where one has no record."""
    noise: tuple[str, ...]
    steps: int
    """Charged, also where nothing left."""
    epsilon: float | None
    """Of these steps, at the report's delta; None without a bound."""


class PrivacyReport(_Record):
    """The whole report; ``privacy-report.json`` is this."""

    schema_version: int = 5
    created: datetime
    site: str
    cohort: str
    declared_patients: int
    delta: float
    delta_times_declared_patients: float
    """How many patients the promise may say nothing about, in expectation."""
    epsilon_allowed: float
    filters: tuple[FilterCount, ...]
    """What bounds the cohort's life: one that holds is enough."""
    plans: int
    """Charged to the cohort so far."""
    lifetime: Spending
    over_time: tuple[Curve, ...]
    """What each filter counted, and what the steps came to, after each charge."""
    runs: tuple[RunSpending, ...]
    sums: SumReport | None
    """Steps in which this hospital added a share of the noise; None where there were none."""
    summed_updates: int
    """Of what left, in sums of which the coordinator opened no part, with all the noise of the
    promise: what the sum hides is not counted."""
    sent: tuple[PlanSent, ...]
    transmissions: tuple[Transmission, ...]
    charged_and_not_sent: int
    """Rounds that count as spent though nothing left: crashes, refusals, work in progress."""
    ledger_entries: int
    ledger_head: str
    """For a second party to keep: with it, a ledger put back from a backup is found."""
    audit: dict[str, Any] | None
    leakage: dict[str, Any] | None
    """The newest attack on a finished generator, only if asked for. Not needed for the promise."""
    answer_every_s: Literal["auto"] | float
    """Of site.toml, now: when answers leave. 0: as soon as they are ready."""
    not_audited: tuple[str, ...]
    """How this site trains otherwise than was audited, and what stands for it instead."""
    versions: dict[str, str]
    code_sha256: str
    """Over the files of the installed packages; sites with one code have one."""
    unsubstantiated: tuple[str, ...] = Field(description="Claims that the files do not carry.")


def privacy_report(site: SiteHome, *, with_attack: bool = False) -> PrivacyReport:
    """Collect the report. Reads only; spends nothing.

    Args:
        site: Whose report it is.
        with_attack: Put in what the newest attack found, which must not leave the site.

    Raises:
        LedgerTamperedError: the ledger is not what was written; there is no report to make.
        LedgerError: another process holds the ledger.
        HomeError: an attack is asked for and none was made.
    """
    cohort, delta = site.config.cohort, site.policy.max_delta
    leakage = _attack(site) if with_attack else None
    ledger = existing_ledger(site)
    all_entries = () if ledger is None else ledger.entries()
    entries = [entry for entry in all_entries if entry.cohort == cohort]
    events = () if ledger is None else ledger.events(cohort)
    records = Outbox(site.outbox_path).records()
    transmissions = transmissions_of(entries, records)
    plans = () if ledger is None else ledger.plans(cohort)
    summed = [entry.event for entry in summed_entries(entries)]
    lifetime = lifetime_spending(site.policy.lifetime, plans, summed=summed)
    sums = sum_report(site, all_entries)
    audit = read_record(site.audit_path)
    code = code_sha256()
    return PrivacyReport(
        created=datetime.now(UTC),
        site=site.config.name,
        cohort=cohort,
        declared_patients=site.config.declared_patients,
        delta=delta,
        delta_times_declared_patients=delta_times_patients(delta, site.config.declared_patients),
        epsilon_allowed=site.policy.max_epsilon,
        filters=tuple(map(FilterCount.of, site.policy.lifetime.states(plans))),
        plans=len(plans),
        lifetime=lifetime,
        over_time=spending_curves(charged_to(all_entries, cohort), site.policy.lifetime),
        runs=_runs(entries, delta),
        sums=sums,
        summed_updates=num_summed_updates(entries, records),
        sent=_sent(transmissions, entries, delta),
        transmissions=transmissions,
        charged_and_not_sent=len(events) - len(transmissions),
        ledger_entries=len(all_entries),
        ledger_head="" if ledger is None else str(ledger.verify().hash),
        audit=audit,
        leakage=leakage,
        answer_every_s=site.config.answer_every_s,
        not_audited=tuple(_not_audited(site.config)),
        versions=_versions(),
        code_sha256=code,
        unsubstantiated=(
            *doubts(site, ledger, plans),
            *_weak_spending(lifetime),
            *doubts_about_sums(site, sums, all_entries),
            *_weak_delta(delta, site.config.declared_patients),
            *_unrecorded(transmissions),
            *_repeatable(transmissions),
            *_uncommitted(all_entries, records),
            *_telling_times(site.config),
            *_misplaced(ledger),
            *_weak_audit(audit, site, code),
        ),
    )


def write_privacy_report(report: PrivacyReport, folder: Path) -> tuple[Path, Path]:
    """Write ``privacy-report.html`` (prints on A4) and ``privacy-report.json``; gives both.

    With the results of an attack they are named ``privacy-report-with-attack`` and the owner's
    alone.
    """
    name, mode = ("privacy-report", 0o644)
    if report.leakage is not None:
        name, mode = ("privacy-report-with-attack", 0o600)
    folder.mkdir(parents=True, exist_ok=True)
    page, record = folder / f"{name}.html", folder / f"{name}.json"
    environment = page_environment("crafts_client")
    environment.filters["delta"] = delta_text
    template = environment.get_template("privacy_report.html.j2")
    shown = template.render(
        report=report,
        spent=report.lifetime,
        budget=_budget_bars(report),
        curve=curves_drawn(report.over_time, limit=report.epsilon_allowed, until=report.created),
    )
    write_file(page, shown, mode=mode)
    write_file(record, report.model_dump_json(indent=1) + "\n", mode=mode)
    return page, record


def _budget_bars(report: PrivacyReport) -> Markup:
    """What each filter that bounds something has counted, beside the limit for life."""
    counted = [
        (each.name, each.epsilon, None) for each in report.filters if each.epsilon is not None
    ]
    if not counted:
        return Markup()
    return charts.bars(
        counted,
        unit=f"epsilon counted, of {report.epsilon_allowed:g} for life",
        mark=report.epsilon_allowed,
    )


def _or_infinity(value: float | None) -> float:
    return math.inf if value is None else value


def _runs(entries: Sequence[LedgerEntry], delta: float) -> tuple[RunSpending, ...]:
    """What each run was charged."""
    charged: dict[tuple[str, str], list[LedgerEntry]] = {}
    holders = last_holders(entries)
    for entry in entries:
        if entry.kind is EntryKind.RESERVED:
            charged.setdefault((entry.run_id, entry.plan_hash), []).append(entry)
    return tuple(
        RunSpending(
            run_id=run_id,
            plan_hash=plan_hash,
            stages=tuple(dict.fromkeys(entry.stage for entry in group)),
            rounds=len({holders[entry.sequence].round for entry in group}),
            spent=spending_of(
                [entry.event for entry in group],
                delta,
                summed=[entry.event for entry in summed_entries(group)],
            ),
        )
        for (run_id, plan_hash), group in charged.items()
    )


def _sent(
    transmissions: Sequence[Transmission], entries: Sequence[LedgerEntry], delta: float
) -> tuple[PlanSent, ...]:
    """What left, by plan, in the order of their first updates."""
    by_plan: dict[str, list[Transmission]] = {}
    for each in transmissions:
        by_plan.setdefault(each.plan_hash, []).append(each)
    charged: dict[str, list[PrivacyEvent]] = {plan_hash: [] for plan_hash in by_plan}
    for entry in entries:
        if entry.kind is EntryKind.RESERVED and entry.plan_hash in charged:
            charged[entry.plan_hash].append(entry.event)
    return tuple(
        _sent_for(plan_hash, sent, charged[plan_hash], delta) for plan_hash, sent in by_plan.items()
    )


def _sent_for(
    plan_hash: str, sent: Sequence[Transmission], charged: Sequence[PrivacyEvent], delta: float
) -> PlanSent:
    sizes = [each.num_bytes for each in sent if each.num_bytes is not None]
    spent = accounting.epsilon(charged, delta)
    return PlanSent(
        plan_hash=plan_hash,
        runs=tuple(dict.fromkeys(each.run_id for each in sent)),
        stages=tuple(dict.fromkeys(each.stage for each in sent)),
        updates=len(sent),
        first=min(each.committed_at for each in sent),
        last=max(each.committed_at for each in sent),
        num_bytes=sum(sizes) if len(sizes) == len(sent) else None,
        noise=tuple(sorted({each.noise for each in sent})),
        steps=sum(event.steps for event in charged),
        epsilon=spent if math.isfinite(spent) else None,
    )


def _weak_delta(delta: float, declared_patients: int) -> Iterator[str]:
    """Delta is the chance that the promise says nothing: one patient's data may be published."""
    if delta > 1 / declared_patients:
        yield (
            f"delta: {delta_text(delta)} is more than one in {declared_patients} patients, so the "
            "promise may say nothing about one of them; lower max_delta in policy.toml"
        )


def _telling_times(config: SiteConfig) -> Iterator[str]:
    """Where whoever sees when an answer leaves can count whom a round drew."""
    if config.answer_every_s == 0:
        yield (
            "answers: they leave as soon as they are ready, so their times tell how many patients "
            'were drawn, without noise; set answer_every_s = "auto" in site.toml'
        )


def _uncommitted(
    entries: Sequence[LedgerEntry], records: dict[str, ReleaseRecord]
) -> Iterator[str]:
    """What was sealed and, by the ledger, may still leave, or has left and the ledger forgot it.

    A release whose payment was committed to another never left: one entry pays for one.
    """
    committed = [entry for entry in entries if entry.kind is EntryKind.COMMITTED]
    hashes, closed = {e.release_hash for e in committed}, {e.reservation for e in committed}
    waiting = [r for r in records.values() if r.hash not in hashes and r.reservation not in closed]
    if waiting:
        yield (
            f"transmissions: {len(waiting)} sealed updates are not committed in the ledger; start "
            "crafts-client join, which commits what a crash left"
        )


def _misplaced(ledger: Ledger | None) -> Iterator[str]:
    """A copy does not know what the other one spends."""
    if ledger is not None:
        try:
            ledger.check_place()
        except LedgerPlaceError as error:
            yield f"ledger: {error}"


def _attack(site: SiteHome) -> dict[str, Any]:
    found = read_record(site.leakage_path)
    if found is None:
        raise HomeError(
            f"no attack at {site.leakage_path}; run crafts-client attack first, or leave out "
            "--with-attack"
        )
    return found


def _versions() -> dict[str, str]:
    libraries = {name: metadata.version(name) for name in _LIBRARIES}
    return {"crafts-federated": __version__, **libraries, "python": platform.python_version()}


def _weak_spending(lifetime: Spending) -> Iterator[str]:
    """What the accountants say against the figure for life."""
    if lifetime.epsilon is None:
        yield "privacy: rounds were trained without noise, so no epsilon bounds them"
    opinion = SecondOpinion(
        _or_infinity(lifetime.epsilon_second_opinion), lifetime.second_accountant
    )
    if not opinion.agrees_with(_or_infinity(lifetime.epsilon)):
        yield "accounting: the two accountants disagree; ask the developers"


def _unrecorded(transmissions: Sequence[Transmission]) -> Iterator[str]:
    unknown = sum(1 for sent in transmissions if sent.num_bytes is None)
    if unknown:
        yield f"transmissions: the outbox has no record of {unknown} committed updates"


def _repeatable(transmissions: Sequence[Transmission]) -> Iterator[str]:
    """Noise that is not drawn from entropy can be drawn again, and taken off."""
    for name in sorted({sent.noise for sent in transmissions if sent.num_bytes is not None}):
        if name not in (GridNoise.__name__, ExactNoise.__name__):
            yield f"noise: NOT PRIVATE, updates left with {name}, which is not drawn from entropy"


def _weak_audit(audit: dict[str, Any] | None, site: SiteHome, code: str) -> Iterator[str]:
    """Where the newest audit says nothing of what trains."""
    reason = weakness(audit, site, code)
    if reason is not None:
        yield f"engine: {reason}"


def _not_audited(config: SiteConfig) -> Iterator[str]:
    """Both audits run on one device; sites may train on several."""
    if config.more_devices:
        devices = ", ".join((config.device, *config.more_devices))
        yield (
            f"several devices together ({devices}): nothing here checks that; the software's own "
            "tests compare it with one device"
        )
