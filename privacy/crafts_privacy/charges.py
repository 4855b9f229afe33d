"""What a cohort was charged, read off the ledger's entries; which charge pays for what.

A charge is held by one entry at a time: the one that reserved it, then each that carried it over.
Nothing here writes.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from crafts_core import fields
from crafts_privacy import accounting
from crafts_privacy.accounting import PrivacyEvent
from crafts_privacy.errors import (
    AloneBudgetExceededError,
    FiltersChangedError,
    LedgerError,
    LedgerTamperedError,
    StageSpentError,
)
from crafts_privacy.ledger_rows import RESTORE, EntryKind, LedgerEntry, Share
from crafts_privacy.lifetime import AloneLimit, Lifetime, PlanCharges, Terms, with_charge

MAX_CARRIED = 1000
"""How often one charge is carried over. Each is a training of which nothing should be told: that a
word leaves late all the same has a chance (``answer_times.OVERRUN``), which must not add up."""
HOLDS_A_CHARGE = frozenset({EntryKind.RESERVED, EntryKind.CARRIED})
SHA256 = re.compile(fields.SHA256)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reservation:
    """Permission to train one round. ``sequence`` is its entry in the ledger."""

    sequence: int
    entry_hash: str
    cohort: str
    plan_hash: str
    run_id: str
    round: int
    stage: str
    event: PrivacyEvent
    request_hash: str
    """SHA-256 of what exactly was asked for, the adapter among it."""
    own_noise_multiplier: float | None = None
    """Of a sum: the smallest share of noise that may leave for it; None where all is added here."""

    def __post_init__(self) -> None:
        if not (self.cohort and self.run_id and self.stage and self.round >= 1):
            raise ValueError("expected a cohort, a run, a stage and a round from 1")
        if not SHA256.fullmatch(self.plan_hash):
            raise ValueError("expected plan_hash as 64 hexadecimal digits")

    @property
    def key(self) -> tuple[str, str, str, int]:
        """Which round of which run of whom."""
        return (self.cohort, self.plan_hash, self.run_id, self.round)

    @classmethod
    def of(cls, entry: LedgerEntry) -> "Reservation":
        """As a ledger's entry says it."""
        terms = terms_of(entry)
        return cls(
            sequence=entry.sequence,
            entry_hash=entry.hash,
            cohort=entry.cohort,
            plan_hash=entry.plan_hash,
            run_id=entry.run_id,
            round=entry.round,
            stage=entry.stage,
            event=entry.event,
            request_hash="" if terms is None else terms.request_hash,
            own_noise_multiplier=None if terms is None else terms.own_noise_multiplier,
        )


def entry_about(reservation: Reservation, kind: EntryKind, detail: str) -> LedgerEntry:
    """An entry about a reservation, to be sealed by the store."""
    return LedgerEntry(
        sequence=0,
        recorded_at=datetime.now(UTC),
        kind=kind,
        reservation=reservation.sequence,
        cohort=reservation.cohort,
        plan_hash=reservation.plan_hash,
        run_id=reservation.run_id,
        round=reservation.round,
        stage=reservation.stage,
        noise_multiplier=float(reservation.event.noise_multiplier),
        sample_rate=float(reservation.event.sample_rate),
        steps=int(reservation.event.steps),
        detail=detail,
        previous_hash="",
    )


def charged_to(entries: Sequence[LedgerEntry], cohort: str) -> list[LedgerEntry]:
    """The cohort's reserving entries."""
    return [
        entry for entry in entries if entry.kind is EntryKind.RESERVED and entry.cohort == cohort
    ]


def check_stage(charged: Sequence[LedgerEntry], wanted: Reservation, most: int) -> None:
    """A stage of a plan is charged at most so often.

    Raises:
        StageSpentError: it was.
    """
    asked = (wanted.plan_hash, wanted.stage)
    times = sum((entry.plan_hash, entry.stage) == asked for entry in charged)
    if times >= most:
        raise StageSpentError(plan_hash=wanted.plan_hash, stage=wanted.stage, times=times)


def terms_of(entry: LedgerEntry) -> Terms | None:
    """What a charge was made under; None for one from before that was written down."""
    if not entry.detail:
        return None
    try:
        return Terms.of_text(entry.detail)
    except ValueError as error:
        raise LedgerTamperedError(f"ledger entry {entry.sequence}: {error}; {RESTORE}") from error


def is_of_sum(entry: LedgerEntry) -> bool:
    """Whether an entry that holds a charge is of a sum over sites."""
    terms = terms_of(entry)
    return terms is not None and terms.own_noise_multiplier is not None


def last_holders(entries: Sequence[LedgerEntry]) -> dict[int, LedgerEntry]:
    """Who holds each charge now, by the number of the entry that reserved it.

    Args:
        entries: Of one ledger, or those of some cohorts, oldest first.
    """
    carried = {
        entry.reservation: entry
        for entry in entries
        if entry.kind is EntryKind.CARRIED and entry.reservation < entry.sequence
    }  # forwards only: what another hospital exported may be anything
    holders = {}
    for entry in entries:
        if entry.kind is EntryKind.RESERVED:
            holder = entry
            while holder.sequence in carried:
                holder = carried[holder.sequence]
            holders[entry.sequence] = holder
    return holders


@dataclass(frozen=True, slots=True, kw_only=True)
class SumCharge:
    """What a site was charged for one sum over sites."""

    request_hash: str
    """SHA-256 of what was asked for last, where it was carried: no other sum can this charge have
    paid for, and the members of one sum were all asked for the same."""
    event: PrivacyEvent


def charges_of_sums(
    entries: Sequence[LedgerEntry], charged: Sequence[LedgerEntry]
) -> list[SumCharge]:
    """Those of the reserving entries ``charged``, of the ledger ``entries``, that are of sums."""
    holders = last_holders(entries)
    return [
        SumCharge(
            request_hash=Reservation.of(holders[each.sequence]).request_hash, event=each.event
        )
        for each in charged
        if is_of_sum(each)
    ]


def attempt_of(entry: LedgerEntry) -> int:
    """At a round's sum, of an entry that holds a charge; 1 where there is no sum."""
    terms = terms_of(entry)
    return 1 if terms is None else terms.attempt


def plans_of(charged: Sequence[LedgerEntry]) -> tuple[PlanCharges, ...]:
    """Reserving entries by plan, the plan charged last at the end."""
    plans: tuple[PlanCharges, ...] = ()
    for entry in charged:
        terms = terms_of(entry)
        limit = None if terms is None else terms.limit
        plans = with_charge(plans, entry.plan_hash, limit, entry.event)
    return plans


def check_filters(charged: Sequence[LedgerEntry], declared: tuple[str, ...]) -> None:
    """Raises FiltersChangedError where the first charges were made under others."""
    for entry in charged:
        terms = terms_of(entry)
        if terms is not None and set(terms.filters) != set(declared):
            raise FiltersChangedError(cohort=entry.cohort, began=terms.filters, declared=declared)


def open_charges(entries: Sequence[LedgerEntry]) -> list[LedgerEntry]:
    """Entries that hold a charge and that nothing followed."""
    closed = {entry.reservation for entry in entries if entry.kind is not EntryKind.RESERVED}
    return [
        entry for entry in entries if entry.kind in HOLDS_A_CHARGE and entry.sequence not in closed
    ]


def usable_charges(entries: Sequence[LedgerEntry]) -> list[LedgerEntry]:
    """Open ones that may still pay for what is trained: made since the ledger lies where it lies.

    A home that was put back or moved may have answered elsewhere under an earlier one, which stays
    spent: the same request is charged anew.
    """
    places = [
        entry.sequence for entry in entries if entry.kind in (EntryKind.PLACED, EntryKind.RESTORED)
    ]
    since = places[-1] if len(places) > 1 else 0  # the first binds it where it began
    return [entry for entry in open_charges(entries) if entry.sequence > since]


def what_followed(entries: Sequence[LedgerEntry], sequence: int) -> LedgerEntry | None:
    """What became of the charge that an entry holds: committed, or carried over."""
    for entry in entries[sequence:]:
        if entry.reservation == sequence and entry.kind is not EntryKind.RESERVED:
            return entry
    return None


def check_unused(entries: Sequence[LedgerEntry], unused: Reservation, wanted: Reservation) -> None:
    """A charge is carried from an open entry, within one run, for one event.

    Raises:
        LedgerError: it is not open in this ledger, or was made for something else.
    """
    if unused not in [Reservation.of(entry) for entry in usable_charges(entries)]:
        raise LedgerError(
            f"reservation {unused.sequence} is not open in this ledger, or is older than its last "
            "move; its charge pays for nothing"
        )
    for name in ("cohort", "plan_hash", "run_id", "event"):
        if getattr(unused, name) != getattr(wanted, name):
            raise LedgerError(
                f"the charge of reservation {unused.sequence} was made for another {name}"
            )


def times_carried(entries: Sequence[LedgerEntry], holder: Reservation) -> int:
    """How often the charge that an entry of the ledger ``entries`` holds was carried over."""
    times, entry = 0, entries[holder.sequence - 1]
    while entry.kind is EntryKind.CARRIED:
        times, entry = times + 1, entries[entry.reservation - 1]
    return times


def events_alone(
    entries: Sequence[LedgerEntry], cohort: str, *, without: Reservation | None = None
) -> tuple[PrivacyEvent, ...]:
    """Each event with no noise but what the site added itself.

    Args:
        entries: The whole ledger.
        cohort: Whose.
        without: The holder of a charge that is left out.
    """
    holders = last_holders(entries)
    shares = {each.reservation: each.share for each in entries if each.share is not None}
    events = []
    for entry in charged_to(entries, cohort):
        holder = holders[entry.sequence]
        if without is not None and holder.sequence == without.sequence:
            continue
        share = shares.get(holder.sequence)
        own = (
            Reservation.of(holder).own_noise_multiplier
            if share is None
            else share.own_noise_multiplier
        )
        events.append(_with_own_noise(entry.event, own))
    return tuple(events)


def _with_own_noise(event: PrivacyEvent, own: float | None) -> PrivacyEvent:
    """With a share of the noise, or as it is where there is none: all noise is added here."""
    return event if own is None else replace(event, noise_multiplier=own)


def check_alone(
    entries: Sequence[LedgerEntry],
    wanted: Reservation,
    lifetime: Lifetime,
    alone: AloneLimit,
    *,
    held: Reservation | None,
) -> None:
    """Apply the limit on what only the site's own noise protects.

    Args:
        entries: The whole ledger.
        wanted: What is asked for.
        lifetime: For its delta.
        alone: The limit, and the share that may now be added.
        held: The open charge that pays for it: it counts with that share and no longer with its
            own.

    Raises:
        AloneBudgetExceededError: with ``wanted`` it would be passed.
    """
    own = _with_own_noise(wanted.event, alone.own_noise_multiplier)
    before = events_alone(entries, wanted.cohort, without=held)
    epsilon = accounting.epsilon([*before, own], lifetime.delta)
    if not epsilon <= alone.max_epsilon:  # NaN must refuse too
        raise AloneBudgetExceededError(
            cohort=wanted.cohort, epsilon=epsilon, max_epsilon=alone.max_epsilon
        )


def check_share(reservation: Reservation, share: Share) -> None:
    """What left has at least the noise that its charge was admitted with.

    Raises:
        LedgerError: it has less, or all the noise was to be added here.
    """
    least = reservation.own_noise_multiplier
    if least is None or not share.own_noise_multiplier >= least:  # NaN must refuse too
        wanted = "all of the noise" if least is None else f"a share of {least:g} or more"
        raise LedgerError(
            f"reservation {reservation.sequence} was charged for {wanted}, and a vector with "
            f"{share.own_noise_multiplier:g} must not leave; reserve again"
        )


def held_for(entries: Sequence[LedgerEntry], wanted: Reservation) -> Reservation | None:
    """The open reservation of exactly the same request, mechanism and share, if there is one."""
    for entry in usable_charges(entries):
        held = Reservation.of(entry)
        if held == replace(wanted, sequence=held.sequence, entry_hash=held.entry_hash):
            return held
    return None
