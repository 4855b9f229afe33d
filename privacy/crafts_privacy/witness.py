"""The ledger's head in a second file.

The chain inside the database cannot show that its end is missing; the witness can. It is written
after the database has committed, so a crash in between leaves it exactly one entry behind.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from crafts_core.durable import write_file
from crafts_privacy.errors import LedgerTamperedError


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerHead:
    """Which ledger, how many entries, and the hash of the last. Safe to show to anybody."""

    ledger_id: str
    sequence: int
    hash: str


def head_path(ledger_path: Path) -> Path:
    """Where the witness of a ledger lies."""
    return ledger_path.with_name(ledger_path.name + ".head")


def read_head(path: Path) -> LedgerHead | None:
    """The witnessed head; ``None`` if there is no witness file.

    Raises:
        LedgerTamperedError: the file is there but is not a head.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return LedgerHead(
            ledger_id=str(values["ledger_id"]),
            sequence=int(values["sequence"]),
            hash=str(values["hash"]),
        )
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise LedgerTamperedError(
            f"{path} is damaged; restore the newest copy of it together with the ledger"
        ) from error


def write_head(path: Path, head: LedgerHead) -> None:
    """Replace the witness atomically and durably."""
    write_file(path, json.dumps(asdict(head)))
