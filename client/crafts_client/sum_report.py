"""What the privacy report says of sums over sites: two guarantees, and who must keep which."""

import math
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime

from pydantic import BaseModel, ConfigDict

from crafts_client.home import SiteHome
from crafts_client.outbox import ReleaseRecord
from crafts_core.array_bytes import PACKED
from crafts_privacy import accounting
from crafts_privacy.charges import charged_to, events_alone, is_of_sum
from crafts_privacy.ledger import EntryKind, LedgerEntry


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class RosterRecord(_Record):
    """Who the hospitals of a plan's sums are, as somebody here approved it."""

    plan_hash: str
    approved_at: datetime
    phrase: str
    sites: tuple[str, ...]


class SumReport(_Record):
    """Steps in which this hospital added a share of the noise."""

    steps: int
    """Charged."""
    vectors: int
    """That left."""
    attempts_without_result: int
    """Charged once more than their round needed."""
    fewest_members: int | None
    """Hospitals in the smallest sum; None while no vector has left."""
    fewest_honest: int | None
    """Members whose noise the promise counts on, in the sum that has fewest of them."""
    most_colluding: int | None
    """Hospitals that may work with the coordinator without weakening the promise."""
    epsilon_alone: float | None
    """If all other hospitals and the coordinator worked together against this one."""
    max_epsilon_alone: float | None
    rosters: tuple[RosterRecord, ...]


def sum_report(site: SiteHome, entries: Sequence[LedgerEntry]) -> SumReport | None:
    """Of the cohort's ledger; None where no step was one of a sum.

    Args:
        site: Whose report it is.
        entries: The whole ledger.
    """
    cohort = site.config.cohort
    charged = [entry for entry in charged_to(entries, cohort) if is_of_sum(entry)]
    if not charged:
        return None
    committed = [entry for entry in entries if entry.cohort == cohort and entry.share is not None]
    shares = [entry.share for entry in committed if entry.share is not None]
    alone = accounting.epsilon(events_alone(entries, cohort), site.policy.max_delta)
    approvals = site.roster_approvals.all()
    plans = dict.fromkeys(entry.plan_hash for entry in charged)
    return SumReport(
        steps=sum(entry.steps for entry in charged),
        vectors=len(committed),
        attempts_without_result=len(charged) - len({(e.run_id, e.round) for e in committed}),
        fewest_members=min((share.members for share in shares), default=None),
        fewest_honest=min((each.members - each.colluding_sites for each in shares), default=None),
        most_colluding=min((share.colluding_sites for share in shares), default=None),
        epsilon_alone=alone if math.isfinite(alone) else None,
        max_epsilon_alone=site.policy.max_epsilon_alone,
        rosters=tuple(
            RosterRecord(
                plan_hash=plan,
                approved_at=approvals[plan].approved_at,
                phrase=approvals[plan].roster.phrase,
                sites=tuple(approvals[plan].roster.identities),
            )
            for plan in plans
            if plan in approvals
        ),
    )


def num_summed_updates(entries: Sequence[LedgerEntry], records: Mapping[str, ReleaseRecord]) -> int:
    """Vectors of sums that left with all of this hospital's noise, so that no share is counted."""
    sent = [records.get(e.release_hash) for e in entries if e.kind is EntryKind.COMMITTED]
    return sum(
        1 for record in sent if record and record.share is None and record.tensors == (PACKED,)
    )


def doubts_about_sums(
    site: SiteHome, found: SumReport | None, entries: Sequence[LedgerEntry]
) -> Iterator[str]:
    """What of the promise of sums this site's files do not carry."""
    if found is None:
        return
    known = {roster.plan_hash for roster in found.rosters}
    charged = charged_to(entries, site.config.cohort)
    missing = {entry.plan_hash for entry in charged if is_of_sum(entry)} - known
    for plan in sorted(missing):
        yield (
            f"sums: nobody here approved who the other hospitals of plan {plan[:16]} are; run "
            "crafts-client roster approve"
        )
    fewest, wanted = found.fewest_members, site.policy.min_members
    if fewest is not None and fewest < wanted:
        yield f"sums: one was over {fewest} hospitals, min_members of policy.toml is {wanted}"
    most = found.max_epsilon_alone
    if found.epsilon_alone is None or most is None or found.epsilon_alone > most:
        alone = "has no bound" if found.epsilon_alone is None else f"is {found.epsilon_alone:.3f}"
        yield (
            f"sums: epsilon {alone} if all others worked together against this hospital, "
            f"max_epsilon_alone of policy.toml is {'not set' if most is None else f'{most:g}'}"
        )


def summed_entries(entries: Sequence[LedgerEntry]) -> list[LedgerEntry]:
    """The charges that are of sums."""
    return [entry for entry in entries if entry.kind is EntryKind.RESERVED and is_of_sum(entry)]
