"""Of an export all is accepted or nothing: cut, changed, reordered, invented or another's."""

import csv
import io
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from crafts_privacy import signing
from crafts_privacy.accounting import PrivacyEvent
from crafts_privacy.errors import LedgerError, LedgerTamperedError
from crafts_privacy.ledger import Ledger, LedgerHead, Lifetime, PlanLimit
from crafts_privacy.ledger_export import parse_export, read_export, write_export
from crafts_privacy.ledger_rows import LedgerEntry, genesis_hash
from crafts_privacy.signed_head import SignedHead

EVENT = PrivacyEvent(noise_multiplier=8.0, sample_rate=0.1, steps=10)


def make_key(path: Path):
    signing.create_signing_key(path)
    return signing.load_signing_key(path)


@pytest.fixture
def key(tmp_path: Path):
    return make_key(tmp_path / "south.key")


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """Bound, a round committed, one open: four entries."""
    ledger = Ledger(tmp_path / "ledger.db")
    ledger.bind()
    for number in (1, 2):
        reservation = ledger.reserve(
            cohort="main",
            plan_hash="a" * 64,
            run_id="run-1",
            round=number,
            stage="pretraining",
            event=EVENT,
            request_hash="0" * 64,
            lifetime=Lifetime(max_epsilon=8.0, delta=1e-4, filters=("sums",)),
            plan_limit=PlanLimit(max_epsilon=8.0, delta=1e-4),
        )
        if number == 1:
            ledger.commit(reservation, "b" * 64)
    return ledger


def sign(key, head: LedgerHead) -> SignedHead:
    return SignedHead.sign(key, head, site="south", ledger="3" * 32)


@pytest.fixture
def export(tmp_path: Path, ledger: Ledger, key) -> Path:
    path = tmp_path / "south.csv"
    write_export(ledger.entries(), sign(key, ledger.verify()), path)
    return path


@pytest.fixture
def trusted(key) -> tuple[str]:
    return (signing.fingerprint(signing.public_key_of(key)),)


def test_what_a_site_exported_is_counted(export: Path, trusted, ledger: Ledger) -> None:
    read = read_export(export, trusted=trusted)
    assert read.charged == ledger.events("main") == (EVENT,) * 2
    assert (read.head.site, read.head.head) == ("south", ledger.verify())


def test_a_ledger_without_entries_can_be_exported(tmp_path: Path, key, trusted) -> None:
    head = Ledger(tmp_path / "empty.db").verify()
    write_export([], sign(key, head), tmp_path / "empty.csv")
    assert read_export(tmp_path / "empty.csv", trusted=trusted).charged == ()


def test_no_beginning_of_it_is_accepted(export: Path, trusted) -> None:
    whole = export.read_bytes()
    for length in range(len(whole)):
        with pytest.raises(LedgerError):
            parse_export(whole[:length], name="cut", trusted=trusted)


@pytest.mark.slow
def test_no_byte_of_it_can_be_changed(export: Path, trusted) -> None:
    """One bit of each, and the one that tells capitals from small letters."""
    check_flips(export, trusted, lambda index: (1 << index % 8, 0x20))


@pytest.mark.exhaustive
def test_no_byte_of_it_can_be_any_other(export: Path, trusted) -> None:
    check_flips(export, trusted, lambda _: range(1, 256))


def check_flips(export: Path, trusted, flips: Callable[[int], Iterable[int]]) -> None:
    whole = export.read_bytes()
    for index in range(len(whole)):
        for flip in flips(index):
            changed = whole[:index] + bytes([whole[index] ^ flip]) + whole[index + 1 :]
            with pytest.raises(LedgerError):
                parse_export(changed, name="changed", trusted=trusted)


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 2, 3), (0, 1, 3), (0, 2, 1, 3), (0, 0, 0, 0)])
def test_no_entry_can_be_left_out_or_moved(
    export: Path, ledger: Ledger, key, trusted, order: tuple[int, ...]
) -> None:
    entries = ledger.entries()
    write_export([entries[index] for index in order], sign(key, ledger.verify()), export)
    with pytest.raises(LedgerTamperedError, match="ask that site for a new one"):
        read_export(export, trusted=trusted)


def invented(ledger: Ledger) -> tuple[list[LedgerEntry], LedgerHead]:
    """The same ledger as if each round had cost little, with all hashes right."""
    ledger_id = ledger.verify().ledger_id
    entries, before = [], genesis_hash(ledger_id)
    for entry in ledger.entries():
        cheap = replace(entry, noise_multiplier=80.0, previous_hash=before).sealed()
        entries.append(cheap)
        before = cheap.hash
    return entries, LedgerHead(ledger_id=ledger_id, sequence=len(entries), hash=before)


def test_an_invented_ledger_is_refused_whoever_signed_it(
    export: Path, tmp_path: Path, ledger: Ledger, key, trusted
) -> None:
    entries, head = invented(ledger)
    write_export(entries, sign(key, head), export)
    assert read_export(export, trusted=trusted).charged[0].noise_multiplier == 80.0, "control"

    true, other = sign(key, ledger.verify()), sign(make_key(tmp_path / "other.key"), head)
    write_export(entries, true, export)
    with pytest.raises(LedgerTamperedError):
        read_export(export, trusted=trusted)
    write_export(entries, true.model_copy(update={"hash": head.hash}), export)
    with pytest.raises(LedgerTamperedError):
        read_export(export, trusted=trusted)
    write_export(entries, other.model_copy(update={"public_key": true.public_key}), export)
    with pytest.raises(LedgerTamperedError):
        read_export(export, trusted=trusted)
    write_export(entries, other, export)
    with pytest.raises(LedgerError, match=f"is signed by key {other.fingerprint}; ask that"):
        read_export(export, trusted=trusted)


@pytest.mark.parametrize("known", [(), ("0" * 64,), ("",)])
def test_a_key_that_nobody_vouched_for_is_refused_and_named(
    export: Path, trusted, known: tuple[str, ...]
) -> None:
    with pytest.raises(LedgerError, match=rf"south and is signed by key {trusted[0]}"):
        read_export(export, trusted=known)


@pytest.mark.parametrize(
    "changes",
    [{"steps": -1}, {"sample_rate": 2.0}, {"noise_multiplier": float("nan")}, {"steps": 10**18}],
)
def test_what_no_site_can_have_charged_is_refused_though_it_is_signed(
    export: Path, ledger: Ledger, key, trusted, changes: dict[str, Any]
) -> None:
    head = ledger.verify()
    values = asdict(ledger.entries()[1]) | {
        "sequence": 1,
        "reservation": 1,
        "previous_hash": genesis_hash(head.ledger_id),
    }
    entry = LedgerEntry(**values | changes).sealed()
    write_export([entry], sign(key, replace(head, sequence=1, hash=entry.hash)), export)
    with pytest.raises(LedgerError):
        read_export(export, trusted=trusted)


def test_an_export_of_before_has_no_head_and_is_refused(
    export: Path, ledger: Ledger, trusted
) -> None:
    text = io.StringIO()
    rows = csv.DictWriter(text, list(asdict(ledger.entries()[0])))
    rows.writeheader()
    rows.writerows(asdict(entry) for entry in ledger.entries())
    export.write_text(text.getvalue())
    with pytest.raises(LedgerError, match="no exported ledger with a signed head"):
        read_export(export, trusted=trusted)
