"""Which tables a database has, and the Alembic revisions that bring them to what a program needs.

Revisions are the files ``rNNNN_what.py`` of one folder, in this order, each with ``upgrade(op)``;
their numbers are read from the names, so that Alembic is imported only where there is something to
do. A database that was made before there were revisions carries no number: the first one leaves
what it finds and makes what is missing. Whatever was done is kept only if the tables are those of
the program afterwards.
"""

from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Float, MetaData, column, inspect, select, table

from crafts_privacy.errors import SchemaError

VERSION_TABLE = "crafts_revision"
"""Of our own name: a schema of PostgreSQL may be shared with another program that uses Alembic."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Schema:
    """The tables that a program works with, and how they came about."""

    metadata: MetaData
    folder: Path

    @property
    def revisions(self) -> tuple[str, ...]:
        """Numbers of all revisions, oldest first."""
        return tuple(sorted(path.stem[1:5] for path in self.folder.glob("r[0-9]*_*.py")))


class Standing(Enum):
    """How a database stands to a program."""

    EMPTY = auto()
    """It has none of the tables."""
    UNNUMBERED = auto()
    """It was made before there were revisions."""
    OLDER = auto()
    CURRENT = auto()
    NEWER = auto()
    """A later program has been here."""


def standing(connection: Connection, schema: Schema) -> Standing:
    """Compare by plain queries."""
    names = set(inspect(connection).get_table_names())
    if VERSION_TABLE not in names:
        return Standing.UNNUMBERED if names & set(schema.metadata.tables) else Standing.EMPTY
    found = connection.scalar(select(column("version_num")).select_from(table(VERSION_TABLE)))
    known = schema.revisions
    if found is None:
        return Standing.UNNUMBERED
    if found not in known:
        return Standing.NEWER
    return Standing.CURRENT if found == known[-1] else Standing.OLDER


def lacking(connection: Connection, schema: Schema) -> list[str]:
    """Tables and columns that the program reads and the database does not have."""
    inspector = inspect(connection)
    names = set(inspector.get_table_names())
    lacks = [name for name in schema.metadata.tables if name not in names]
    for name in names & set(schema.metadata.tables):
        there = {each["name"] for each in inspector.get_columns(name)}
        lacks += [f"{name}.{key}" for key in set(schema.metadata.tables[name].c.keys()) - there]
    return sorted(lacks)


def upgrade(connection: Connection, schema: Schema) -> None:
    """Run the revisions that the database lacks, in the caller's transaction.

    Raises:
        SchemaError: the tables are not the program's after it; roll back.
    """
    from alembic.autogenerate import compare_metadata
    from alembic.operations import Operations
    from alembic.runtime.migration import MigrationContext
    from alembic.script import ScriptDirectory

    def is_ours(name: str | None, kind: str, _parents: object) -> bool:
        return kind != "table" or name in schema.metadata.tables

    context = MigrationContext.configure(
        connection,
        opts={
            "include_name": is_ours, "compare_type": _other_type, "version_table": VERSION_TABLE,
        },
    )  # fmt: skip
    script = ScriptDirectory(str(schema.folder), version_locations=[str(schema.folder)])
    begin = context.get_current_revision() or "base"
    # The folder is a package, not Alembic's environment: a revision gets its operations by hand.
    for revision in reversed(list(script.iterate_revisions("head", begin))):
        revision.module.upgrade(Operations(context))
        context.stamp(script, revision.revision)
    if different := compare_metadata(context, schema.metadata):
        raise SchemaError(_words(different[0]))


def _other_type(
    _context: Any, _column: Any, _mapped: Any, found: Any, expected: Any
) -> bool | None:
    """SQLAlchemy 2.0 and 2.1 name the same float differently; the rest is Alembic's own answer."""
    return False if isinstance(found, Float) and isinstance(expected, Float) else None


def _words(difference: Any) -> str:
    """The first difference in a few words: what would have to be done, and to what."""
    first = difference[0] if isinstance(difference, list) else difference
    about = [getattr(part, "name", part) for part in first[1:] if part is not None]
    return " ".join([first[0], *(str(part) for part in about if not isinstance(part, dict))])
