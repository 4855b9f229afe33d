"""What the operator of a coordinator looks at: who may come, who came, what runs, what waits.

Reads only; the registry, the queue and the audit log say everything that is told here.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta

from sqlalchemy import func, select

from crafts_core.durable import exclusive_lock
from crafts_privacy.signing import fingerprint
from crafts_server import pki
from crafts_server.audit_log import Event
from crafts_server.enrolments import Enrolments
from crafts_server.errors import HomeError
from crafts_server.home import CoordinatorHome
from crafts_server.plan_queue import failed_plans, queued_plans
from crafts_server.registry import Registry, RunStatus, RunSummary
from crafts_server.registry_rows import WitnessRow

_RECENT_LINES = 1000
_ENDS_SOON = timedelta(days=30)
_ELSEWHERE = "why is further back in crafts-server log show"
_ENDS = {Event.SHORT, Event.FAILED, Event.STOPPED}
_PROGRESS = {Event.QUEUED, Event.COMMITTED, Event.FINISHED}


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteStatus:
    """One hospital."""

    name: str
    state: str
    """``enrolled``, ``revoked`` or ``invited``."""
    patients: int | None
    last_contact: datetime | None
    """When it last called or its node was connected, to a minute; None: never since it enrolled."""
    certificate_ends: datetime | None = None
    """None where there is no certificate that counts."""

    def certificate_advice(self, at: datetime) -> str:
        """What to do about its certificate; empty while it has more than a month left."""
        if self.certificate_ends is None or self.certificate_ends - at > _ENDS_SOON:
            return ""
        ends = "ends" if self.certificate_ends > at else "ended"
        return (
            f"certificate {ends} {self.certificate_ends:%Y-%m-%d}: crafts-server sites invite "
            f"{self.name} --patients {self.patients or 'N'}, and there crafts-client enroll"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class FailedPlan:
    """A plan that could not be trained, and came to no run."""

    plan_hash: str
    study: str
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """All of it."""

    authority: str
    """Fingerprint of the certificate authority: a hospital compares it by telephone."""
    signer: str
    """Fingerprint of the key that signs plans: this too."""
    signer_key: str
    is_serving: bool
    sites: tuple[SiteStatus, ...]
    runs: tuple[RunSummary, ...]
    queued: tuple[str, ...]
    failed: tuple[FailedPlan, ...]
    why: Mapping[str, str]
    """Why the plan of this hash waits or has stopped."""

    def as_json(self) -> dict[str, object]:
        """For machines."""
        return asdict(self)


def status_of(home: CoordinatorHome) -> Status:
    """What there is to say now.

    Raises:
        RegistryError: the database cannot be read.
        AuditLogError: the log was altered.
    """
    with home.registry() as registry:
        sites, runs = tuple(_sites(home, registry)), tuple(registry.runs())
        studies = {plan.hash: plan.study for plan in registry.plans()}
    queued = tuple(path.name for path in queued_plans(home))
    is_serving = _is_serving(home)
    why = _waiting(runs, queued, is_serving=is_serving) | _reasons(home, runs, queued)
    settled = {*queued, *(run.plan_hash for run in runs)}
    return Status(
        authority=pki.fingerprint(home.pki.ca),
        signer=fingerprint(home.public_key),
        signer_key=home.public_key,
        is_serving=is_serving,
        sites=sites,
        runs=runs,
        queued=queued,
        failed=tuple(
            FailedPlan(plan_hash=plan, study=studies.get(plan, ""), why=why.get(plan, _ELSEWHERE))
            for plan in failed_plans(home)
            if plan not in settled
        ),
        why=why,
    )


def _reasons(
    home: CoordinatorHome, runs: Sequence[RunSummary], queued: Sequence[str]
) -> dict[str, str]:
    """Why each plan waits or has stopped; none where it goes on since.

    The newest lines of the log know; why a plan failed is kept with it, however long ago.
    """
    why: dict[str, str] = {}
    plans = {run.run_id: run.plan_hash for run in runs}
    for entry in home.audit_log.recent(_RECENT_LINES):
        plan = str(entry.facts.get("plan") or plans.get(str(entry.facts.get("run"))))
        if entry.event in _ENDS:
            why[plan] = str(entry.facts.get("why") or "the operator stopped it")
        elif entry.event in _PROGRESS:
            why.pop(plan, None)
    for run in runs:
        if run.status is RunStatus.STOPPED and run.plan_hash not in queued:
            why.setdefault(run.plan_hash, _ELSEWHERE)
    return why | {plan: text for plan, text in failed_plans(home).items() if text}


def _waiting(
    runs: Sequence[RunSummary], queued: Sequence[str], *, is_serving: bool
) -> dict[str, str]:
    """What is told of plans that wait for nothing but the coordinator."""
    running = {run.plan_hash for run in runs if run.status is RunStatus.RUNNING}
    turn = "it waits for its turn" if is_serving else "nobody serves this home"
    return {plan: turn for plan in queued if plan not in running or not is_serving}


def sentences(status: Status) -> Iterator[str]:
    """For people, with the next step last."""
    yield f"authority  {status.authority}"
    yield f"signer     {status.signer}"
    yield f"           (key {status.signer_key})"
    yield "hospitals compare both by telephone when they enrol"
    yield f"serving    {'yes' if status.is_serving else 'no; start crafts-server serve'}"
    for site in status.sites:
        seen = (
            f"last contact {site.last_contact:%Y-%m-%d %H:%M}" if site.last_contact else "not seen"
        )
        yield f"site       {site.name}  {site.state}  {site.patients or 'no'} patients  {seen}"
        if advice := site.certificate_advice(datetime.now(UTC)):
            yield f"           {advice}"
    for run in status.runs:
        why = status.why.get(run.plan_hash)
        yield (
            f"run        {run.run_id}  {run.study}  plan {run.plan_hash[:16]}  {run.status}  "
            f"{run.progress}" + (f"  ({why})" if why else "")
        )
    started = {run.plan_hash for run in status.runs}
    for plan in (plan for plan in status.queued if plan not in started):
        yield f"waiting    plan {plan[:16]}  ({status.why[plan]})"
    for failed in status.failed:
        yield f"failed     {failed.study}  plan {failed.plan_hash[:16]}  ({failed.why})"
    yield from _next_step(status)


def _next_step(status: Status) -> Iterator[str]:
    states = {site.state for site in status.sites}
    if not status.is_serving:
        yield "next: crafts-server serve"
    elif not states:
        yield "next: crafts-server sites invite NAME --patients N"
    elif "enrolled" in states and not status.runs and not status.queued:
        if "invited" in states:
            yield "next: wait for who is invited, or go on without them:"
        yield "next: crafts-server plan new plan.toml, plan check, and train"


def _sites(home: CoordinatorHome, registry: Registry) -> Iterator[SiteStatus]:
    enrolments = Enrolments(registry)
    # An older program noted no contact, only when a ledger grew.
    known = (home.contacts.last(), _last_witnessed(registry))
    for site in enrolments.sites():
        seen = (times[site.name] for times in known if site.name in times)
        yield SiteStatus(
            name=site.name,
            state="revoked" if site.revoked_at else "enrolled",
            patients=site.declared_patients,
            last_contact=max((at for at in seen if at >= site.enrolled_at), default=None),
            certificate_ends=None if site.revoked_at else site.certificate_ends,
        )
    patients = enrolments.sizes.invited()
    for name in enrolments.waiting():
        yield SiteStatus(name=name, state="invited", patients=patients.get(name), last_contact=None)


def _last_witnessed(registry: Registry) -> dict[str, datetime]:
    query = select(WitnessRow.site, func.max(WitnessRow.seen_at)).group_by(WitnessRow.site)
    with registry.session() as session:
        return {site: at.replace(tzinfo=UTC) for site, at in session.execute(query)}


def _is_serving(home: CoordinatorHome) -> bool:
    held = HomeError("served")
    try:
        with exclusive_lock(home.path / "serve.lock", held=held):
            return False
    except HomeError:
        return True
