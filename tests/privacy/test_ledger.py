import math
import shutil
import sqlite3
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from crafts_core.durable import exclusive_lock
from crafts_privacy import accounting
from crafts_privacy.accounting import PrivacyEvent
from crafts_privacy.ledger import (
    BudgetExceededError,
    EntryKind,
    Ledger,
    LedgerError,
    LedgerTamperedError,
    Lifetime,
    PlanBudgetExceededError,
    PlanLimit,
    Reservation,
)
from crafts_privacy.lifetime import renyi_epsilon
from crafts_privacy.witness import read_head, write_head

PLAN = "a" * 64
RELEASE = "b" * 64
REQUEST = "c" * 64
DELTA = 1e-4
EVENT = PrivacyEvent(noise_multiplier=8.0, sample_rate=0.1, steps=10)
UNLIMITED = PlanLimit(max_epsilon=math.inf, delta=DELTA)
ORDER = 8


def reserve(
    ledger: Ledger,
    round: int = 1,
    *,
    max_epsilon: float = 8.0,
    filters: tuple[str, ...] = (f"renyi:{ORDER}",),
    **changes: object,
) -> Reservation:
    values: dict[str, object] = {
        "cohort": "breast",
        "plan_hash": PLAN,
        "run_id": "run-1",
        "round": round,
        "stage": "pretraining",
        "event": EVENT,
        "request_hash": REQUEST,
        "lifetime": Lifetime(max_epsilon=max_epsilon, delta=DELTA, filters=filters),
        "plan_limit": UNLIMITED,
    }
    return ledger.reserve(**(values | changes))  # type: ignore[arg-type]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.db"


@pytest.fixture
def ledger(path: Path) -> Ledger:
    return Ledger(path)


@pytest.fixture
def filled(path: Path, ledger: Ledger) -> Path:
    """Two rounds committed and one reserved: five entries."""
    for number in (1, 2):
        ledger.commit(reserve(ledger, number), RELEASE)
    reserve(ledger, 3)
    return path


def edit(path: Path, *statements: str) -> None:
    """What somebody with the file can do: the triggers are dropped first."""
    connection = sqlite3.connect(path)
    for table in ("ledger_entry", "ledger_info"):
        for verb in ("update", "delete"):
            connection.execute(f"DROP TRIGGER IF EXISTS {table}_refuses_{verb}")
    for statement in statements:
        connection.execute(statement)
    connection.commit()
    connection.close()


def head_of(path: Path) -> Path:
    return path.with_name(path.name + ".head")


# Spending.


def test_a_new_ledger_has_spent_nothing(ledger: Ledger) -> None:
    assert ledger.entries() == ()
    assert ledger.epsilon("breast", DELTA) == 0
    assert ledger.verify().sequence == 0


def test_what_is_reserved_counts_as_spent(ledger: Ledger) -> None:
    reserve(ledger)
    assert ledger.events("breast") == (EVENT,)
    assert ledger.epsilon("breast", DELTA) == accounting.epsilon([EVENT], DELTA)


def test_what_is_committed_stays_spent(ledger: Ledger) -> None:
    ledger.commit(reserve(ledger), RELEASE)
    assert ledger.events("breast") == (EVENT,)


def test_cohorts_are_accounted_apart(ledger: Ledger) -> None:
    reserve(ledger)
    assert ledger.events("lung") == ()
    assert ledger.epsilon("lung", DELTA) == 0


def test_rounds_compose(ledger: Ledger) -> None:
    for number in range(1, 4):
        ledger.commit(reserve(ledger, number), RELEASE)
    assert ledger.epsilon("breast", DELTA) == accounting.epsilon([EVENT] * 3, DELTA)


def test_the_same_round_asked_again_costs_once(ledger: Ledger) -> None:
    assert reserve(ledger) == reserve(ledger)
    assert len(ledger.events("breast")) == 1


def test_a_reservation_survives_a_restart(path: Path) -> None:
    first = reserve(Ledger(path))
    again = Ledger(path)
    assert again.open_reservations() == (first,)
    assert reserve(again) == first


def test_a_charge_is_for_one_request(ledger: Ledger) -> None:
    """The same round from another adapter: else one charge would pay for two answers."""
    first, other = reserve(ledger), reserve(ledger, request_hash="d" * 64)
    assert other != first
    assert len(ledger.events("breast")) == 2
    assert (reserve(ledger), reserve(ledger, request_hash="d" * 64)) == (first, other)


def test_training_a_committed_round_again_costs_again(ledger: Ledger) -> None:
    ledger.commit(reserve(ledger), RELEASE)
    ledger.commit(reserve(ledger), "c" * 64)
    assert len(ledger.events("breast")) == 2


def test_the_same_round_for_another_mechanism_is_charged_anew(ledger: Ledger) -> None:
    """As after an update that calibrates otherwise: nobody has to give anything back."""
    first = reserve(ledger)
    cheaper = PrivacyEvent(noise_multiplier=80.0, sample_rate=0.1, steps=10)
    second = reserve(ledger, event=cheaper)
    assert reserve(ledger, event=cheaper) == second != first
    assert ledger.events("breast") == (EVENT, cheaper)


# Refusing.


def test_a_budget_is_refused_before_it_is_passed_and_nothing_is_recorded(ledger: Ledger) -> None:
    allowed = renyi_epsilon([EVENT] * 2, DELTA, order=ORDER)
    reserve(ledger, 1, max_epsilon=allowed)
    reserve(ledger, 2, max_epsilon=allowed)
    with pytest.raises(BudgetExceededError, match="cohort breast"):
        reserve(ledger, 3, max_epsilon=allowed)
    assert len(ledger.entries()) == 2


@pytest.mark.slow
def test_a_calibrated_study_fits_its_budget_to_the_last_round(ledger: Ledger) -> None:
    noise_multiplier = accounting.calibrate_noise_multiplier(
        target_epsilon=2.0, delta=DELTA, sample_rate=0.1, steps=40
    )
    event = PrivacyEvent(noise_multiplier=noise_multiplier, sample_rate=0.1, steps=10)
    target = PlanLimit(max_epsilon=2.0, delta=DELTA)
    for number in range(1, 5):
        sums = {"max_epsilon": 2.0, "filters": ("sums",), "plan_limit": target}
        reserve(ledger, number, event=event, **sums)
    with pytest.raises(BudgetExceededError):
        reserve(ledger, event=event, plan_hash="c" * 64, **sums)
    with pytest.raises(PlanBudgetExceededError):
        reserve(ledger, 5, event=event, **sums)


def limit_of(num_events: int) -> PlanLimit:
    return PlanLimit(
        max_epsilon=accounting.epsilon([EVENT] * num_events, DELTA / 10), delta=DELTA / 10
    )


def test_a_plan_never_passes_its_own_limit_in_however_many_runs(ledger: Ledger) -> None:
    for number in range(3):
        reserve(ledger, run_id=f"run-{number}", plan_limit=limit_of(3))
    with pytest.raises(PlanBudgetExceededError, match="over all of its runs"):
        reserve(ledger, run_id="run-3", plan_limit=limit_of(3))
    assert len(ledger.entries()) == 3
    reserve(ledger, run_id="run-3", plan_hash="c" * 64, plan_limit=limit_of(1))
    reserve(ledger, run_id="run-3", cohort="lung", plan_limit=limit_of(1))


def test_a_plan_keeps_room_for_what_it_promised(ledger: Ledger) -> None:
    """Steps do not use it up, and what was charged of it is not kept free once more."""
    promised = 2 * (PrivacyEvent(noise_multiplier=4.0, sample_rate=1.0, steps=1),)
    limit = PlanLimit(max_epsilon=accounting.epsilon([*promised, EVENT, EVENT], DELTA), delta=DELTA)

    def ask(round: int, event: PrivacyEvent) -> None:
        reserve(ledger, round, event=event, plan_limit=limit, promised=promised)

    for number in (1, 2):
        ask(number, EVENT)
    for round, event in enumerate(promised, start=4):
        with pytest.raises(PlanBudgetExceededError):
            ask(3, EVENT)
        ask(round, event)
    assert ledger.events("breast") == (EVENT, EVENT, *promised)


def test_a_round_that_was_lost_counts_against_its_plan(ledger: Ledger) -> None:
    reserve(ledger, 1, plan_limit=limit_of(2))  # never committed
    ledger.commit(reserve(ledger, 2, plan_limit=limit_of(2)), RELEASE)
    assert reserve(ledger, 1, plan_limit=limit_of(2)).sequence == 1, "asked again it costs once"
    with pytest.raises(PlanBudgetExceededError):
        reserve(ledger, 3, plan_limit=limit_of(2))


def test_a_policy_lowered_since_refuses_an_open_reservation_too(ledger: Ledger) -> None:
    reserve(ledger)
    with pytest.raises(BudgetExceededError):
        reserve(ledger, max_epsilon=0.01)


def test_training_without_noise_is_refused(ledger: Ledger) -> None:
    naked = PrivacyEvent(noise_multiplier=0.0, sample_rate=0.1, steps=1)
    with pytest.raises(BudgetExceededError, match="inf"):
        reserve(ledger, event=naked, max_epsilon=1e9)


def test_a_budget_that_is_not_a_number_refuses(ledger: Ledger) -> None:
    with pytest.raises(BudgetExceededError):
        reserve(ledger, max_epsilon=math.nan)
    with pytest.raises(PlanBudgetExceededError):
        reserve(ledger, plan_limit=PlanLimit(max_epsilon=math.nan, delta=DELTA))


@pytest.mark.parametrize(
    "bad",
    [
        {"cohort": ""},
        {"run_id": ""},
        {"stage": ""},
        {"round": 0},
        {"plan_hash": "x"},
        {"request_hash": "x"},
    ],
)
def test_an_incomplete_reservation_is_refused(ledger: Ledger, bad: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="expected"):
        reserve(ledger, **bad)


# Closing.


def test_committing_twice_is_the_same_commit(ledger: Ledger) -> None:
    reservation = reserve(ledger)
    ledger.commit(reservation, RELEASE)
    ledger.commit(reservation, RELEASE)
    assert len(ledger.entries()) == 2


def test_one_reservation_releases_one_thing(ledger: Ledger) -> None:
    reservation = reserve(ledger)
    ledger.commit(reservation, RELEASE)
    with pytest.raises(LedgerError, match="already committed"):
        ledger.commit(reservation, "c" * 64)


def test_a_reservation_from_another_ledger_is_refused(ledger: Ledger, tmp_path: Path) -> None:
    foreign = reserve(Ledger(tmp_path / "other.db"), 7)
    with pytest.raises(LedgerError, match="not in this ledger"):
        ledger.commit(foreign, RELEASE)


def test_a_commit_names_a_hash(ledger: Ledger) -> None:
    with pytest.raises(ValueError, match="release_hash"):
        ledger.commit(reserve(ledger), "nope")


# Tampering. Each must be found on the next open, by an already open ledger, and name what to do.

ATTACKS: dict[str, tuple[Callable[[Path], None], str]] = {
    "edited noise": (
        lambda p: edit(p, "UPDATE ledger_entry SET noise_multiplier = 99 WHERE sequence = 3"),
        "entry 3 was edited",
    ),
    "edited text": (
        lambda p: edit(p, "UPDATE ledger_entry SET cohort = 'lung' WHERE sequence = 1"),
        "entry 1 was edited",
    ),
    "edited time": (
        lambda p: edit(p, "UPDATE ledger_entry SET recorded_at = 'yesterday' WHERE sequence = 2"),
        "was edited",
    ),
    "unknown kind": (
        lambda p: edit(p, "UPDATE ledger_entry SET kind = 'x' WHERE sequence = 2"),
        "entry 2 was edited",
    ),
    "commit turned into reservation": (
        lambda p: edit(p, "UPDATE ledger_entry SET kind = 'reserved' WHERE sequence = 2"),
        "entry 2 was edited",
    ),
    "deleted middle row": (
        lambda p: edit(p, "DELETE FROM ledger_entry WHERE sequence = 2"),
        "entry 2 is missing",
    ),
    "deleted first row": (
        lambda p: edit(p, "DELETE FROM ledger_entry WHERE sequence = 1"),
        "entry 1 is missing",
    ),
    "deleted last row": (
        lambda p: edit(p, "DELETE FROM ledger_entry WHERE sequence = 5"),
        "ends at entry 4 but entry 5 was written",
    ),
    "deleted all rows": (
        lambda p: edit(p, "DELETE FROM ledger_entry"),
        "ends at entry 0 but entry 5 was written",
    ),
    "swapped rows": (
        lambda p: edit(
            p,
            "UPDATE ledger_entry SET sequence = 99 WHERE sequence = 2",
            "UPDATE ledger_entry SET sequence = 2 WHERE sequence = 3",
            "UPDATE ledger_entry SET sequence = 3 WHERE sequence = 99",
        ),
        "entry 2 was edited",
    ),
    "another identity": (
        lambda p: edit(p, "UPDATE ledger_info SET ledger_id = 'mine'"),
        "entry 1 was edited or comes from another ledger",
    ),
    "lost identity": (lambda p: edit(p, "DELETE FROM ledger_info"), "lost its identity"),
    "dropped table": (lambda p: edit(p, "DROP TABLE ledger_entry"), "does not hold a ledger"),
    "removed file": (lambda p: p.unlink(), "missing or empty"),
    "emptied file": (lambda p: p.write_bytes(b""), "missing or empty"),
    "not a database": (lambda p: p.write_bytes(b"hello" * 1000), "damaged"),
    "torn file": (lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]), "damaged"),
    "removed witness": (lambda p: head_of(p).unlink(), "witness .* is missing"),
    "torn witness": (
        lambda p: head_of(p).write_bytes(head_of(p).read_bytes()[:20]),
        "head is damaged",
    ),
    "emptied witness": (lambda p: head_of(p).write_bytes(b""), "head is damaged"),
    "edited witness": (
        lambda p: head_of(p).write_text(
            head_of(p).read_text().replace('"sequence": 5', '"sequence": 6')
        ),
        "ends at entry 5 but entry 6 was written",
    ),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_tampering_is_found_and_the_message_says_what_to_do(name: str, filled: Path) -> None:
    opened = Ledger(filled)
    attack, message = ATTACKS[name]
    attack(filled)
    with pytest.raises(LedgerTamperedError, match=message) as found:
        Ledger(filled)
    assert any(word in str(found.value) for word in ("restore", "put it back"))
    with pytest.raises(LedgerTamperedError):
        reserve(opened, 9)


def test_an_entry_that_was_edited_and_hashed_again_is_found(filled: Path) -> None:
    """Its own hash is right then; the next entry knows the old one."""
    forged = replace(Ledger(filled).entries()[2], noise_multiplier=99.0).sealed()
    change = f"noise_multiplier = 99.0, hash = '{forged.hash}'"
    edit(filled, f"UPDATE ledger_entry SET {change} WHERE sequence = 3")
    with pytest.raises(LedgerTamperedError, match="entry 4 was edited or comes from another"):
        Ledger(filled)


def test_an_old_copy_put_back_is_found(filled: Path, tmp_path: Path) -> None:
    backup = tmp_path / "backup.db"
    shutil.copy(filled, backup)
    reserve(Ledger(filled), 4)
    reserve(Ledger(filled), 5)
    shutil.copy(backup, filled)
    with pytest.raises(LedgerTamperedError, match="ends at entry 5 but entry 7 was written"):
        Ledger(filled)


def test_an_old_copy_of_one_entry_less_is_found(filled: Path, tmp_path: Path) -> None:
    """The witness may lag by one; the ledger may not."""
    backup = tmp_path / "backup.db"
    shutil.copy(filled, backup)
    reserve(Ledger(filled), 4)
    shutil.copy(backup, filled)
    with pytest.raises(LedgerTamperedError, match="an old copy was put back"):
        Ledger(filled)


def test_an_old_witness_is_found(filled: Path, tmp_path: Path) -> None:
    backup = tmp_path / "backup.head"
    shutil.copy(head_of(filled), backup)
    reserve(Ledger(filled), 4)
    reserve(Ledger(filled), 5)
    shutil.copy(backup, head_of(filled))
    with pytest.raises(LedgerTamperedError, match="the witness is an old copy"):
        Ledger(filled)


def test_another_ledger_in_its_place_is_found(filled: Path, tmp_path: Path) -> None:
    other = Ledger(tmp_path / "other.db")
    for number in range(1, 6):
        reserve(other, number)
    shutil.copy(tmp_path / "other.db", filled)
    with pytest.raises(LedgerTamperedError, match="different ledgers"):
        Ledger(filled)


def test_the_database_itself_refuses_to_forget(filled: Path) -> None:
    connection = sqlite3.connect(filled)
    for statement in (
        "UPDATE ledger_entry SET steps = 1",
        "DELETE FROM ledger_entry",
        "DELETE FROM ledger_info",
    ):
        with pytest.raises(sqlite3.IntegrityError, match="append-only"):
            connection.execute(statement)
    connection.close()


def test_a_foreign_database_is_left_alone(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE somebody_elses (id INTEGER)")
    connection.commit()
    connection.close()
    with pytest.raises(LedgerTamperedError, match="does not hold a ledger"):
        Ledger(path)


def test_a_newer_format_asks_for_the_newer_program(filled: Path) -> None:
    edit(filled, "UPDATE ledger_info SET format_version = 2")
    with pytest.raises(LedgerError, match="use the version"):
        Ledger(filled)


# Crashes and company.


def test_a_witness_one_entry_behind_is_a_crash_and_is_repaired(filled: Path) -> None:
    before = read_head(head_of(filled))
    assert before is not None
    reserve(Ledger(filled), 4)
    write_head(head_of(filled), before)  # killed between the database and the witness
    ledger = Ledger(filled)
    assert len(ledger.events("breast")) == 4
    assert read_head(head_of(filled)) == ledger.verify()


def test_a_crash_during_creation_leaves_a_usable_ledger(path: Path, ledger: Ledger) -> None:
    head_of(path).unlink()  # killed before the first witness: nothing was spent yet
    reserve(Ledger(path))
    assert len(Ledger(path).events("breast")) == 1


def test_a_second_process_waits_then_is_refused(path: Path, ledger: Ledger) -> None:
    lock = path.with_name(path.name + ".lock")
    with (
        exclusive_lock(lock, held=RuntimeError()),
        pytest.raises(LedgerError, match="another process"),
    ):
        Ledger(path, lock_timeout_s=0.1)
    assert Ledger(path, lock_timeout_s=0.1).entries() == ()


def test_threads_never_lose_an_entry_or_pass_the_budget(path: Path, ledger: Ledger) -> None:
    allowed = renyi_epsilon([EVENT] * 5, DELTA, order=ORDER)
    refused: list[int] = []

    def ask(number: int) -> None:
        try:
            reserve(ledger, number, max_epsilon=allowed)
        except BudgetExceededError:
            refused.append(number)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 3
    assert len(Ledger(path).entries()) == 5


def test_a_missing_directory_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="cannot use ledger"):
        Ledger(tmp_path / "nowhere" / "ledger.db")


def test_a_ledger_that_cannot_be_written_is_one_clear_line(filled: Path) -> None:
    ledger = Ledger(filled, lock_timeout_s=0.1)
    blocker = sqlite3.connect(filled)
    blocker.execute("BEGIN EXCLUSIVE")
    with pytest.raises(LedgerError, match="locked"):
        ledger.entries()
    blocker.close()


def test_a_commit_returns_when_file_and_directory_are_on_the_disk(filled: Path) -> None:
    """EXTRA: without its directory a journal that was removed could come back and undo a commit."""
    with Ledger(filled)._store._engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 3
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "delete"


def test_only_the_owner_can_read_the_ledger(filled: Path) -> None:
    assert filled.stat().st_mode & 0o077 == 0


def test_entries_are_readable_records(filled: Path) -> None:
    first, second, *_ = Ledger(filled).entries()
    assert (first.kind, first.round, first.event) == (EntryKind.RESERVED, 1, EVENT)
    assert (second.kind, second.reservation, second.detail) == (EntryKind.COMMITTED, 1, RELEASE)
    assert second.previous_hash == first.hash
    assert first.recorded_at.utcoffset() is not None
