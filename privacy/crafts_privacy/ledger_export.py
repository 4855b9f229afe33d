"""A ledger as a CSV file for a second party: every entry with its hashes, and back."""

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, fields
from datetime import datetime
from pathlib import Path

from crafts_core.durable import write_file
from crafts_privacy.accounting import PrivacyEvent
from crafts_privacy.errors import LedgerError, LedgerTamperedError
from crafts_privacy.ledger_rows import EntryKind, LedgerEntry

_COLUMNS = [field.name for field in fields(LedgerEntry)]


def write_export(entries: Sequence[LedgerEntry], path: Path) -> None:
    """Write all of a ledger's entries, oldest first."""
    text = io.StringIO()
    rows = csv.DictWriter(text, _COLUMNS)
    rows.writeheader()
    rows.writerows(asdict(entry) for entry in entries)
    write_file(path, text.getvalue())


def read_export(path: Path) -> tuple[LedgerEntry, ...]:
    """Read an export and check every entry and that none is missing between the first and last.

    Raises:
        LedgerError: the file is no export.
        LedgerTamperedError: an entry was changed, or one is missing.
    """
    try:
        rows = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))
        entries = tuple(_entry(row) for row in rows)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LedgerError(
            f"{path} is no exported ledger; make one with crafts-client ledger export"
        ) from error
    for index, entry in enumerate(entries):
        follows = index == 0 or entry.previous_hash == entries[index - 1].hash
        if entry.sequence != index + 1 or not follows or entry.computed_hash() != entry.hash:
            raise LedgerTamperedError(
                f"{path}: entry {index + 1} is not what was exported; ask that site for a new one"
            )
    return entries


def charged(entries: Sequence[LedgerEntry]) -> tuple[PrivacyEvent, ...]:
    """What was reserved, in all cohorts."""
    return tuple(entry.event for entry in entries if entry.kind is EntryKind.RESERVED)


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
