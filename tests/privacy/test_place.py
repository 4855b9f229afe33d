"""A ledger pays in one place: what is a copy, what is not, and who may say otherwise."""

import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from crafts_privacy import place
from crafts_privacy.accounting import PrivacyEvent
from crafts_privacy.ledger import (
    EntryKind,
    Ledger,
    LedgerError,
    LedgerPlaceError,
    Lifetime,
    PlanLimit,
    Reservation,
)

EVENT = PrivacyEvent(noise_multiplier=8.0, sample_rate=0.1, steps=10)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch) -> Path:
    """The file with the machine's id."""
    path = tmp_path / "machine-id"
    path.write_text("ab" * 16 + "\n")
    monkeypatch.setattr(place, "MACHINE_ID", path)
    return path


@pytest.fixture
def home(tmp_path: Path, machine: Path) -> Path:
    """A folder with a bound ledger that has one open reservation."""
    folder = tmp_path / "data" / "site"
    folder.mkdir(parents=True)
    ledger = Ledger(folder / "ledger.db")
    ledger.bind()
    reserve(ledger, 1)
    return folder


def reserve(ledger: Ledger, round: int, **more: object) -> Reservation:
    return ledger.reserve(
        cohort="breast",
        plan_hash="a" * 64,
        run_id="run-1",
        round=round,
        stage="pretraining",
        event=EVENT,
        request_hash="0" * 64,
        lifetime=Lifetime(max_epsilon=8.0, delta=1e-4, filters=("sums",)),
        plan_limit=PlanLimit(max_epsilon=8.0, delta=1e-4),
        **more,
    )


def copied(home: Path) -> Path:
    """As ``cp -r`` does."""
    return Path(shutil.copytree(home, home.with_name("copy"), copy_function=shutil.copyfile))


def archived(home: Path) -> Path:
    """As ``cp -a`` and ``rsync -a`` do: times and modes are kept."""
    subprocess.run(["cp", "-a", home, home.with_name("copy")], check=True)
    return home.with_name("copy")


def linked(home: Path) -> Path:
    """As ``cp -al`` does: the very same file of the ledger, in another folder."""
    return Path(shutil.copytree(home, home.with_name("copy"), copy_function=os.link))


def swapped(home: Path) -> Path:
    """The copy takes the name of the original."""
    copy = archived(home)
    home.rename(home.with_name("original"))
    return copy.rename(home)


def swapped_links(home: Path) -> Path:
    """The same, of links: path and file are what they were."""
    copy = linked(home)
    home.rename(home.with_name("original"))
    return copy.rename(home)


def renamed(home: Path) -> Path:
    return home.rename(home.with_name("elsewhere"))


def replaced(home: Path) -> Path:
    """Only the ledger comes back from a backup, as programs that rename a new file put it there."""
    path = home / "ledger.db"
    shutil.copy2(path, home / "backup")
    (home / "backup").rename(path)
    return home


COPIES = [copied, archived, linked, swapped, swapped_links, renamed, replaced]


@pytest.mark.parametrize("copy", COPIES)
def test_a_copy_pays_for_nothing(home: Path, copy: Callable[[Path], Path]) -> None:
    original = Ledger(home / "ledger.db").open_reservations()
    ledger = Ledger(copy(home) / "ledger.db")
    for pay in (
        lambda: reserve(ledger, 1),  # also not under a reservation that is open
        lambda: reserve(ledger, 2),
        lambda: ledger.commit(original[0], "b" * 64),
        ledger.bind,
        ledger.check_place,
    ):
        with pytest.raises(LedgerPlaceError, match="run crafts-client ledger move"):
            pay()
    assert ledger.events("breast") == (EVENT,), "it may be read"
    assert [entry.kind for entry in ledger.entries()] == [EntryKind.PLACED, EntryKind.RESERVED]


def test_another_machine_is_another_place(home: Path, machine: Path) -> None:
    machine.write_text("cd" * 16)
    with pytest.raises(LedgerPlaceError, match=r"another place \(another machine\)"):
        reserve(Ledger(home / "ledger.db"), 2)


def without_machine_id(home: Path) -> Path:
    """As in a container on the same volume."""
    place.MACHINE_ID.unlink()
    return home


def through_a_link(home: Path) -> Path:
    home.with_name("link").symlink_to(home)
    return home.with_name("link")


def touched(home: Path) -> Path:
    os.utime(home / "ledger.db", (0, 0))
    (home / "ledger.db").chmod(0o640)
    (home / "more").write_text("")
    return home


@pytest.mark.parametrize("use", [without_machine_id, through_a_link, touched])
def test_the_same_place_stays_the_same(home: Path, use: Callable[[Path], Path]) -> None:
    path = use(home) / "ledger.db"
    for number in range(2, 5):
        ledger = Ledger(path)
        ledger.bind()
        ledger.commit(reserve(ledger, number), "b" * 64)
    placed = [entry for entry in Ledger(path).entries() if entry.kind is EntryKind.PLACED]
    assert len(placed) == 1


def test_a_place_bound_without_a_machine_id_takes_any(home: Path, machine: Path) -> None:
    copy = archived(home)
    machine.unlink()
    Ledger(copy / "ledger.db").move()
    machine.write_text("ef" * 16)
    Ledger(copy / "ledger.db").check_place()


def test_a_move_is_an_entry_and_the_old_place_is_a_copy_then(home: Path) -> None:
    ledger = Ledger(home / "ledger.db")
    with pytest.raises(LedgerError, match="bound to this place already"):
        ledger.move()
    moved = Ledger(renamed(home) / "ledger.db")
    moved.move()
    assert moved.entries()[-1].kind is EntryKind.PLACED
    reserve(moved, 2)
    back = Ledger((home.with_name("elsewhere").rename(home)) / "ledger.db")
    with pytest.raises(LedgerPlaceError):
        reserve(back, 3)


@pytest.mark.parametrize("is_put_back", [False, True])
def test_a_charge_that_was_open_before_a_move_pays_for_nothing_after_it(
    home: Path, is_put_back: bool
) -> None:
    """The other copy may have answered under it, and its entries be hidden by who has seen them."""
    assert reserve(Ledger(home / "ledger.db"), 1).sequence == 2, "open here, it pays once more"
    moved = Ledger(renamed(home) / "ledger.db")
    if is_put_back:
        moved.mark_restored(datetime.now(UTC))
    moved.move()
    (before,) = moved.open_reservations()
    with pytest.raises(LedgerError, match="older than its last move"):
        reserve(moved, 2, unused=before)
    again = reserve(moved, 1)
    assert again.sequence > before.sequence
    assert moved.events("breast") == (EVENT, EVENT)
    assert reserve(moved, 1) == again, "from here on as before"


def test_copies_that_both_moved_have_ledgers_that_went_different_ways(home: Path) -> None:
    ledger = Ledger(home / "ledger.db")
    copy = Ledger(copied(home) / "ledger.db")
    copy.move()
    reserve(ledger, 2)
    assert ledger.lacks([copy.verify()]) == [copy.verify()]
    assert copy.lacks([ledger.verify()]) == [ledger.verify()]


def test_an_entry_about_a_place_is_no_reservation(home: Path) -> None:
    ledger = Ledger(home / "ledger.db")
    (held,) = ledger.open_reservations()
    for sequence in (0, 1, 9):
        with pytest.raises(LedgerError, match="is not in this ledger"):
            ledger.commit(replace(held, sequence=sequence), "b" * 64)


def test_a_ledger_of_before_is_bound_where_it_is_first_used(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    ledger = Ledger(tmp_path / "old" / "ledger.db")
    reserve(ledger, 1)
    assert not ledger.is_bound()
    ledger.bind()
    assert ledger.is_bound()
    with pytest.raises(LedgerPlaceError):
        reserve(Ledger(copied(tmp_path / "old") / "ledger.db"), 2)


def test_a_ledger_knows_every_head_that_it_ever_had_and_no_other(home: Path) -> None:
    ledger = Ledger(home / "ledger.db")
    empty = Ledger(home.with_name("another.db")).verify()
    heads = [ledger.verify()]
    for number in (2, 3):
        reserve(ledger, number)
        heads.append(ledger.verify())
    assert ledger.lacks(heads) == []
    earlier = Ledger(copied(home) / "ledger.db")
    assert earlier.lacks([*heads, empty]) == [empty]
