"""The registry answers what people ask, and refuses what it cannot know."""

import sqlite3
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, create_engine, make_url, text
from typer.testing import CliRunner

from crafts_server import registry as registry_module
from crafts_server.cli import app
from crafts_server.enrolments import MAX_LEDGERS, Enrolments, Witness
from crafts_server.errors import EnrolmentError, RegistryError
from crafts_server.home import CoordinatorHome, HomeConfig
from crafts_server.receipts import Refusal, RoundReceipt, SiteReceipt
from crafts_server.registry import CheckpointRecord, PlanRecord, Registry, RunStatus
from crafts_server.registry_rows import IdentityRow
from support.certificates import identity_of
from support.postgres import Postgres

HASH = "a" * 64


@pytest.fixture
def registry(database_url: str) -> Iterator[Registry]:
    registry = Registry(database_url)
    registry.add_plan(
        PlanRecord(hash=HASH, study="lungs", json="{}", signature="s", public_key="k")
    )
    registry.start_run("run", HASH)
    yield registry
    registry.close()


def receipt() -> RoundReceipt:
    site = SiteReceipt(
        site="aachen",
        weight=1.0,
        max_weight=1.0,
        gain=None,
        update_norm=0.5,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        sample_rate=0.5,
        steps=3,
        declared_patients=100,
        declared_noise_variance=1e-4,
    )
    return RoundReceipt(
        run_id="run",
        round=1,
        stage="pretraining",
        stage_index=0,
        factor="second",
        sites=(site,),
        refused=(Refusal(site="bern", reason="code 101: policy"),),
        rises=(),
        missing=("node 5",),
        margin_before=0.1,
        margin_after=0.2,
        step_norm=0.5,
        trust_norm=0.05,
        step_scale=1.0,
        bytes_down=10,
        bytes_up=5,
        seconds=1.5,
        finished_at=datetime.now(UTC),
        sent_hash=HASH,
        state_hash=HASH,
    )


@contextmanager
def database(url: str) -> Iterator[Connection]:
    engine = create_engine(url)
    with engine.begin() as connection:
        yield connection
    engine.dispose()


def record(number: int) -> CheckpointRecord:
    return CheckpointRecord(round=number, manifest_hash=HASH, state_hash=HASH)


def test_a_committed_round_is_remembered_by_the_next_process(
    registry: Registry, database_url: str
) -> None:
    registry.record("run", record(0), None)
    registry.record("run", record(1), receipt())
    registry.close()
    again = Registry(database_url)
    assert again.checkpoints("run") == [record(0), record(1)]
    assert again.sites() == ["aachen"]
    assert again.run("run").rounds == 1
    again.close()
    with database(database_url) as connection:
        rows = connection.execute(text("SELECT site, outcome FROM participation ORDER BY id"))
        assert rows.all() == [("aachen", "used"), ("bern", "refused"), ("node 5", "missing")]


def test_a_round_is_recorded_whole_or_not_at_all(registry: Registry) -> None:
    registry.record("run", record(1), receipt())
    with pytest.raises(RegistryError):
        registry.record("run", record(2), receipt())  # round 1 again: one transaction, undone
    assert registry.checkpoints("run") == [record(1)]


def test_the_newest_run_of_a_plan_is_found(registry: Registry) -> None:
    assert registry.newest_run(HASH) == "run"
    registry.start_run("run-2", HASH)
    assert registry.newest_run(HASH) == "run-2"
    assert registry.newest_run("b" * 64) is None


def test_a_finished_run_says_when(registry: Registry) -> None:
    registry.set_status("run", RunStatus.FINISHED)
    summary = registry.run("run")
    assert summary.status is RunStatus.FINISHED
    assert summary.finished_at is not None


def test_plans_are_found_by_the_beginning_of_their_hash(registry: Registry) -> None:
    assert registry.plan("aaaa").study == "lungs"
    for unknown in ("b", "%"):
        with pytest.raises(RegistryError, match="0 signed plans"):
            registry.plan(unknown)


def test_a_plan_that_is_signed_again_keeps_its_place(registry: Registry) -> None:
    """Each attempt at a round signs its plan anew, and sites read their list from the oldest on."""
    first = registry.plan("aaaa")
    registry.add_plan(replace(first, hash="b" * 64))
    registry.add_plan(replace(first, signature="newer"))
    assert [plan.hash[0] for plan in registry.plans()] == ["a", "b"]
    assert registry.plan("aaaa").signature == "newer"


def test_unknown_runs_are_refused(registry: Registry) -> None:
    with pytest.raises(RegistryError, match="no run"):
        registry.run("nobody")
    with pytest.raises(RegistryError, match="no run"):
        registry.set_status("nobody", RunStatus.STOPPED)


def test_another_format_is_refused(registry: Registry, database_url: str) -> None:
    registry.close()
    with database(database_url) as connection:
        connection.execute(text("UPDATE registry_info SET format_version = 99"))
    with pytest.raises(RegistryError, match="format 99"):
        Registry(database_url)


def enrol(enrolments: Enrolments, token: str, **changes: object) -> str:
    values: dict[str, Any] = {
        "fingerprint": HASH,
        "node_public_key": "key",
        "identity_public_key": identity_of(1),
        "declared_patients": 120,
    }
    return enrolments.enrol(token, **values | changes)


def test_sites_are_invited_enrolled_witnessed_and_revoked(registry: Registry) -> None:
    enrolments = Enrolments(registry)
    token = enrolments.invite("aachen", patients=120, valid_for=timedelta(hours=1))
    assert enrol(enrolments, token) == "aachen"
    with pytest.raises(EnrolmentError, match="unknown, used or expired"):
        enrol(enrolments, token, fingerprint="b" * 64, node_public_key="other")
    assert enrolments.is_enrolled("aachen", HASH)
    head = Witness(entries=2, head=HASH)
    assert enrolments.witness("aachen", "ledger", head, "").entries == 0
    with pytest.raises(EnrolmentError, match="2 entries long"):
        enrolments.witness("aachen", "ledger", Witness(entries=1, head=HASH), HASH)
    enrolments.revoke("aachen")
    assert not enrolments.is_enrolled("aachen", HASH)
    assert [site.revoked_at is None for site in enrolments.sites()] == [False]


def enrolled(registry: Registry, patients: int = 120) -> Enrolments:
    enrolments = Enrolments(registry)
    token = enrolments.invite("north", patients=patients, valid_for=timedelta(hours=1))
    enrol(enrolments, token, declared_patients=patients)
    return enrolments


def test_who_comes_with_another_number_of_patients_is_not_enrolled(registry: Registry) -> None:
    enrolments = Enrolments(registry)
    token = enrolments.invite("north", patients=120, valid_for=timedelta(hours=1))
    for declared in (4000, 119, 0):
        with pytest.raises(EnrolmentError, match="invitation is for 120 patients"):
            enrol(enrolments, token, declared_patients=declared)
    assert enrolments.sizes.agreed() == {}
    enrol(enrolments, token)
    assert enrolments.sizes.agreed() == {"north": 120}


def test_neither_side_changes_the_number_alone(registry: Registry) -> None:
    enrolments = enrolled(registry)
    with pytest.raises(EnrolmentError, match="north declares 120 patients, not 4000"):
        enrolments.sizes.resize("north", 4000)
    enrolments.sizes.declare("north", 4000)
    enrolments.invite("north", patients=4000, valid_for=timedelta(hours=1))
    assert enrolments.sizes.agreed() == {"north": 120}
    (site,) = enrolments.sites()
    assert (site.declared_patients, site.told_patients) == (120, 4000)
    with pytest.raises(EnrolmentError, match="north declares 4000 patients, not 150"):
        enrolments.sizes.resize("north", 150)
    enrolments.sizes.declare("north", 150)
    assert enrolments.sizes.resize("north", 150) == 120
    assert enrolments.sizes.agreed() == {"north": 150}


def test_who_is_revoked_or_only_invited_is_not_on_the_roster(registry: Registry) -> None:
    enrolments = enrolled(registry)
    enrolments.invite("south", patients=30, valid_for=timedelta(hours=1))
    assert enrolments.sizes.agreed() == {"north": 120}
    enrolments.revoke("north")
    assert enrolments.sizes.agreed() == {}
    for name in ("north", "south"):
        with pytest.raises(EnrolmentError, match=f"no site {name} is enrolled"):
            enrolments.sizes.resize(name, 120)


def test_a_registry_from_before_sizes_were_agreed_opens_and_has_none(
    registry: Registry, database_url: str
) -> None:
    """Its sites are refused until both sides have said a number; nothing is made up."""
    enrolled(registry)
    registry.close()
    with database(database_url) as connection:
        connection.execute(text("DROP TABLE cohort_size"))
        connection.execute(text("DROP TABLE crafts_revision"))
    reopened = Registry(database_url, may_upgrade=True)
    sizes = Enrolments(reopened).sizes
    assert sizes.agreed() == {}
    with pytest.raises(EnrolmentError, match="north declares nothing yet, not 120"):
        sizes.resize("north", 120)
    sizes.declare("north", 120)
    assert sizes.resize("north", 120) is None
    assert sizes.agreed() == {"north": 120}
    reopened.close()


@pytest.mark.parametrize("patients", [0, -1, 2**31])
def test_what_is_no_number_of_patients_is_not_kept(registry: Registry, patients: int) -> None:
    enrolments = Enrolments(registry)
    with pytest.raises(EnrolmentError, match="expected 1 to 2147483647 patients"):
        enrolments.invite("north", patients=patients, valid_for=timedelta(hours=1))
    with pytest.raises(EnrolmentError, match="expected 1 to 2147483647 patients"):
        enrolments.sizes.declare("north", patients)


def at_once(num: int, act: Callable[[int], object]) -> list[object]:
    """What each of so many threads got, or the error that it met."""
    start = threading.Barrier(num)

    def one(number: int) -> object:
        start.wait()
        try:
            return act(number)
        except EnrolmentError as error:
            return error

    with ThreadPoolExecutor(num) as pool:
        return list(pool.map(one, range(num)))


def test_of_many_who_come_with_one_token_one_is_enrolled(registry: Registry) -> None:
    enrolments = Enrolments(registry)
    for turn in range(5):
        token = enrolments.invite(f"site-{turn}", patients=120, valid_for=timedelta(hours=1))
        answers = at_once(
            6,
            lambda number, turn=turn, token=token: enrol(
                enrolments,
                token,
                fingerprint=f"{number:064x}",
                node_public_key=f"key {turn} {number}",
                identity_public_key=identity_of(10 * turn + number),
            ),
        )
        (winner,) = [n for n, answer in enumerate(answers) if answer == f"site-{turn}"]
        assert enrolments.is_enrolled(f"site-{turn}", f"{winner:064x}")


def test_a_shorter_head_never_replaces_a_longer_one(registry: Registry) -> None:
    """Whether the ledger is new to the coordinator or known."""
    enrolments = Enrolments(registry)
    for turn in range(5):
        for base in (0, 10):
            before = enrolments.witness("north", f"l{turn}", Witness(entries=0, head=""), "")
            answers = at_once(
                6,
                lambda number, turn=turn, base=base, before=before: enrolments.witness(
                    "north",
                    f"l{turn}",
                    Witness(entries=base + number + 1, head=f"{base + number + 1:064x}"),
                    before.head,
                ),
            )
            after = enrolments.witness("north", f"l{turn}", Witness(entries=0, head=""), "")
            kept = [n for n, answer in enumerate(answers) if isinstance(answer, Witness)]
            assert len(kept) == 1, "the others do not continue what the first had witnessed"
            assert after.entries == base + kept[0] + 1


def test_a_node_key_speaks_for_one_site(registry: Registry) -> None:
    enrolments = Enrolments(registry)
    north, south = (
        enrolments.invite(name, patients=120, valid_for=timedelta(hours=1))
        for name in ("north", "south")
    )
    enrol(enrolments, north)
    with pytest.raises(EnrolmentError, match="belongs to another site"):
        enrol(enrolments, south, fingerprint="b" * 64, identity_public_key=identity_of(2))
    assert [site.name for site in enrolments.sites()] == ["north"]
    others = {"node_public_key": "another", "identity_public_key": identity_of(2)}
    enrol(enrolments, south, fingerprint="b" * 64, **others)


def test_who_is_not_enrolled_changes_no_key(registry: Registry) -> None:
    """The key of a second home was published, and the next roster named it for the first."""
    enrolments = enrolled(registry)
    token = enrolments.invite("north", patients=50, valid_for=timedelta(hours=1))
    with pytest.raises(EnrolmentError, match="invitation is for 50 patients"):
        enrol(enrolments, token, node_public_key="other", identity_public_key=identity_of(2))
    with registry.session() as session:
        row = session.get(IdentityRow, "north")
        assert row is not None
        assert row.public_key == identity_of(1)


def test_what_is_no_ledger_is_not_kept(registry: Registry) -> None:
    enrolments = Enrolments(registry)
    names = [(name, 1, HASH) for name in ("", "l" * 65, "L/..")]
    others = [("l", -1, HASH), ("l", 2**31, HASH), ("l", 1, HASH + "a"), ("l", 1, "x")]
    for ledger, entries, head in names + others:
        with pytest.raises(EnrolmentError, match="no name, length or head"):
            enrolments.witness("north", ledger, Witness(entries=entries, head=head), "")


def test_a_site_has_so_many_ledgers_and_no_more(registry: Registry) -> None:
    enrolments, head = Enrolments(registry), Witness(entries=1, head=HASH)
    for number in range(MAX_LEDGERS):
        enrolments.witness("north", f"l{number}", head, "")
    with pytest.raises(EnrolmentError, match="and no more"):
        enrolments.witness("north", "another", head, "")
    enrolments.witness("north", "l0", Witness(entries=2, head="b" * 64), HASH)
    enrolments.witness("south", "another", head, "")


def test_a_database_that_is_none_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "registry.db").write_bytes(b"this is not a database" * 100)
    with pytest.raises(RegistryError, match="cannot use the registry") as caught:
        Registry(f"sqlite:///{tmp_path / 'registry.db'}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "no url at all",
        "sqlite://user:hunter2@/nowhere.db",
        "nosuchdatabase://user:hunter2@host/registry",
        "postgresql+nosuchdriver://user:hunter2@host/registry",
        "sqlite:////nowhere/at/all.db",
    ],
)
def test_a_url_that_cannot_be_used_is_one_line_without_its_password(url: str) -> None:
    with pytest.raises(RegistryError) as caught:
        Registry(url)
    assert "hunter2" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_registry_that_somebody_holds_is_waited_for_from_the_first_connection(tmp_path) -> None:
    """Longer than the five seconds that Python's driver waits by itself."""
    url = f"sqlite:///{tmp_path / 'registry.db'}"
    Registry(url).close()
    holder = sqlite3.connect(tmp_path / "registry.db", check_same_thread=False)
    holder.execute("BEGIN EXCLUSIVE")
    timer = threading.Timer(6.0, holder.rollback)
    timer.start()
    late = Registry(url)
    assert late.plans() == []
    timer.join()
    late.close()
    holder.close()


@pytest.fixture
def postgres_url(postgres: Postgres, monkeypatch: pytest.MonkeyPatch) -> str:
    """Of a registry that waits for nobody for long."""
    monkeypatch.setattr(registry_module, "_PATIENCE_S", 0.2)
    url = postgres.new_database()
    Registry(url).close()
    return url


def test_a_locked_table_is_one_line_and_works_again_when_it_is_free(
    postgres_url: str, tmp_path: Path
) -> None:
    home = CoordinatorHome.create(tmp_path / "c", HomeConfig(registry=postgres_url))
    with database(postgres_url) as other:
        other.execute(text("LOCK TABLE run IN ACCESS EXCLUSIVE MODE"))  # as VACUUM FULL does
        done = CliRunner().invoke(app, ["runs", "list", "--home", str(home.path)])
        assert done.exit_code == 1
        (line,) = done.stderr.strip().splitlines()
        assert "lock timeout; another program holds its tables: try again" in line
    assert CliRunner().invoke(app, ["runs", "list", "--home", str(home.path)]).exit_code == 0


def test_a_database_that_takes_no_writes_is_read_and_refuses_in_one_line(
    postgres_url: str, postgres: Postgres
) -> None:
    plan = PlanRecord(hash=HASH, study="lungs", json="{}", signature="s", public_key="k")
    read_only = {"options": "-c default_transaction_read_only=on"}
    url = make_url(postgres_url).update_query_dict(read_only)
    registry = Registry(url.render_as_string(hide_password=False))
    assert registry.plans() == []
    with pytest.raises(RegistryError, match="read-only transaction; the database, or its server"):
        registry.add_plan(plan)
    registry.close()
    empty = make_url(postgres.new_database()).update_query_dict(read_only)
    with pytest.raises(RegistryError, match="takes no writes now"):
        Registry(empty.render_as_string(hide_password=False))


def test_a_registry_keeps_the_options_of_its_url(postgres_url: str) -> None:
    url = make_url(postgres_url).update_query_dict({"options": "-c statement_timeout=77000"})
    registry = Registry(url.render_as_string(hide_password=False))
    with registry.session() as session:
        assert session.execute(text("SHOW statement_timeout")).scalar() == "77s"
    registry.close()


def test_a_password_that_breaks_the_url_is_not_printed() -> None:
    secret = "p@ss:1"
    with pytest.raises(RegistryError, match="write @ as %40") as caught:
        Registry(f"postgresql+psycopg://crafts:{secret}@postgres/crafts")
    assert secret[2:] not in "".join(traceback.format_exception(caught.value))
