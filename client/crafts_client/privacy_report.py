"""What a site's privacy officer wants to know, from the site's own files, with what is not shown.

Follows NIST SP 800-226 (unit of privacy, neighbouring relation, parameters, mechanism, trust) and
the questions of EDPB Opinion 28/2024 (who could learn what of a person from the model, and how one
knows). Every figure comes from the ledger, the policy, the outbox' records and the newest audit.
What they do not carry is listed in ``unsubstantiated``: a report that has such a line must not be
signed.
"""

import json
import math
import platform
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from pydantic import BaseModel, ConfigDict, Field

from crafts_client.code_hash import code_sha256
from crafts_client.home import SiteConfig, SiteHome
from crafts_client.outbox import REFUSED_RELEASE, Outbox, ReleaseRecord
from crafts_client.site_ledger import existing_ledger
from crafts_core import __version__
from crafts_core.durable import write_file
from crafts_privacy import accounting
from crafts_privacy.accounting import NeighboringRelation, PrivacyEvent, SecondOpinion
from crafts_privacy.ledger import EntryKind, LedgerEntry

FALSE_POSITIVE_RATE = 0.01
_LIBRARIES = ("torch", "dp-accounting", "opacus", "flwr", "cryptography")


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Spending(_Record):
    """The cost of some events together. None where steps ran without noise: no bound exists."""

    events: int
    steps: int
    epsilon: float | None
    """Add or remove one patient: the claim. By privacy loss distributions (dp-accounting)."""
    epsilon_replace_one: float | None
    """One patient is another person: reported beside."""
    epsilon_second_opinion: float | None
    second_accountant: str
    epsilon_seen_twice: float | None
    """For a patient who is also at another hospital that spends as much: both composed."""
    max_true_positive_rate: float
    """How often any attacker can be right that a patient took part, at 1 % false alarms."""


class RunSpending(_Record):
    """One run of one plan."""

    run_id: str
    plan_hash: str
    stages: tuple[str, ...]
    rounds: int
    spent: Spending


class Transmission(_Record):
    """One update that left, and what paid for it."""

    committed_at: datetime
    run_id: str
    round: int
    stage: str
    hash: str
    num_bytes: int | None
    num_tensors: int | None
    noise_multiplier: float
    sample_rate: float
    steps: int
    noise: str
    """The class in ``crafts_privacy.noise`` that drew it."""


class PrivacyReport(_Record):
    """The whole report; ``privacy-report.json`` is this."""

    schema_version: int = 1
    created: datetime
    site: str
    cohort: str
    declared_patients: int
    delta: float
    epsilon_allowed: float
    lifetime: Spending
    runs: tuple[RunSpending, ...]
    transmissions: tuple[Transmission, ...]
    charged_and_not_sent: int
    """Rounds that count as spent though nothing left: crashes, refusals, work in progress."""
    ledger_entries: int
    ledger_head: str
    """For a second party to keep: with it, a ledger put back from a backup is found."""
    audit: dict[str, Any] | None
    leakage: dict[str, Any] | None
    """The newest attack on a finished generator, if one was made. Not needed for the promise."""
    not_audited: tuple[str, ...]
    """How this site trains otherwise than was audited, and what stands for it instead."""
    versions: dict[str, str]
    code_sha256: str
    """Over the files of the installed packages; sites with one code have one."""
    unsubstantiated: tuple[str, ...] = Field(description="Claims that the files do not carry.")


def privacy_report(site: SiteHome) -> PrivacyReport:
    """Collect the report. Reads only; spends nothing.

    Raises:
        LedgerTamperedError: the ledger is not what was written; there is no report to make.
        LedgerError: another process holds the ledger.
    """
    cohort, delta = site.config.cohort, site.policy.max_delta
    ledger = existing_ledger(site)
    all_entries = () if ledger is None else ledger.entries()
    entries = [entry for entry in all_entries if entry.cohort == cohort]
    events = () if ledger is None else ledger.events(cohort)
    records = Outbox(site.outbox_path).records()
    transmissions = _transmissions(entries, records)
    lifetime = _spending(events, delta)
    audit = _record(site.audit_path)
    code = code_sha256()
    return PrivacyReport(
        created=datetime.now(UTC),
        site=site.config.name,
        cohort=cohort,
        declared_patients=site.config.declared_patients,
        delta=delta,
        epsilon_allowed=site.policy.max_epsilon,
        lifetime=lifetime,
        runs=_runs(entries, delta),
        transmissions=transmissions,
        charged_and_not_sent=len(events) - len(transmissions),
        ledger_entries=len(all_entries),
        ledger_head="" if ledger is None else str(ledger.verify().hash),
        audit=audit,
        leakage=_record(site.leakage_path),
        not_audited=tuple(_not_audited(site.config)),
        versions=_versions(),
        code_sha256=code,
        unsubstantiated=(
            *_weak_spending(lifetime, site.policy.max_epsilon),
            *_weak_delta(delta, site.config.declared_patients),
            *_unrecorded(transmissions),
            *_uncommitted(all_entries, records),
            *_telling_times(site.config),
            *_weak_audit(audit, site.config, code),
        ),
    )


def write_privacy_report(report: PrivacyReport, folder: Path) -> tuple[Path, Path]:
    """Write ``privacy-report.html`` (prints on A4) and ``privacy-report.json``; gives both."""
    folder.mkdir(parents=True, exist_ok=True)
    page, record = folder / "privacy-report.html", folder / "privacy-report.json"
    environment = Environment(
        loader=PackageLoader("crafts_client"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    template = environment.get_template("privacy_report.html.j2")
    write_file(page, template.render(report=report, spent=report.lifetime))
    write_file(record, report.model_dump_json(indent=1) + "\n")
    return page, record


def _spending(events: Sequence[PrivacyEvent], delta: float) -> Spending:
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
        epsilon_seen_twice=_finite(accounting.epsilon([*events, *events], delta)),
        max_true_positive_rate=accounting.max_true_positive_rate(events, FALSE_POSITIVE_RATE),
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _or_infinity(value: float | None) -> float:
    return math.inf if value is None else value


def _runs(entries: Sequence[LedgerEntry], delta: float) -> tuple[RunSpending, ...]:
    """What each run was charged."""
    charged: dict[tuple[str, str], list[LedgerEntry]] = {}
    for entry in entries:
        if entry.kind is EntryKind.RESERVED:
            charged.setdefault((entry.run_id, entry.plan_hash), []).append(entry)
    return tuple(
        RunSpending(
            run_id=run_id,
            plan_hash=plan_hash,
            stages=tuple(dict.fromkeys(entry.stage for entry in group)),
            rounds=len({entry.round for entry in group}),
            spent=_spending([entry.event for entry in group], delta),
        )
        for (run_id, plan_hash), group in charged.items()
    )


def _transmissions(
    entries: Sequence[LedgerEntry], records: dict[str, ReleaseRecord]
) -> tuple[Transmission, ...]:
    """Commits of a sealed file; a refused release committed a constant and sent nothing."""
    found = []
    for entry in entries:
        if entry.kind is not EntryKind.COMMITTED or entry.detail == REFUSED_RELEASE:
            continue
        record = records.get(entry.detail)
        found.append(
            Transmission(
                committed_at=entry.recorded_at,
                run_id=entry.run_id,
                round=entry.round,
                stage=entry.stage,
                hash=entry.detail,
                num_bytes=None if record is None else record.num_bytes,
                num_tensors=None if record is None else len(record.tensors),
                noise_multiplier=entry.noise_multiplier,
                sample_rate=entry.sample_rate,
                steps=entry.steps,
                noise="not recorded" if record is None else record.noise,
            )
        )
    return tuple(found)


def _weak_delta(delta: float, declared_patients: int) -> Iterator[str]:
    """Delta is the chance that the promise says nothing: one patient's data may be published."""
    if delta > 1 / declared_patients:
        yield (
            f"delta: {delta:g} is more than one in {declared_patients} patients, so the promise "
            "may say nothing about one of them; lower max_delta in policy.toml"
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
    hashes, closed = {e.detail for e in committed}, {e.reservation for e in committed}
    waiting = [r for r in records.values() if r.hash not in hashes and r.reservation not in closed]
    if waiting:
        yield (
            f"transmissions: {len(waiting)} sealed updates are not committed in the ledger; start "
            "crafts-client join, which commits what a crash left"
        )


def _record(path: Path) -> dict[str, Any] | None:
    """A JSON object, if there is a readable one."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, UnicodeDecodeError, json.JSONDecodeError):
        return None
    return values if isinstance(values, dict) else None


def _versions() -> dict[str, str]:
    libraries = {name: metadata.version(name) for name in _LIBRARIES}
    return {"crafts-federated": __version__, **libraries, "python": platform.python_version()}


def _weak_spending(lifetime: Spending, epsilon_allowed: float) -> Iterator[str]:
    """What the accountants say against the figure for life."""
    if lifetime.epsilon is None:
        yield "privacy: rounds were trained without noise, so no epsilon bounds them"
    elif lifetime.epsilon > epsilon_allowed:
        yield (
            f"lifetime budget: epsilon {lifetime.epsilon:.3f} is spent, the policy allows "
            f"{epsilon_allowed:g}"
        )
    opinion = SecondOpinion(
        _or_infinity(lifetime.epsilon_second_opinion), lifetime.second_accountant
    )
    if not opinion.agrees_with(_or_infinity(lifetime.epsilon)):
        yield "accounting: the two accountants disagree; ask the developers"


def _unrecorded(transmissions: Sequence[Transmission]) -> Iterator[str]:
    unknown = sum(1 for sent in transmissions if sent.num_bytes is None)
    if unknown:
        yield f"transmissions: the outbox has no record of {unknown} committed updates"


def _weak_audit(audit: dict[str, Any] | None, config: SiteConfig, code: str) -> Iterator[str]:
    """Where the newest audit says nothing of the engine that trains."""
    if audit is None:
        yield "engine: it was never audited here; run crafts-client audit"
        return
    subject = audit.get("subject", {})
    noise = "ExactNoise" if config.exact_noise else "GridNoise"
    if not audit.get("passed"):
        yield "engine: the newest audit failed; run crafts-client audit and look"
    elif audit.get("code_sha256") != code:
        yield "engine: the newest audit is of other code; run crafts-client audit"
    elif (subject.get("noise"), subject.get("device")) != (noise, config.device):
        yield (
            f"engine: the newest audit is of {subject.get('noise')} on {subject.get('device')}, "
            f"site.toml says {noise} on {config.device}; run crafts-client audit"
        )


def _not_audited(config: SiteConfig) -> Iterator[str]:
    """Canaries run in float32 on one device; sites may train otherwise."""
    compared = "its gradients are compared on public tiles before each stage"
    if config.precision != "float32":
        yield f"training in {config.precision}: {compared}"
    if config.compile:
        yield f"compiled passes: {compared}"
    if config.checkpointing:
        yield f"checkpointed passes: {compared}"
    if config.more_devices:
        devices = ", ".join((config.device, *config.more_devices))
        yield (
            f"several devices together ({devices}): nothing here checks that; the software's own "
            "tests compare it with one device"
        )
