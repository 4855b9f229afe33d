"""What the coordinator did, for auditors: JSON lines, each with the hash of the one before.

An edited, inserted or removed line breaks the chain. That the newest lines are missing the file
cannot show by itself; their number is a metric (``crafts_audit_entries``), and whoever ships the
file elsewhere has the rest. Nothing private reaches the coordinator, so nothing private is here.
"""

import hashlib
import json
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path

from crafts_core.chained_log import START, Chain, ChainedLog
from crafts_core.durable import exclusive_lock
from crafts_server.errors import AuditLogError


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
    POOLED = "public pool added"
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
        self._log = ChainedLog(path, _parsed)

    def write(self, event: Event, **facts: object) -> None:
        """Add a line, durably.

        Raises:
            AuditLogError: the newest line is not one of ours, or somebody holds the file.
        """
        held = AuditLogError(f"{self._path} is in use; try again")
        with exclusive_lock(self._path.with_suffix(".lock"), held=held, timeout_s=30.0):
            newest = self._newest()
            values: dict[str, object] = {
                "number": newest.number + 1 if newest else 1,
                "at": datetime.now(UTC).isoformat(timespec="seconds"),
                "event": str(event),
                "facts": facts,
                "previous": newest.hash if newest else START,
            }
            self._log.append([json.dumps(values | {"hash": _hashed(values)})], mode=0o600)

    def recent(self, most: int) -> list[Entry]:
        """The newest entries, oldest first, each checked against the one before it.

        Raises:
            AuditLogError: one of them is not as it was written.
        """
        chain = self._end(most)
        if chain.broken_at is not None:
            raise AuditLogError(
                f"{self._path}: one of the newest lines was altered; run crafts-server log verify"
            )
        return list(chain.lines)

    def verify(self) -> list[Entry]:
        """Every entry, oldest first.

        Raises:
            AuditLogError: names the first line that is not as it was written.
        """
        try:
            chain = self._log.read()
        except OSError as error:
            raise AuditLogError(f"cannot read {self._path}: {error}") from error
        if chain.broken_at is not None:
            raise AuditLogError(
                f"{self._path}: line {chain.broken_at} is not what was written there; "
                "compare with a copy"
            )
        return list(chain.lines)

    @property
    def num_entries(self) -> int:
        """How many lines there are; the outside witness of the file's end."""
        newest = self._newest()
        return newest.number if newest else 0

    def _newest(self) -> Entry | None:
        chain = self._end(1)
        if chain.broken_at is not None:
            raise AuditLogError(f"{self._path}: the last line was altered; compare with a copy")
        return chain.lines[-1] if chain.lines else None

    def _end(self, most: int) -> Chain[Entry]:
        """What a look and a write need: they are as quick after years as on the first day."""
        try:
            return self._log.newest(most)
        except OSError as error:
            raise AuditLogError(f"cannot read {self._path}: {error}") from error


def _parsed(line: bytes) -> Entry | None:
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
