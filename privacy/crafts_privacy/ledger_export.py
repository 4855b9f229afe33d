"""A ledger as a file for a second party: the site's signed head, then every entry as CSV.

The file is accepted as a whole or not at all. Its head is signed by a key that the reader must know
beforehand; the entries must lead, from the first one on, to exactly that head; and the file must be
byte for byte what those entries and that head are written as. So nothing can be cut off, left out,
changed, put in another order or made up by anybody but the site itself. What the reader cannot know
is what the site has spent since: the head says when it was signed.
"""

import csv
import io
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from pathlib import Path

from crafts_core.durable import write_file
from crafts_privacy.accounting import PrivacyEvent
from crafts_privacy.charges import SumCharge, charges_of_sums
from crafts_privacy.errors import LedgerError, LedgerTamperedError
from crafts_privacy.ledger_rows import EntryKind, LedgerEntry, check_chain, genesis_hash
from crafts_privacy.signed_head import SignedHead
from crafts_privacy.signing import SignatureError

_COLUMNS = [field.name for field in fields(LedgerEntry)]
_MOST_STEPS = 1_000_000
"""In a round: what the accountant is asked for by another site's file."""
_HEAD = "# crafts ledger export 2: "


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerExport:
    """An export that was checked: whose, until when, and what it charged."""

    head: SignedHead
    charged: tuple[PrivacyEvent, ...]
    """What was reserved, in all cohorts."""
    of_sums: tuple[SumCharge, ...]
    """The charges among these for steps over several sites."""


def write_export(entries: Sequence[LedgerEntry], head: SignedHead, path: Path) -> None:
    """Write all of a ledger's entries, oldest first, and the head that they lead to."""
    write_file(path, _written(entries, head))


def read_export(path: Path, *, trusted: Collection[str]) -> LedgerExport:
    """Read an export and check all of it, as ``parse_export`` does.

    Raises:
        LedgerError: as there, or the file cannot be read.
    """
    return parse_export(_content(path), name=str(path), trusted=trusted)


def read_entries(
    path: Path, *, trusted: Collection[str]
) -> tuple[SignedHead, tuple[LedgerEntry, ...]]:
    """The head of an export and every entry, checked the same way.

    Raises:
        LedgerError: as there.
    """
    return _accepted(_content(path), name=str(path), trusted=trusted)


def parse_export(content: bytes, *, name: str, trusted: Collection[str]) -> LedgerExport:
    """Accept a whole export, byte for byte.

    Args:
        content: Of the file.
        name: Of the file, for what is said about it.
        trusted: Fingerprints of keys that are known to be the exporting sites' own.

    Raises:
        LedgerError: this is no export, or it is signed by a key that is not trusted.
        LedgerTamperedError: it is not what that site exported.
    """
    head, entries = _accepted(content, name=name, trusted=trusted)
    reserved = tuple(entry for entry in entries if entry.kind is EntryKind.RESERVED)
    try:
        of_sums = tuple(charges_of_sums(entries, reserved))
        charged = tuple(entry.event for entry in reserved)
        if any(event.steps > _MOST_STEPS for event in charged):
            raise ValueError("no site takes so many steps in a round")
    except (ValueError, KeyError, TypeError, LedgerError) as error:
        raise _no_export(name) from error
    return LedgerExport(head=head, charged=charged, of_sums=of_sums)


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise LedgerError(f"cannot read {path}: {error.strerror}") from error


def _accepted(
    content: bytes, *, name: str, trusted: Collection[str]
) -> tuple[SignedHead, tuple[LedgerEntry, ...]]:
    """The head that a trusted key signed, and the entries that lead to it."""
    try:
        first, _, table = content.decode("utf-8").partition("\n")
        if not first.startswith(_HEAD):
            raise ValueError("no signed head")
        head = SignedHead.model_validate_json(first.removeprefix(_HEAD))
        entries = tuple(_entry(row) for row in csv.DictReader(io.StringIO(table)))
        fingerprint = head.fingerprint
    except (ValueError, KeyError, TypeError, csv.Error, SignatureError) as error:
        raise _no_export(name) from error
    if fingerprint not in trusted:
        raise LedgerError(
            f"{name} says that it is of {head.site} and is signed by key {fingerprint}; ask that "
            "hospital, by telephone, what its own ledger export prints as key, and give that with "
            "--also-key"
        )
    try:
        head.check()
        check_chain(head.ledger_id, entries)
    except (SignatureError, LedgerTamperedError) as error:
        raise _changed(name) from error
    end = entries[-1].hash if entries else genesis_hash(head.ledger_id)
    whole = (len(entries), end) == (head.sequence, head.hash)
    if not whole or _written(entries, head).encode() != content:
        raise _changed(name)
    return head, entries


def _no_export(name: str) -> LedgerError:
    return LedgerError(
        f"{name} is no exported ledger with a signed head; ask for one made with crafts-client "
        "ledger export"
    )


def _changed(name: str) -> LedgerTamperedError:
    return LedgerTamperedError(f"{name} is not what was exported; ask that site for a new one")


def _written(entries: Sequence[LedgerEntry], head: SignedHead) -> str:
    text = io.StringIO()
    text.write(f"{_HEAD}{head.model_dump_json()}\n")
    rows = csv.DictWriter(text, _COLUMNS)
    rows.writeheader()
    rows.writerows(asdict(entry) for entry in entries)
    return text.getvalue()


def _entry(row: dict[str, str]) -> LedgerEntry:
    if set(row) != set(_COLUMNS):
        raise ValueError("other columns")
    return LedgerEntry(
        sequence=int(row["sequence"]),
        recorded_at=datetime.fromisoformat(row["recorded_at"]),
        kind=EntryKind(row["kind"]),
        reservation=int(row["reservation"]),
        cohort=row["cohort"],
        plan_hash=row["plan_hash"],
        run_id=row["run_id"],
        round=int(row["round"]),
        stage=row["stage"],
        noise_multiplier=float(row["noise_multiplier"]),
        sample_rate=float(row["sample_rate"]),
        steps=int(row["steps"]),
        detail=row["detail"],
        previous_hash=row["previous_hash"],
        hash=row["hash"],
    )
