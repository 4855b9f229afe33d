"""Where ledger entries lie on disk: an append-only SQLite file, its witness, and their lock.

Every transaction takes the lock, checks the whole chain and the witness, and only then yields.
Writing goes database first, witness second; a crash in between leaves the witness exactly one
entry behind, which the next transaction repairs. A witness that is *ahead* means that entries were
lost after they were acknowledged, and nothing is repaired then.
"""

import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, NullPool, create_engine, event, inspect, select
from sqlalchemy.exc import DatabaseError, OperationalError
from sqlalchemy.orm import Session

from crafts_core.durable import exclusive_lock, sync
from crafts_privacy.errors import LedgerError, LedgerTamperedError, SchemaError
from crafts_privacy.ledger_rows import (
    FORMAT_VERSION,
    RESTORE,
    SCHEMA,
    LedgerEntry,
    LedgerInfo,
    LedgerRow,
    check_chain,
    genesis_hash,
)
from crafts_privacy.schema import VERSION_TABLE, Standing, lacking, standing, upgrade
from crafts_privacy.witness import LedgerHead, head_path, read_head, write_head


class LedgerTransaction:
    """All entries, verified, while the lock is held; at most one more can be appended."""

    def __init__(
        self, session: Session, ledger_id: str, entries: list[LedgerEntry], head_path: Path
    ) -> None:
        self.entries = entries
        self._session = session
        self._ledger_id = ledger_id
        self._head_path = head_path

    @property
    def head(self) -> LedgerHead:
        """The last entry's place and hash; of an empty ledger what its first entry will name."""
        if not self.entries:
            return LedgerHead(
                ledger_id=self._ledger_id, sequence=0, hash=genesis_hash(self._ledger_id)
            )
        last = self.entries[-1]
        return LedgerHead(ledger_id=self._ledger_id, sequence=last.sequence, hash=last.hash)

    def append(self, entry: LedgerEntry) -> None:
        """Seal the entry behind the head and make it durable, then move the witness."""
        head = self.head
        sealed = replace(entry, sequence=head.sequence + 1, previous_hash=head.hash).sealed()
        self._session.add(LedgerRow.of(sealed))
        self._session.commit()
        self.entries.append(sealed)
        write_head(self._head_path, self.head)

    def check_file(self) -> None:
        """SQLite's own check of pages and constraints.

        Raises:
            LedgerTamperedError: with what SQLite found.
        """
        (answer,) = self._session.connection().exec_driver_sql("PRAGMA quick_check(1)").one()
        if answer != "ok":
            raise LedgerTamperedError(f"the ledger file is damaged: {answer}; {RESTORE}")


class LedgerStore:
    """The files of one ledger: ``NAME``, ``NAME.head`` and ``NAME.lock``."""

    def __init__(self, path: Path, *, lock_timeout_s: float, may_upgrade: bool) -> None:
        self._path = path
        self._may_upgrade = may_upgrade
        self._head_path = head_path(path)
        self._lock_path = path.with_name(path.name + ".lock")
        self._lock_timeout_s = lock_timeout_s
        self._engine = _engine(path, lock_timeout_s)

    @property
    def files(self) -> tuple[Path, Path]:
        """The database and its witness."""
        return self._path, self._head_path

    @contextmanager
    def transaction(self) -> Iterator[LedgerTransaction]:
        """Lock, verify, yield.

        Raises:
            LedgerTamperedError: the files are not what was written.
            LedgerError: somebody else holds the lock, or the disk refuses.
        """
        held = LedgerError(
            f"another process has held the ledger for {self._lock_timeout_s:g} s "
            f"({self._lock_path}); wait for it to finish, then try again"
        )
        try:
            with (
                exclusive_lock(self._lock_path, held=held, timeout_s=self._lock_timeout_s),
                Session(self._engine) as session,
            ):
                yield self._verified(session)
        except OperationalError as error:
            raise LedgerError(
                f"cannot use ledger {self._path}: {error.orig}; "
                "check the disk and the file's permissions, then try again"
            ) from error
        except DatabaseError as error:
            raise LedgerTamperedError(
                f"ledger {self._path} is damaged: {error.orig}; {RESTORE}"
            ) from error
        except OSError as error:
            raise LedgerError(f"cannot use ledger {self._path}: {error}") from error

    def _verified(self, session: Session) -> LedgerTransaction:
        witness = read_head(self._head_path)
        if not self._tables(session):
            self._create(session, witness)
        else:
            self._check_tables(session)
        ledger_id = self._read_id(session)
        entries = _read_entries(session)
        check_chain(ledger_id, entries)
        transaction = LedgerTransaction(session, ledger_id, entries, self._head_path)
        self._check_witness(witness, transaction)
        return transaction

    def _tables(self, session: Session) -> set[str]:
        """Names of the tables; none also after a crash during creation, which SQLite undoes."""
        if not self._path.exists():
            return set()
        return set(inspect(session.connection()).get_table_names())

    def begin_with(self, ledger_id: str, entries: Sequence[LedgerEntry]) -> None:
        """A new file with entries that another one had; they were checked.

        Raises:
            LedgerError: there is a ledger already.
        """
        if self._path.exists():
            raise LedgerError(f"{self._path} is there already")
        with Session(self._engine) as session:
            self._create(session, read_head(self._head_path), ledger_id)
            session.add_all(LedgerRow.of(entry) for entry in entries)
            session.commit()
            write_head(
                self._head_path,
                LedgerTransaction(session, ledger_id, list(entries), self._head_path).head,
            )

    def _create(
        self, session: Session, witness: LedgerHead | None, ledger_id: str | None = None
    ) -> None:
        """Tables, triggers and identity in one transaction; the witness follows."""
        if witness is not None:
            raise LedgerTamperedError(
                f"ledger {self._path} is missing or empty, but its witness knows "
                f"{witness.sequence} entries; {RESTORE}"
            )
        os.close(os.open(self._path, os.O_CREAT | os.O_RDWR, 0o600))
        upgrade(session.connection(), SCHEMA)
        ledger_id = ledger_id or uuid.uuid4().hex
        session.add(LedgerInfo(ledger_id=ledger_id, format_version=FORMAT_VERSION))
        session.commit()
        sync(self._path.parent)

    def _check_tables(self, session: Session) -> None:
        """They are a ledger's, and of this version; those of an older one are brought up to it."""
        found = standing(session.connection(), SCHEMA)
        if found is Standing.NEWER:
            raise LedgerError(
                f"ledger {self._path} was written by a newer crafts-federated; update this program"
            )
        old = found in (Standing.UNNUMBERED, Standing.OLDER)
        if found is Standing.UNNUMBERED:
            self._check_names(session)  # what a ledger has lost is not made anew
        if old and self._may_upgrade:
            self._upgrade(session)
        elif old and (lacks := lacking(session.connection(), SCHEMA)):
            raise LedgerError(
                f"ledger {self._path} is of an older crafts-federated and has no {lacks[0]}; "
                "crafts-client join brings it up to date (stop an older one before)"
            )
        self._check_names(session)

    def _check_names(self, session: Session) -> None:
        if self._tables(session) - {VERSION_TABLE} != set(SCHEMA.metadata.tables):
            raise LedgerTamperedError(f"{self._path} does not hold a ledger; {RESTORE}")

    def _upgrade(self, session: Session) -> None:
        try:
            upgrade(session.connection(), SCHEMA)
        except SchemaError as error:
            raise LedgerTamperedError(
                f"ledger {self._path} has other tables than were made ({error}); {RESTORE}"
            ) from error
        session.commit()

    def _read_id(self, session: Session) -> str:
        info = session.scalars(select(LedgerInfo)).all()
        if len(info) != 1:
            raise LedgerTamperedError(f"ledger {self._path} lost its identity; {RESTORE}")
        if info[0].format_version != FORMAT_VERSION:
            raise LedgerError(
                f"ledger {self._path} has format {info[0].format_version}, expected "
                f"{FORMAT_VERSION}; use the version of crafts-federated that wrote it"
            )
        return info[0].ledger_id

    def _check_witness(self, witness: LedgerHead | None, transaction: LedgerTransaction) -> None:
        """Accept a witness at the head or one entry behind it, and bring it up to date."""
        head = transaction.head
        if witness == head:
            return
        if witness is None and head.sequence > 0:
            raise LedgerTamperedError(
                f"the witness {self._head_path} is missing; put it back (a ledger moves together "
                "with its .head file)"
            )
        if witness is not None and witness != _head_before(transaction.entries, head):
            raise LedgerTamperedError(_disagreement(witness, head))
        write_head(self._head_path, head)


def _read_entries(session: Session) -> list[LedgerEntry]:
    try:
        rows = session.scalars(select(LedgerRow).order_by(LedgerRow.sequence)).all()
    except (ValueError, TypeError) as error:
        raise LedgerTamperedError(f"a ledger entry was edited: {error}; {RESTORE}") from error
    return [row.to_entry() for row in rows]


def _head_before(entries: list[LedgerEntry], head: LedgerHead) -> LedgerHead | None:
    if not entries:
        return None
    return replace(head, sequence=head.sequence - 1, hash=entries[-1].previous_hash)


def _disagreement(witness: LedgerHead, head: LedgerHead) -> str:
    if witness.ledger_id != head.ledger_id:
        return f"the ledger and its witness belong to different ledgers; {RESTORE}"
    if witness.sequence > head.sequence:
        return (
            f"the ledger ends at entry {head.sequence} but entry {witness.sequence} was written: "
            f"an old copy was put back or the last entries were removed; {RESTORE}"
        )
    return (
        f"the ledger holds entry {head.sequence} but its witness stopped at {witness.sequence}: "
        f"the witness is an old copy or the entries were not written by this program; {RESTORE}"
    )


def _engine(path: Path, busy_timeout_s: float) -> Engine:
    """SQLite with real transactions, each commit synced together with its directory."""
    engine = create_engine(
        URL.create("sqlite", database=str(path)),
        poolclass=NullPool,
        connect_args={"timeout": busy_timeout_s},
    )

    @event.listens_for(engine, "connect")
    def _configure(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # BEGIN is ours; the driver's is late and skips DDL
        connection.execute("PRAGMA synchronous = EXTRA")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    return engine
