"""A registry of an older program is read as it is, and brought up by a coordinator that starts."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import create_engine, inspect, text

from crafts_privacy.schema import VERSION_TABLE
from crafts_server.errors import RegistryError
from crafts_server.registry import CheckpointRecord, Registry
from crafts_server.registry_rows import Base

BEFORE = Path(__file__).parents[1] / "support" / "before_revisions"
HASH = "a" * 64


def execute(url: str, *statements: str) -> None:
    engine = create_engine(url)
    with engine.begin() as connection:
        for statement in statements:
            connection.execute(text(statement))
    engine.dispose()


def tables(url: str) -> set[str]:
    engine = create_engine(url)
    with engine.connect() as connection:
        names = set(inspect(connection).get_table_names())
    engine.dispose()
    return names


def differences(url: str) -> list[object]:
    engine = create_engine(url)
    with engine.connect() as connection:
        found = compare_metadata(
            MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE}),
            Base.metadata,
        )
    engine.dispose()
    return found


@pytest.fixture
def old(database_url: str) -> str:
    """Of the program before, with a run of one round."""
    kind = database_url.partition("+")[0].partition(":")[0]
    for script in (f"registry_{kind}.sql", "registry_rows.sql"):
        statements = (BEFORE / script).read_text().split(";\n")
        execute(database_url, *(each.replace(":", r"\:") for each in statements if each.strip()))
    return database_url


def check_rows(registry: Registry) -> None:
    assert registry.checkpoints("run") == [
        CheckpointRecord(round=1, manifest_hash=HASH, state_hash=HASH)
    ]
    assert (registry.run("run").rounds, registry.sites()) == (1, ["aachen"])


def test_an_empty_database_gets_the_mapped_tables(database_url: str) -> None:
    Registry(database_url).close()
    assert differences(database_url) == []


def test_many_that_open_an_empty_database_at_once_make_it_once(database_url: str) -> None:
    with ThreadPoolExecutor(4) as pool:
        for registry in pool.map(lambda _: Registry(database_url), range(4)):
            assert registry.plans() == []
            registry.close()
    assert differences(database_url) == []


def test_an_old_registry_is_read_as_it_is(old: str) -> None:
    registry = Registry(old)
    check_rows(registry)
    registry.close()
    assert tables(old) == set(Base.metadata.tables)


def test_a_coordinator_that_starts_brings_an_old_registry_up(old: str) -> None:
    registry = Registry(old, may_upgrade=True)
    check_rows(registry)
    registry.start_run("run-2", HASH)
    registry.close()
    assert differences(old) == []
    assert "crafts_revision" in tables(old)
    again = Registry(old)
    assert again.newest_run(HASH) == "run-2"
    again.close()


def test_an_old_registry_that_lacks_a_table_waits_for_the_coordinator(old: str) -> None:
    execute(old, "DROP TABLE cohort_size")
    with pytest.raises(RegistryError, match="has no cohort_size; `crafts-server serve` brings"):
        Registry(old)
    assert "cohort_size" not in tables(old)
    Registry(old, may_upgrade=True).close()
    assert differences(old) == []


@pytest.mark.parametrize("may_upgrade", [False, True])
def test_a_registry_of_a_newer_program_is_one_line(database_url: str, may_upgrade: bool) -> None:
    Registry(database_url).close()
    execute(database_url, "UPDATE crafts_revision SET version_num = '9999'")
    with pytest.raises(RegistryError, match=r"newer crafts-federated; update this program$"):
        Registry(database_url, may_upgrade=may_upgrade)


def test_tables_that_no_program_made_are_left_alone(old: str) -> None:
    execute(old, "ALTER TABLE site ADD COLUMN colour TEXT", "DROP TABLE identity")
    with pytest.raises(RegistryError, match=r"remove_column site colour.*nothing was changed"):
        Registry(old, may_upgrade=True)
    assert not {"crafts_revision", "identity"} & tables(old)
