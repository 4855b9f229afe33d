"""What a ledger entry is, how entries chain, and how they lie in the database.

Each entry's hash covers its fields and the hash before it, down to the random id of the ledger, so
an edited, missing, foreign or reordered row is found by reading from the start. Database triggers
refuse UPDATE and DELETE besides, to stop accidents before they are found.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path

from sqlalchemy import MetaData, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from crafts_privacy.accounting import PrivacyEvent
from crafts_privacy.errors import LedgerTamperedError
from crafts_privacy.schema import Schema

FORMAT_VERSION = 1
RESTORE = "do not train; restore the newest intact copy of the ledger and its .head file"


class EntryKind(StrEnum):
    """What an entry says about its reservation."""

    RESERVED = "reserved"
    """Training may start; counts as spent from here on, for good."""
    CARRIED = "carried"
    """The charge of ``reservation``, of which nothing left, pays for what this entry says instead:
    from here on this entry's own number is the reservation."""
    COMMITTED = "committed"
    """The result may leave."""
    PLACED = "placed"
    """From here on the ledger pays only where ``detail`` says. About no reservation: the fields of
    one are empty or zero."""
    RESTORED = "restored"
    """The ledger was put back from a backup of the time in ``detail``. What was spent since may be
    missing before this entry, so it pays nowhere until it is placed again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """A site's part in the noise of a sum."""

    own_noise_multiplier: float
    """What is left if every other member and the coordinator work together."""
    members: int
    colluding_sites: int
    """Of the plan: so many members are not counted on."""


def released_text(release_hash: str, share: Share | None) -> str:
    """What a committed entry says."""
    if share is None:
        return release_hash
    return f"{release_hash} {json.dumps(asdict(share), sort_keys=True)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerEntry:
    """One line of the ledger. ``reservation`` is the sequence number of the reserving entry.

    Of an entry that carries a charge it is the one that held the charge before.
    """

    sequence: int
    recorded_at: datetime
    kind: EntryKind
    reservation: int
    cohort: str
    plan_hash: str
    run_id: str
    round: int
    stage: str
    noise_multiplier: float
    sample_rate: float
    steps: int
    detail: str
    """Hash of what was released, with the share of noise where there is one (``released_text``), or
    a place; while reserved, what the charge was made for and under (``lifetime.Terms``), empty
    before that was written down."""
    previous_hash: str
    hash: str = ""

    @property
    def event(self) -> PrivacyEvent:
        return PrivacyEvent(
            noise_multiplier=self.noise_multiplier, sample_rate=self.sample_rate, steps=self.steps
        )

    @property
    def release_hash(self) -> str:
        """Of a committed entry: what may leave."""
        return self.detail.partition(" ")[0]

    @property
    def share(self) -> Share | None:
        """Of a committed entry: this site's part in the noise; None where it added all of it.

        Raises:
            LedgerTamperedError: this was never written here.
        """
        _, _, text = self.detail.partition(" ")
        if self.kind is not EntryKind.COMMITTED or not text:
            return None
        try:
            return Share(**json.loads(text))
        except (ValueError, TypeError) as error:
            raise LedgerTamperedError(
                f"ledger entry {self.sequence}: {error}; {RESTORE}"
            ) from error

    def computed_hash(self) -> str:
        """SHA-256 over every field but the hash itself, the previous hash among them."""
        values = asdict(self) | {"recorded_at": self.recorded_at.isoformat()}
        del values["hash"]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    def sealed(self) -> "LedgerEntry":
        return replace(self, hash=self.computed_hash())


def genesis_hash(ledger_id: str) -> str:
    """The hash before the first entry."""
    return hashlib.sha256(f"crafts-ledger-{FORMAT_VERSION}:{ledger_id}".encode()).hexdigest()


def check_chain(ledger_id: str, entries: Sequence[LedgerEntry]) -> None:
    """Recompute the chain from the start.

    Raises:
        LedgerTamperedError: names the first entry that is missing, edited or out of place.
    """
    expected = genesis_hash(ledger_id)
    for sequence, entry in enumerate(entries, start=1):
        if entry.sequence != sequence:
            raise LedgerTamperedError(
                f"ledger entry {sequence} is missing (found {entry.sequence} there); {RESTORE}"
            )
        if entry.previous_hash != expected or entry.hash != entry.computed_hash():
            raise LedgerTamperedError(
                f"ledger entry {sequence} was edited or comes from another ledger; {RESTORE}"
            )
        expected = entry.hash


class Base(DeclarativeBase):
    """Tables of one ledger file."""

    metadata = MetaData(
        naming_convention={"pk": "pk_%(table_name)s", "uq": "uq_%(table_name)s_%(column_0_name)s"}
    )


class LedgerInfo(Base):
    """One row: which ledger this is."""

    __tablename__ = "ledger_info"

    ledger_id: Mapped[str] = mapped_column(primary_key=True)
    format_version: Mapped[int]


class LedgerRow(Base):
    """One :class:`LedgerEntry`; ``recorded_at`` is UTC, which SQLite stores without a zone."""

    __tablename__ = "ledger_entry"
    __table_args__ = (UniqueConstraint("hash"),)

    sequence: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    recorded_at: Mapped[datetime]
    kind: Mapped[str]
    reservation: Mapped[int]
    cohort: Mapped[str]
    plan_hash: Mapped[str]
    run_id: Mapped[str]
    round: Mapped[int]
    stage: Mapped[str]
    noise_multiplier: Mapped[float]
    sample_rate: Mapped[float]
    steps: Mapped[int]
    detail: Mapped[str]
    previous_hash: Mapped[str]
    hash: Mapped[str]

    @classmethod
    def of(cls, entry: LedgerEntry) -> "LedgerRow":
        values = asdict(entry)
        return cls(**values | {"recorded_at": entry.recorded_at.replace(tzinfo=None)})

    def to_entry(self) -> LedgerEntry:
        """The value again.

        Raises:
            LedgerTamperedError: a column holds what was never written there.
        """
        values = {column.key: getattr(self, column.key) for column in LedgerRow.__table__.columns}
        try:
            values["kind"] = EntryKind(self.kind)
            values["recorded_at"] = self.recorded_at.replace(tzinfo=UTC)
            return LedgerEntry(**values)
        except (ValueError, AttributeError) as error:
            raise LedgerTamperedError(
                f"ledger entry {self.sequence} was edited: {error}; {RESTORE}"
            ) from error


SCHEMA = Schema(metadata=Base.metadata, folder=Path(__file__).parent / "ledger_revisions")
