"""What the coordinator did, for auditors: JSON lines, each with the hash of the one before.

An edited, inserted or removed line breaks the chain. That the newest lines are missing the file
cannot show by itself; their number is a metric (``crafts_audit_entries``), and whoever ships the
file elsewhere has the rest. Nothing private reaches the coordinator, so nothing private is here.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path

from crafts_core.durable import append_line, exclusive_lock, newest_lines
from crafts_server.errors import AuditLogError

_START = "0" * 64


class Event(StrEnum):
    """What is worth a line."""

    STARTED = "coordinator started"
    ENDED = "coordinator ended"
    INVITED = "site invited"
    ENROLLED = "site enrolled"
    RESIZED = "patients of a site agreed"
    REVOKED = "site revoked"
    LEFT = "site left"
    SIGNED = "plan signed"
    RENEWED = "roster of a plan renewed"
    QUEUED = "plan queued"
    STOPPED = "plan stopped"
    COMMITTED = "round committed"
    REFUSED = "update refused"
    ROSE = "weight of a site rose"
    SHORT = "round without a result"
    FINISHED = "plan finished"
    FAILED = "plan failed"
    EXPORTED = "generator exported"
    RESTORED = "home put back from a backup"


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One line."""

    number: int
    at: str
    event: str
    facts: dict[str, object]
    previous: str
    hash: str


class AuditLog:
    """The file; several processes may write to it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, event: Event, **facts: object) -> None:
        """Add a line, durably.

        Raises:
            AuditLogError: the newest line is not one of ours, or somebody holds the file.
        """
        held = AuditLogError(f"{self._path} is in use; try again")
        with exclusive_lock(self._path.with_suffix(".lock"), held=held, timeout_s=30.0):
            self._drop_torn_line()
            newest = self._newest()
            values: dict[str, object] = {
                "number": newest.number + 1 if newest else 1,
                "at": datetime.now(UTC).isoformat(timespec="seconds"),
                "event": str(event),
                "facts": facts,
                "previous": newest.hash if newest else _START,
            }
            append_line(self._path, json.dumps(values | {"hash": _hashed(values)}), mode=0o600)

    def recent(self, most: int) -> list[Entry]:
        """The newest entries, oldest first, each checked against the one before it.

        Raises:
            AuditLogError: one of them is not as it was written.
        """
        entries: list[Entry] = []
        for line in self._end(most)[0]:
            entry = _parsed(line)
            previous = entries[-1].hash if entries else entry and entry.previous
            if entry is None or entry.previous != previous:
                raise AuditLogError(
                    f"{self._path}: one of the newest lines was altered; run crafts-server log "
                    "verify"
                )
            entries.append(entry)
        return entries

    def verify(self) -> list[Entry]:
        """Every entry, oldest first.

        Raises:
            AuditLogError: names the first line that is not as it was written.
        """
        entries: list[Entry] = []
        previous = _START
        for number, line in enumerate(self._lines(), start=1):
            entry = _parsed(line)
            if entry is None or (entry.number, entry.previous) != (number, previous):
                raise AuditLogError(
                    f"{self._path}: line {number} is not what was written there; "
                    "compare with a copy"
                )
            entries.append(entry)
            previous = entry.hash
        return entries

    @property
    def num_entries(self) -> int:
        """How many lines there are; the outside witness of the file's end."""
        newest = self._newest()
        return newest.number if newest else 0

    def _drop_torn_line(self) -> None:
        """What a crash left of a line that nobody was told is there."""
        if torn := self._end(1)[1]:
            os.truncate(self._path, self._path.stat().st_size - torn)

    def _newest(self) -> Entry | None:
        lines, _ = self._end(1)
        if not lines:
            return None
        newest = _parsed(lines[0])
        if newest is None:
            raise AuditLogError(f"{self._path}: the last line was altered; compare with a copy")
        return newest

    def _end(self, most: int) -> tuple[list[bytes], int]:
        """What a look and a write need: they are as quick after years as on the first day."""
        try:
            return newest_lines(self._path, most)
        except OSError as error:
            raise AuditLogError(f"cannot read {self._path}: {error}") from error

    def _lines(self) -> list[str]:
        """The whole lines."""
        try:
            return self._path.read_text(encoding="utf-8").split("\n")[:-1]
        except FileNotFoundError:
            return []
        except (OSError, UnicodeDecodeError) as error:
            raise AuditLogError(f"cannot read {self._path}: {error}") from error


def _parsed(line: str | bytes) -> Entry | None:
    """The entry, if its hash is of its content."""
    try:
        values = json.loads(line)
        stated = values.pop("hash")
        return Entry(**values, hash=stated) if stated == _hashed(values) else None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _hashed(values: dict[str, object]) -> str:
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
