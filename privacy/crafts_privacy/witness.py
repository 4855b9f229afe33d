"""The ledger's head in a second file, and the lock that one writer holds.

The chain inside the database cannot show that its end is missing; the witness can. It is written
after the database has committed, so a crash in between leaves it exactly one entry behind.
"""

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from crafts_core.durable import write_file
from crafts_privacy.errors import LedgerError, LedgerTamperedError

_POLL_S = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerHead:
    """Which ledger, how many entries, and the hash of the last. Safe to show to anybody."""

    ledger_id: str
    sequence: int
    hash: str


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


@contextmanager
def exclusive_lock(path: Path, timeout_s: float) -> Iterator[None]:
    """Hold an advisory lock on ``path``; the kernel frees it when the process dies.

    Raises:
        LedgerError: another process or thread held it for the whole time.
    """
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
    try:
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() >= deadline:
                    raise LedgerError(
                        f"another process has held the ledger for {timeout_s:g} s ({path}); "
                        "wait for it to finish, then try again"
                    ) from error
                time.sleep(_POLL_S)
        yield
    finally:
        os.close(descriptor)
