"""The site's append-only record of what its patients' privacy was spent on.

``reserve`` before training, ``commit`` before the result leaves. What is reserved is spent,
whatever becomes of it, so a process killed at any instruction never leaves the ledger below what
was released. Epsilon is never stored: it is computed from the events of a cohort whenever somebody
asks.

Beside ``ledger.db`` lie ``ledger.db.head`` (the witness) and ``ledger.db.lock``. Every operation
verifies the whole chain against the witness before it answers. Detected: torn
writes, edited, missing or foreign rows, an older copy put back. Not detected by this file alone:
an administrator who rewrites both the chain and its witness, or restores both from one backup;
``verify()`` returns what a second party can keep to see that. A ledger that was bound to its place
(``place.py``) charges and commits nothing in a copy.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from crafts_privacy import accounting
from crafts_privacy.accounting import NeighboringRelation, PrivacyEvent
from crafts_privacy.errors import (
    BudgetExceededError,
    FiltersChangedError,
    LedgerError,
    LedgerPlaceError,
    LedgerTamperedError,
    PlanBudgetExceededError,
)
from crafts_privacy.ledger_rows import RESTORE, EntryKind, LedgerEntry, genesis_hash
from crafts_privacy.ledger_store import LedgerStore, LedgerTransaction
from crafts_privacy.lifetime import Lifetime, PlanCharges, PlanLimit, Terms, with_charge
from crafts_privacy.place import Place
from crafts_privacy.witness import LedgerHead

__all__ = [
    "BudgetExceededError",
    "EntryKind",
    "FiltersChangedError",
    "Ledger",
    "LedgerEntry",
    "LedgerError",
    "LedgerHead",
    "LedgerPlaceError",
    "LedgerTamperedError",
    "Lifetime",
    "PlanBudgetExceededError",
    "PlanCharges",
    "PlanLimit",
    "Reservation",
]

_SHA256 = re.compile(r"[0-9a-f]{64}")


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

    def __post_init__(self) -> None:
        if not (self.cohort and self.run_id and self.stage and self.round >= 1):
            raise ValueError("expected a cohort, a run, a stage and a round from 1")
        if not _SHA256.fullmatch(self.plan_hash):
            raise ValueError("expected plan_hash as 64 hexadecimal digits")

    @property
    def key(self) -> tuple[str, str, str, int]:
        """Which round of which run of whom."""
        return (self.cohort, self.plan_hash, self.run_id, self.round)

    @classmethod
    def of(cls, entry: LedgerEntry) -> "Reservation":
        return cls(
            sequence=entry.sequence,
            entry_hash=entry.hash,
            cohort=entry.cohort,
            plan_hash=entry.plan_hash,
            run_id=entry.run_id,
            round=entry.round,
            stage=entry.stage,
            event=entry.event,
            request_hash=terms.request_hash if (terms := _terms(entry)) else "",
        )


class Ledger:
    """One ledger file. Safe to use from several processes; one at a time gets in."""

    def __init__(self, path: Path, *, lock_timeout_s: float = 30.0) -> None:
        """Open the ledger, or create it where there is none.

        Raises:
            LedgerTamperedError: what is there is not what was written; do not train.
            LedgerError: another process holds it, or the disk refuses.
        """
        self._path = path
        self._store = LedgerStore(path, lock_timeout_s=lock_timeout_s)
        self.verify()

    def reserve(
        self,
        *,
        cohort: str,
        plan_hash: str,
        run_id: str,
        round: int,
        stage: str,
        event: PrivacyEvent,
        request_hash: str,
        lifetime: Lifetime,
        plan_limit: PlanLimit,
    ) -> Reservation:
        """Charge ``event`` to the cohort before any of it runs.

        The same request for the same cohort asked again while still reserved gives the same
        reservation: nothing of it was released, so it costs once. After a commit, for another
        mechanism, or for another request (the same round from another adapter, say), it is a new
        training and costs again: one charge never pays for two answers.

        A calibrated plan fits its own limit exactly, because ``accounting.merge`` gives the same
        composition that the calibration verified; no slack is needed and none is given.

        Raises:
            BudgetExceededError: none of the declared filters admits it after everything that the
                cohort was charged; nothing is recorded.
            PlanBudgetExceededError: what the cohort was charged under this plan, in any run, with
                this, passes the plan's limit; nothing is recorded.
            FiltersChangedError: the cohort began under other filters; nothing is recorded.
            LedgerPlaceError: this is a copy of the ledger.
        """
        reservation = Reservation(
            sequence=0,  # until it is written
            entry_hash="",
            cohort=cohort,
            plan_hash=plan_hash,
            run_id=run_id,
            round=round,
            stage=stage,
            event=event,
            request_hash=request_hash,
        )
        if not _SHA256.fullmatch(request_hash):
            raise ValueError("expected request_hash as 64 hexadecimal digits")
        with self._in_place() as transaction:
            held = _held(transaction.entries, reservation)
            charged = _charged(transaction.entries, cohort)
            _check_filters(charged, lifetime.filters)
            new = [] if held else [event]
            after = with_charge(_plans(charged), plan_hash, plan_limit, *new)
            state = lifetime.state(after)
            if not state.holds:
                raise BudgetExceededError(cohort=cohort, found=str(state))
            epsilon = accounting.epsilon(after[-1].events, plan_limit.delta)
            if not epsilon <= plan_limit.max_epsilon:  # NaN must refuse too
                raise PlanBudgetExceededError(
                    plan_hash=plan_hash, epsilon=epsilon, max_epsilon=plan_limit.max_epsilon
                )
            if held:
                return held
            reservation = replace(reservation, sequence=len(transaction.entries) + 1)
            terms = Terms(limit=plan_limit, filters=lifetime.filters, request_hash=request_hash)
            transaction.append(_entry(reservation, EntryKind.RESERVED, terms.to_text()))
            return Reservation.of(transaction.entries[-1])

    def commit(self, reservation: Reservation, release_hash: str) -> None:
        """Record that the result with this SHA-256 may now leave. Again with the same is fine.

        Raises:
            LedgerError: the reservation is unknown or released something else, or this is a copy.
        """
        if not _SHA256.fullmatch(release_hash):
            raise ValueError("expected release_hash as 64 hexadecimal digits")
        with self._in_place() as transaction:
            entries = transaction.entries
            at = entries[reservation.sequence - 1 : reservation.sequence]
            known = [Reservation.of(each) for each in at if each.kind is EntryKind.RESERVED]
            if known != [reservation]:
                raise LedgerError(f"reservation {reservation.sequence} is not in this ledger")
            last = [entry for entry in entries if entry.reservation == reservation.sequence][-1]
            if (last.kind, last.detail) == (EntryKind.COMMITTED, release_hash):
                return
            if last.kind is not EntryKind.RESERVED:
                raise LedgerError(
                    f"reservation {reservation.sequence} is already {last.kind} "
                    f"(entry {last.sequence}); reserve again to train that round again"
                )
            transaction.append(_entry(reservation, EntryKind.COMMITTED, release_hash))

    def events(self, cohort: str) -> tuple[PrivacyEvent, ...]:
        """Everything the cohort was charged for: every reservation, whatever became of it."""
        with self._store.transaction() as transaction:
            return tuple(entry.event for entry in _charged(transaction.entries, cohort))

    def plans(self, cohort: str) -> tuple[PlanCharges, ...]:
        """The same by plan, each with what it declared."""
        with self._store.transaction() as transaction:
            return _plans(_charged(transaction.entries, cohort))

    def check_filters(self, cohort: str, declared: tuple[str, ...]) -> None:
        """A policy must declare the filters under which the cohort was charged first.

        Raises:
            FiltersChangedError: it declares others.
        """
        with self._store.transaction() as transaction:
            _check_filters(_charged(transaction.entries, cohort), declared)

    def epsilon(
        self,
        cohort: str,
        delta: float,
        *,
        neighboring_relation: NeighboringRelation = NeighboringRelation.ADD_OR_REMOVE_ONE,
    ) -> float:
        """Epsilon of all the cohort's events together."""
        return accounting.epsilon(
            self.events(cohort), delta, neighboring_relation=neighboring_relation
        )

    def open_reservations(self) -> tuple[Reservation, ...]:
        """Reserved and not committed, such as a crash leaves behind."""
        with self._store.transaction() as transaction:
            return tuple(Reservation.of(entry) for entry in _open(transaction.entries))

    def entries(self) -> tuple[LedgerEntry, ...]:
        """Every entry, oldest first."""
        with self._store.transaction() as transaction:
            return tuple(transaction.entries)

    def verify(self) -> LedgerHead:
        """Check the file, the chain and the witness.

        Returns:
            The head, for a second party to keep.

        Raises:
            LedgerTamperedError: says which entry and what to do.
        """
        with self._store.transaction() as transaction:
            transaction.check_file()
            return transaction.head

    def lacks(self, heads: Iterable[LedgerHead]) -> list[LedgerHead]:
        """Those heads that this ledger never had: it is older than they are, or another one."""
        with self._store.transaction() as transaction:
            ledger_id = transaction.head.ledger_id
            hashes = [genesis_hash(ledger_id), *(entry.hash for entry in transaction.entries)]
        return [
            head
            for head in heads
            if head.ledger_id != ledger_id
            or hashes[head.sequence : head.sequence + 1] != [head.hash]
        ]

    def is_bound(self) -> bool:
        """Whether it was ever bound to a place."""
        with self._store.transaction() as transaction:
            return _bound_to(transaction.entries) is not None

    def check_place(self) -> None:
        """Refuse in a copy.

        Raises:
            LedgerPlaceError: the ledger is bound to another place.
        """
        with self._in_place():
            pass

    def bind(self) -> None:
        """Bind the ledger to where it lies, unless it is bound already.

        Raises:
            LedgerPlaceError: it is, to another place.
        """
        with self._in_place() as transaction:
            if _bound_to(transaction.entries) is None:
                transaction.append(_placed(self._here(transaction)))

    def move(self) -> None:
        """Bind the ledger to where it lies now: somebody vouches that no other copy is used.

        Raises:
            LedgerError: it is bound to this place.
        """
        with self._store.transaction() as transaction:
            here, bound = self._here(transaction), _bound_to(transaction.entries)
            if bound is not None and not bound.differences(here):
                raise LedgerError("the ledger is bound to this place already; nothing to move")
            transaction.append(_placed(here))

    @contextmanager
    def _in_place(self) -> Iterator[LedgerTransaction]:
        """A transaction of the ledger itself; a copy of it has none."""
        with self._store.transaction() as transaction:
            bound = _bound_to(transaction.entries)
            differ = [] if bound is None else bound.differences(self._here(transaction))
            if differ:
                raise LedgerPlaceError(
                    f"ledger {self._path} is bound to another place ({', '.join(differ)}): this is "
                    "a copy, or it was moved or put back; if no other copy is used any more, run "
                    "crafts-client ledger move"
                )
            yield transaction

    def _here(self, transaction: LedgerTransaction) -> Place:
        return Place.of(self._path, transaction.head.ledger_id)


def _placed(place: Place) -> LedgerEntry:
    """An entry about the ledger's place, to be sealed by the store."""
    return LedgerEntry(
        sequence=0,
        recorded_at=datetime.now(UTC),
        kind=EntryKind.PLACED,
        reservation=0,
        cohort="",
        plan_hash="",
        run_id="",
        round=0,
        stage="",
        noise_multiplier=0.0,
        sample_rate=0.0,
        steps=0,
        detail=str(place),
        previous_hash="",
    )


def _bound_to(entries: Sequence[LedgerEntry]) -> Place | None:
    """The place that the newest of its kind of entry names."""
    for entry in reversed(entries):
        if entry.kind is EntryKind.PLACED:
            return Place.parse(entry.detail)
    return None


def _entry(reservation: Reservation, kind: EntryKind, detail: str) -> LedgerEntry:
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


def _charged(entries: Sequence[LedgerEntry], cohort: str) -> list[LedgerEntry]:
    """The cohort's reserving entries."""
    return [
        entry for entry in entries if entry.kind is EntryKind.RESERVED and entry.cohort == cohort
    ]


def _terms(entry: LedgerEntry) -> Terms | None:
    """What a charge was made under; None for one from before that was written down."""
    if not entry.detail:
        return None
    try:
        return Terms.of_text(entry.detail)
    except ValueError as error:
        raise LedgerTamperedError(f"ledger entry {entry.sequence}: {error}; {RESTORE}") from error


def _plans(charged: Sequence[LedgerEntry]) -> tuple[PlanCharges, ...]:
    """Reserving entries by plan, the plan charged last at the end."""
    plans: tuple[PlanCharges, ...] = ()
    for entry in charged:
        terms = _terms(entry)
        limit = None if terms is None else terms.limit
        plans = with_charge(plans, entry.plan_hash, limit, entry.event)
    return plans


def _check_filters(charged: Sequence[LedgerEntry], declared: tuple[str, ...]) -> None:
    for entry in charged:
        terms = _terms(entry)
        if terms is not None and set(terms.filters) != set(declared):
            raise FiltersChangedError(cohort=entry.cohort, began=terms.filters, declared=declared)


def _open(entries: Sequence[LedgerEntry]) -> list[LedgerEntry]:
    """Reserving entries that nothing followed."""
    closed = {entry.reservation for entry in entries if entry.kind is not EntryKind.RESERVED}
    return [
        entry
        for entry in entries
        if entry.kind is EntryKind.RESERVED and entry.sequence not in closed
    ]


def _held(entries: Sequence[LedgerEntry], wanted: Reservation) -> Reservation | None:
    """The open reservation of exactly the same request and mechanism, if there is one."""
    for entry in _open(entries):
        held = Reservation.of(entry)
        if held == replace(wanted, sequence=held.sequence, entry_hash=held.entry_hash):
            return held
    return None
