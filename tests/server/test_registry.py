"""The registry answers what people ask, and refuses what it cannot know."""

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import Connection, create_engine, text

from crafts_server.enrolments import Enrolments, Witness
from crafts_server.errors import EnrolmentError, RegistryError
from crafts_server.receipts import Refusal, RoundReceipt, SiteReceipt
from crafts_server.registry import CheckpointRecord, PlanRecord, Registry, RunStatus

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


def test_sites_are_invited_enrolled_witnessed_and_revoked(registry: Registry) -> None:
    enrolments = Enrolments(registry)
    token = enrolments.invite("aachen", valid_for=timedelta(hours=1))
    assert enrolments.enrol(token, fingerprint=HASH, node_public_key="key") == "aachen"
    with pytest.raises(EnrolmentError, match="unknown, used or expired"):
        enrolments.enrol(token, fingerprint="b" * 64, node_public_key="other")
    assert enrolments.is_enrolled("aachen", HASH)
    head = Witness(entries=2, head=HASH)
    assert enrolments.witness("aachen", "ledger", head, "").entries == 0
    with pytest.raises(EnrolmentError, match="2 entries long"):
        enrolments.witness("aachen", "ledger", Witness(entries=1, head=HASH), HASH)
    enrolments.revoke("aachen")
    assert not enrolments.is_enrolled("aachen", HASH)
    assert [site.revoked_at is None for site in enrolments.sites()] == [False]


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
