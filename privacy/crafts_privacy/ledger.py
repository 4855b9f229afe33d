"""The site's append-only record of what its patients' privacy was spent on.

``reserve`` before training, ``commit`` before the result leaves. What is reserved is spent,
whatever becomes of it, so a process killed at any instruction never leaves the ledger below what
was released; only a charge of which nothing left and nothing will may be carried over to another
round. Epsilon is never stored: it is computed from the events of a cohort whenever somebody asks.

Beside ``ledger.db`` lie ``ledger.db.head`` (the witness) and ``ledger.db.lock``. Every operation
verifies the whole chain against the witness before it answers. Detected: torn
writes, edited, missing or foreign rows, an older copy put back. Not detected by this file alone:
an administrator who rewrites both the chain and its witness, or restores both from one backup;
``verify()`` returns what a second party can keep to see that. A ledger that was bound to its place
(``place.py``) charges and commits nothing in a copy, and none does that says it was put back.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from crafts_privacy import accounting
from crafts_privacy.accounting import NeighboringRelation, PrivacyEvent
from crafts_privacy.charges import (
    HOLDS_A_CHARGE,
    MAX_CARRIED,
    SHA256,
    Reservation,
    attempt_of,
    charged_to,
    check_alone,
    check_filters,
    check_share,
    check_stage,
    check_unused,
    entry_about,
    events_alone,
    held_for,
    open_charges,
    plans_of,
    times_carried,
    what_followed,
)
from crafts_privacy.errors import (
    AloneBudgetExceededError,
    BudgetExceededError,
    FiltersChangedError,
    LedgerError,
    LedgerPlaceError,
    LedgerTamperedError,
    PlanBudgetExceededError,
)
from crafts_privacy.ledger_rows import (
    EntryKind,
    LedgerEntry,
    Share,
    genesis_hash,
    released_text,
)
from crafts_privacy.ledger_store import LedgerStore, LedgerTransaction
from crafts_privacy.lifetime import (
    AloneLimit,
    Lifetime,
    PlanCharges,
    PlanLimit,
    Terms,
    with_charge,
    with_promised,
)
from crafts_privacy.place import Place
from crafts_privacy.witness import LedgerHead

__all__ = [
    "AloneBudgetExceededError",
    "AloneLimit",
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
    "Share",
]


class Ledger:
    """One ledger file. Safe to use from several processes; one at a time gets in."""

    def __init__(
        self, path: Path, *, lock_timeout_s: float = 30.0, may_upgrade: bool = False
    ) -> None:
        """Open the ledger, or create it where there is none.

        Args:
            path: Of the database; its witness and lock lie beside it.
            lock_timeout_s: How long to wait for another process.
            may_upgrade: Bring tables of an older program up to date, which that one no longer
                reads. Who only looks does not.

        Raises:
            LedgerTamperedError: what is there is not what was written; do not train.
            LedgerError: another process holds it, or the disk refuses.
        """
        self._path = path
        self._store = LedgerStore(path, lock_timeout_s=lock_timeout_s, may_upgrade=may_upgrade)
        self.verify()

    @classmethod
    def begin_with(cls, path: Path, ledger_id: str, entries: Sequence[LedgerEntry]) -> Self:
        """Write a ledger anew, with entries that it had; ``verify`` is what checks them.

        Raises:
            LedgerError: there is one already.
        """
        LedgerStore(path, lock_timeout_s=0.0, may_upgrade=False).begin_with(ledger_id, entries)
        return cls(path)

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
        attempt: int = 1,
        alone: AloneLimit | None = None,
        unused: Reservation | None = None,
        promised: Sequence[PrivacyEvent] = (),
        most_of_stage: int | None = None,
    ) -> Reservation:
        """Charge ``event`` to the cohort before any of it runs.

        The same request for the same cohort asked again while still reserved gives the same
        reservation: nothing of it was released, so it costs once. After a commit, for another
        mechanism, or for another request (the same round from another adapter, say), it is a new
        training and costs again: one charge never pays for two answers.

        ``unused`` is the exception: an open reservation of the same run for the same event, of
        which the caller knows that nothing left and nothing will (a sum that this site was not
        made a member of). Its charge is carried over to what is asked for now, ``MAX_CARRIED``
        times; then it is charged anew.

        ``promised`` are events that the plan may charge once more beside steps of training, charged
        or not: its own limit keeps room for them. Which of two kinds comes next is then no choice
        that could be made by what was seen (``lifetime``). For that the plan may charge a ``stage``
        of such events no more than ``most_of_stage`` times, over all of its runs.

        A calibrated plan fits its own limit exactly, because ``accounting.merge`` gives the same
        composition that the calibration verified; no slack is needed and none is given.

        Raises:
            BudgetExceededError: none of the declared filters admits it after everything that the
                cohort was charged; nothing is recorded.
            PlanBudgetExceededError: what the cohort was charged under this plan, in any run, with
                this, passes the plan's limit, or its stage was charged as often as it may be;
                nothing is recorded.
            AloneBudgetExceededError: the same with the noise that the site itself added, this event
                with its smallest share or all of it among them, also where it costs nothing more;
                nothing is recorded.
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
            own_noise_multiplier=None if alone is None else alone.own_noise_multiplier,
        )
        if not SHA256.fullmatch(request_hash):
            raise ValueError("expected request_hash as 64 hexadecimal digits")
        with self._in_place() as transaction:
            held = held_for(transaction.entries, reservation)
            charged = charged_to(transaction.entries, cohort)
            check_filters(charged, lifetime.filters)
            carried = None if held else unused
            if carried is not None:
                check_unused(transaction.entries, carried, reservation)
                if times_carried(transaction.entries, carried) >= MAX_CARRIED:
                    carried = None
            new = [] if held or carried else [event]
            if new and most_of_stage is not None:
                check_stage(charged, reservation, most_of_stage)
            after = with_charge(plans_of(charged), plan_hash, plan_limit, *new)
            state = lifetime.state(after)
            if not state.holds:
                raise BudgetExceededError(cohort=cohort, found=str(state))
            epsilon = accounting.epsilon(
                with_promised(after[-1].events, promised), plan_limit.delta
            )
            if not epsilon <= plan_limit.max_epsilon:  # NaN must refuse too
                raise PlanBudgetExceededError(
                    plan_hash=plan_hash, epsilon=epsilon, max_epsilon=plan_limit.max_epsilon
                )
            if alone is not None:
                check_alone(transaction.entries, reservation, lifetime, alone, held=held or carried)
            if held:
                return held
            terms = Terms(
                limit=plan_limit,
                filters=lifetime.filters,
                request_hash=request_hash,
                own_noise_multiplier=reservation.own_noise_multiplier,
                attempt=attempt,
            )
            kind, number = EntryKind.RESERVED, len(transaction.entries) + 1
            if carried is not None:
                kind, number = EntryKind.CARRIED, carried.sequence
            reservation = replace(reservation, sequence=number)
            transaction.append(entry_about(reservation, kind, terms.to_text()))
            return Reservation.of(transaction.entries[-1])

    def commit(
        self, reservation: Reservation, release_hash: str, share: Share | None = None
    ) -> None:
        """Record that the result with this SHA-256 may now leave. Again with the same is fine.

        ``share`` is of a masked vector: what this site added of the sum's noise.

        Raises:
            LedgerError: the reservation is unknown or released something else, the share is smaller
                than what was charged for, or this is a copy.
        """
        if not SHA256.fullmatch(release_hash):
            raise ValueError("expected release_hash as 64 hexadecimal digits")
        with self._in_place() as transaction:
            entries = transaction.entries
            at = entries[reservation.sequence - 1 : reservation.sequence]
            known = [Reservation.of(each) for each in at if each.kind in HOLDS_A_CHARGE]
            if known != [reservation]:
                raise LedgerError(f"reservation {reservation.sequence} is not in this ledger")
            if share is not None:
                check_share(reservation, share)
            detail = released_text(release_hash, share)
            last = what_followed(entries, reservation.sequence)
            if last is None:
                transaction.append(entry_about(reservation, EntryKind.COMMITTED, detail))
            elif (last.kind, last.detail) != (EntryKind.COMMITTED, detail):
                raise LedgerError(
                    f"reservation {reservation.sequence} is already {last.kind} "
                    f"(entry {last.sequence}); reserve again to train that round again"
                )

    def events(self, cohort: str) -> tuple[PrivacyEvent, ...]:
        """Everything the cohort was charged for: every reservation, whatever became of it."""
        with self._store.transaction() as transaction:
            return tuple(entry.event for entry in charged_to(transaction.entries, cohort))

    def events_alone(self, cohort: str) -> tuple[PrivacyEvent, ...]:
        """The same events with no noise but what this site added itself.

        What they cost if everybody else works together against it. A sum that left counts with the
        share that was added to it, one that did not with the smallest that it could have been.
        """
        with self._store.transaction() as transaction:
            return events_alone(transaction.entries, cohort)

    def last_released(self, plan_hash: str, run_id: str) -> tuple[int, int]:
        """The newest round of a run that was committed or closed, and its attempt; 0 and 0."""
        with self._store.transaction() as transaction:
            entries = transaction.entries
            found = [
                (entry.round, attempt_of(entries[entry.reservation - 1]))
                for entry in entries
                if entry.kind is EntryKind.COMMITTED
                and (entry.plan_hash, entry.run_id) == (plan_hash, run_id)
            ]
            return max(found, default=(0, 0))

    def plans(self, cohort: str) -> tuple[PlanCharges, ...]:
        """The same by plan, each with what it declared."""
        with self._store.transaction() as transaction:
            return plans_of(charged_to(transaction.entries, cohort))

    def check_filters(self, cohort: str, declared: tuple[str, ...]) -> None:
        """A policy must declare the filters under which the cohort was charged first.

        Raises:
            FiltersChangedError: it declares others.
        """
        with self._store.transaction() as transaction:
            check_filters(charged_to(transaction.entries, cohort), declared)

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
            return tuple(Reservation.of(entry) for entry in open_charges(transaction.entries))

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
                here = str(self._here(transaction))
                transaction.append(_about_all(EntryKind.PLACED, here))

    def mark_restored(self, made_at: datetime) -> None:
        """From now on it pays nowhere, this place included, until somebody moves it here.

        For a ledger that was put back from a backup: what was spent since ``made_at`` is not in it.
        """
        with self._store.transaction() as transaction:
            transaction.append(_about_all(EntryKind.RESTORED, made_at.isoformat()))

    def restored_from(self) -> str | None:
        """The time of the backup that it was put back from, if it was not moved here since."""
        with self._store.transaction() as transaction:
            return _restored_from(transaction.entries)

    @contextmanager
    def held(self) -> Iterator[tuple[Path, Path]]:
        """Its file and its witness, verified, while nobody writes to them."""
        with self._store.transaction():
            yield self._store.files

    def move(self) -> None:
        """Bind the ledger to where it lies now: somebody vouches that no other copy is used.

        Raises:
            LedgerError: it is bound to this place.
        """
        with self._store.transaction() as transaction:
            here, bound = self._here(transaction), _bound_to(transaction.entries)
            is_here = bound is not None and not bound.differences(here)
            if is_here and _restored_from(transaction.entries) is None:
                raise LedgerError("the ledger is bound to this place already; nothing to move")
            transaction.append(_about_all(EntryKind.PLACED, str(here)))

    @contextmanager
    def _in_place(self) -> Iterator[LedgerTransaction]:
        """A transaction of the ledger itself; a copy of it has none."""
        with self._store.transaction() as transaction:
            if made_at := _restored_from(transaction.entries):
                raise LedgerPlaceError(
                    f"ledger {self._path} was put back from a backup of {made_at}, and what was "
                    "spent since is not in it; crafts-client ledger move says what to do"
                )
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


def _about_all(kind: EntryKind, detail: str) -> LedgerEntry:
    """An entry about the ledger itself, to be sealed by the store."""
    return LedgerEntry(
        sequence=0,
        recorded_at=datetime.now(UTC),
        kind=kind,
        reservation=0,
        cohort="",
        plan_hash="",
        run_id="",
        round=0,
        stage="",
        noise_multiplier=0.0,
        sample_rate=0.0,
        steps=0,
        detail=detail,
        previous_hash="",
    )


def _restored_from(entries: Sequence[LedgerEntry]) -> str | None:
    """What the newest entry about the ledger itself says, if it is that it was put back."""
    for entry in reversed(entries):
        if entry.kind in (EntryKind.PLACED, EntryKind.RESTORED):
            return entry.detail if entry.kind is EntryKind.RESTORED else None
    return None


def _bound_to(entries: Sequence[LedgerEntry]) -> Place | None:
    """The place that the newest of its kind of entry names."""
    for entry in reversed(entries):
        if entry.kind is EntryKind.PLACED:
            return Place.parse(entry.detail)
    return None
