"""Tables are brought to what the program works with, wholly or not at all."""

import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Column, Connection, Integer, MetaData, String, Table, create_engine, text

from crafts_privacy import ledger_store
from crafts_privacy.accounting import PrivacyEvent
from crafts_privacy.errors import SchemaError
from crafts_privacy.ledger import Ledger, LedgerError, LedgerTamperedError, Lifetime, PlanLimit
from crafts_privacy.ledger_rows import SCHEMA
from crafts_privacy.schema import VERSION_TABLE, Schema, Standing, lacking, standing, upgrade

BEFORE = Path(__file__).parents[1] / "support" / "before_revisions"

FIRST = """
import sqlalchemy as sa

revision, down_revision = "0001", None


def upgrade(op):
    op.create_table("bird", sa.Column("name", sa.String(9), primary_key=True), if_not_exists=True)
"""
SECOND = """
import sqlalchemy as sa

revision, down_revision = "0002", "0001"


def upgrade(op):
    op.add_column("bird", sa.Column("eggs", sa.Integer()))
"""


@pytest.fixture
def birds(tmp_path: Path) -> Schema:
    """A program that has learned to count eggs."""
    folder = tmp_path / "revisions"
    folder.mkdir()
    (folder / "r0001_initial.py").write_text(FIRST)
    (folder / "r0002_eggs.py").write_text(SECOND)
    metadata = MetaData()
    Table("bird", metadata, Column("name", String(9), primary_key=True), Column("eggs", Integer))
    return Schema(metadata=metadata, folder=folder)


@pytest.fixture
def connection() -> Iterator[Connection]:
    """With transactions that cover tables, too."""
    engine = create_engine("sqlite://", isolation_level=None)
    with engine.connect() as connection:
        connection.exec_driver_sql("BEGIN IMMEDIATE")
        yield connection
    engine.dispose()


def test_each_standing_leads_to_the_current_one(connection: Connection, birds: Schema) -> None:
    assert standing(connection, birds) is Standing.EMPTY
    upgrade(connection, birds)
    assert standing(connection, birds) is Standing.CURRENT
    connection.execute(text("ALTER TABLE bird DROP COLUMN eggs"))
    connection.execute(text("INSERT INTO bird VALUES ('wren')"))
    connection.execute(text("UPDATE crafts_revision SET version_num = '0001'"))
    assert standing(connection, birds) is Standing.OLDER
    assert lacking(connection, birds) == ["bird.eggs"]
    upgrade(connection, birds)
    assert lacking(connection, birds) == []
    connection.execute(text("ALTER TABLE bird DROP COLUMN eggs"))
    connection.execute(text("DROP TABLE crafts_revision"))
    assert standing(connection, birds) is Standing.UNNUMBERED
    upgrade(connection, birds)
    assert standing(connection, birds) is Standing.CURRENT
    assert connection.execute(text("SELECT * FROM bird")).all() == [("wren", None)]
    connection.execute(text("UPDATE crafts_revision SET version_num = '0003'"))
    assert standing(connection, birds) is Standing.NEWER


def test_tables_that_no_revision_leads_from_are_refused(
    connection: Connection, birds: Schema
) -> None:
    connection.execute(text("CREATE TABLE bird (name VARCHAR(9) NOT NULL PRIMARY KEY, song TEXT)"))
    with pytest.raises(SchemaError, match="remove_column bird song"):
        upgrade(connection, birds)


def test_tables_of_others_in_the_database_are_nobodys_business(
    connection: Connection, birds: Schema
) -> None:
    connection.execute(text("CREATE TABLE fish (name TEXT)"))
    assert standing(connection, birds) is Standing.EMPTY
    upgrade(connection, birds)
    assert standing(connection, birds) is Standing.CURRENT


# The ledger.


@pytest.fixture
def old_ledger(tmp_path: Path) -> Path:
    """Of the program before: two rounds, one committed."""
    path = tmp_path / "ledger.db"
    connection = sqlite3.connect(path)
    connection.executescript((BEFORE / "ledger.sql").read_text())
    connection.close()
    shutil.copy(BEFORE / "ledger.db.head", tmp_path)
    return path


def query(path: Path, statement: str) -> list[tuple[object, ...]]:
    connection = sqlite3.connect(path)
    with connection:
        rows = connection.execute(statement).fetchall()
    connection.close()
    return rows


def differences(path: Path) -> list[object]:
    engine = create_engine(f"sqlite:///{path}")
    with engine.connect() as connection:
        found = compare_metadata(
            MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE}),
            SCHEMA.metadata,
        )
    engine.dispose()
    return found


def guards(path: Path) -> list[tuple[object, ...]]:
    return query(path, "SELECT name, sql FROM sqlite_master WHERE type = 'trigger' ORDER BY name")


def spend(ledger: Ledger) -> None:
    ledger.reserve(
        cohort="breast",
        plan_hash="d" * 64,
        run_id="run-2",
        round=1,
        stage="pretraining",
        event=PrivacyEvent(noise_multiplier=8.0, sample_rate=0.1, steps=10),
        request_hash="c" * 64,
        lifetime=Lifetime(max_epsilon=8.0, delta=1e-4, filters=("renyi:8",)),
        plan_limit=PlanLimit(max_epsilon=8.0, delta=1e-4),
    )


def test_a_new_ledger_has_the_mapped_tables_and_the_guards_of_old(
    tmp_path: Path, old_ledger: Path
) -> None:
    Ledger(tmp_path / "new.db")
    assert differences(tmp_path / "new.db") == []
    assert guards(tmp_path / "new.db") == guards(old_ledger)
    assert query(tmp_path / "new.db", "SELECT * FROM crafts_revision") == [("0001",)]


def test_who_only_looks_leaves_an_old_ledger_as_it_is(old_ledger: Path) -> None:
    before = old_ledger.read_bytes()
    ledger = Ledger(old_ledger)
    assert (ledger.verify().sequence, len(ledger.events("breast"))) == (3, 2)
    assert old_ledger.read_bytes() == before


def test_an_old_ledger_is_brought_up_with_every_entry(old_ledger: Path) -> None:
    entries, old_guards = Ledger(old_ledger).entries(), guards(old_ledger)
    ledger = Ledger(old_ledger, may_upgrade=True)
    assert ledger.entries() == entries
    assert differences(old_ledger) == []
    assert guards(old_ledger) == old_guards
    spend(Ledger(old_ledger))
    assert ledger.verify().sequence == 4
    with pytest.raises(sqlite3.IntegrityError, match="append-only"):
        query(old_ledger, "DELETE FROM ledger_entry")


@pytest.mark.parametrize(
    "change", ["ALTER TABLE ledger_info ADD COLUMN more TEXT", "DROP TABLE ledger_info"]
)
def test_what_is_no_ledger_is_not_made_one(old_ledger: Path, change: str) -> None:
    query(old_ledger, change)
    with pytest.raises(LedgerTamperedError):
        Ledger(old_ledger, may_upgrade=True)
    names = query(old_ledger, "SELECT name FROM sqlite_master WHERE name = 'crafts_revision'")
    assert names == [], "and nothing was changed"


@pytest.mark.parametrize("may_upgrade", [False, True])
def test_a_ledger_of_a_newer_program_is_one_line(tmp_path: Path, may_upgrade: bool) -> None:
    Ledger(tmp_path / "ledger.db")
    query(tmp_path / "ledger.db", "UPDATE crafts_revision SET version_num = '9999'")
    with pytest.raises(LedgerError, match="update this program") as caught:
        Ledger(tmp_path / "ledger.db", may_upgrade=may_upgrade)
    assert not isinstance(caught.value, LedgerTamperedError)


def test_a_ledger_of_an_older_program_waits_for_who_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a revision to come, that adds a table."""
    Ledger(tmp_path / "ledger.db")
    folder = shutil.copytree(SCHEMA.folder, tmp_path / "revisions")
    (folder / "r0002_birds.py").write_text(
        FIRST.replace('"0001", None', '"0002", "0001"').replace("if_not_exists=True", "")
    )
    metadata = MetaData()
    for table in SCHEMA.metadata.tables.values():
        table.to_metadata(metadata)
    Table("bird", metadata, Column("name", String(9), primary_key=True))
    monkeypatch.setattr(ledger_store, "SCHEMA", Schema(metadata=metadata, folder=folder))
    with pytest.raises(LedgerError, match="has no bird; crafts-client join brings it up to date"):
        Ledger(tmp_path / "ledger.db")
    spend(Ledger(tmp_path / "ledger.db", may_upgrade=True))
    assert Ledger(tmp_path / "ledger.db").verify().sequence == 1
