"""What the pages of a study show, as values: sites and how they did last, runs and rounds."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from crafts_core.plan import Plan
from crafts_privacy.signing import fingerprint, verify
from crafts_server.home import CoordinatorHome
from crafts_server.receipts import RoundReceipt
from crafts_server.registry import RunStatus, RunSummary
from crafts_server.round_costs import RoundCost, round_costs
from crafts_server.samples import Samples, samples_of
from crafts_server.status import SiteStatus, Status, status_of

NEWEST = 30
"""Rounds on the page of a run that is made anew all the time."""
UP_WITHIN = timedelta(minutes=5)
"""A site that is up calls every half minute, and is noted every minute."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteLine:
    """One site."""

    site: SiteStatus
    standing: str
    """``up``, ``silent``, ``not seen``, ``revoked`` or ``invited``, now."""
    outcome: str
    """``used``, ``late``, ``refused`` or empty, in the newest round that asked sites."""
    why: str
    """What of it, and which round."""
    certificate: str
    """What to do about its certificate; empty if nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunLine:
    """One run, and how far it is."""

    run: RunSummary
    why: str
    """It has stopped or waits; empty while it runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyView:
    """All of a home."""

    status: Status
    at: datetime
    sites: tuple[SiteLine, ...]
    runs: tuple[RunLine, ...]
    waiting: tuple[str, ...]
    """Hashes of plans that were queued and have no run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunView:
    """One run with the receipts of its rounds, newest first."""

    run: RunSummary
    at: datetime
    plan_signer: str
    """Fingerprint of this home's key, whose signature of the plan was checked just now."""
    receipts: tuple[RoundReceipt, ...]
    rounds: tuple[tuple[RoundReceipt, RoundCost], ...]
    """Those that are shown, with what each cost, by what its sites declared."""
    whole: bool
    """Whether all are shown; else the newest."""
    samples: Samples | None
    """Of the newest checkpoint that was drawn."""

    @property
    def bytes_moved(self) -> int:
        return sum(receipt.bytes_down + receipt.bytes_up for receipt in self.receipts)


def study_view(home: CoordinatorHome) -> StudyView:
    """Read it all now.

    Raises:
        CraftsError: the home, its registry or a checkpoint is not in order.
    """
    status, at = status_of(home), datetime.now(UTC)
    newest = _newest_receipt(home, status.runs)
    started = {run.plan_hash for run in status.runs}
    return StudyView(
        status=status,
        at=at,
        sites=tuple(site_line(site, newest, at=at) for site in status.sites),
        runs=tuple(RunLine(run=run, why=status.why.get(run.plan_hash, "")) for run in status.runs),
        waiting=tuple(plan for plan in status.queued if plan not in started),
    )


def run_view(home: CoordinatorHome, run_id: str, *, whole: bool = False) -> RunView:
    """One run; of its rounds the newest are shown, or the ``whole`` of them.

    Raises:
        UnknownRunError: there is none.
        CraftsError: its plan or its checkpoints are not what was signed.
    """
    with home.registry() as registry:
        run = registry.run(run_id)
        signed = registry.plan(run.plan_hash)
    verify(home.public_key, signed.json.encode(), signed.signature)
    plan = Plan.parse(json.loads(signed.json))
    chain = home.checkpoints(run.run_id).chain()
    receipts = tuple(each.receipt() for each in chain[1:])
    costs = round_costs(plan, receipts, newest=None if whole else NEWEST)
    shown = receipts[len(receipts) - len(costs) :]
    return RunView(
        run=run,
        at=datetime.now(UTC),
        plan_signer=fingerprint(home.public_key),
        receipts=tuple(reversed(receipts)),
        rounds=tuple(zip(reversed(shown), reversed(costs), strict=True)),
        whole=whole,
        samples=samples_of(home, plan, chain),
    )


def site_line(site: SiteStatus, newest: RoundReceipt | None, *, at: datetime) -> SiteLine:
    """How a site stands now, and what came of it in the newest round."""
    outcome, why = "", ""
    if site.state == "enrolled" and newest is not None:
        outcome, why = _outcome(site.name, newest)
    return SiteLine(
        site=site,
        standing=_standing(site, at),
        outcome=outcome,
        why=why,
        certificate=site.certificate_advice(at),
    )


def _standing(site: SiteStatus, at: datetime) -> str:
    if site.state != "enrolled":
        return site.state
    if site.last_contact is None:
        return "not seen"
    return "up" if at - site.last_contact < UP_WITHIN else "silent"


def _outcome(name: str, newest: RoundReceipt) -> tuple[str, str]:
    where = f"round {newest.round}"
    for used in newest.sites:
        if used.site == name:
            return "used", f"{where}, weight {used.weight:.2f}"
    for refusal in newest.refused:
        if refusal.site == name:
            return "refused", f"{where}: {refusal.reason}"
    if name in newest.missing:
        return "late", f"had not answered when {where} closed"
    if name in newest.left_out:
        return "late", f"not asked in {where}: it spoils sums or does not deliver"
    return "", f"was not there in {where}"


def _newest_receipt(home: CoordinatorHome, runs: Sequence[RunSummary]) -> RoundReceipt | None:
    """That asked sites, of the run that goes on, else of the one that was started last."""
    with_rounds = [run for run in runs if run.rounds]
    going = [run for run in with_rounds if run.status is RunStatus.RUNNING]
    for run in (going or with_rounds)[:1]:
        receipts = (each.receipt() for each in reversed(home.checkpoints(run.run_id).chain()[1:]))
        return next((each for each in receipts if each.sites or each.sums), None)
    return None
