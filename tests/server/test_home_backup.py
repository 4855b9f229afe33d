"""What of a coordinator's home comes back from a backup, and what is said about the rest."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from crafts_core.plan import Plan
from crafts_server.audit_log import Event
from crafts_server.cli import app
from crafts_server.home import CoordinatorHome, HomeConfig
from crafts_server.plan_queue import queue_plan, queued_plans
from support.postgres import Postgres
from support.sites import plan_values


def run(*words: object):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def plan(foundation) -> Plan:
    return Plan.parse(plan_values(foundation.manifest.hash))


@pytest.fixture
def home(tmp_path: Path, foundation, plan: Plan) -> CoordinatorHome:
    """With a plan that waits and a site that was invited."""
    config = HomeConfig(foundation=str(foundation.path))
    home = CoordinatorHome.create(tmp_path / "coordinator", config)
    queue_plan(home, plan)
    assert run("sites", "invite", "north", "--patients", "70", "--home", home.path).exit_code == 0
    return home


def test_a_home_comes_back_with_keys_registry_and_queue(
    home: CoordinatorHome, plan: Plan, tmp_path: Path
) -> None:
    out, new = tmp_path / "b.tar", tmp_path / "new"
    done = run("backup", out, "--home", home.path, "--json")
    assert json.loads(done.stdout)["registry"] is True
    assert out.stat().st_mode & 0o777 == 0o600
    done = run("restore", out, "--home", new)
    assert done.exit_code == 0, done.stderr
    assert "revoke again whom you revoked since" in done.stdout
    back = CoordinatorHome.open(new)
    assert back.public_key == home.public_key
    assert [path.name for path in queued_plans(back)] == [plan.hash]
    registry = back.registry()
    assert [record.hash for record in registry.plans()] == [plan.hash]
    registry.close()
    entries = back.audit_log.verify()
    assert entries[-1].event == Event.RESTORED
    assert entries[:-1] == home.audit_log.verify()
    assert not any(path.stat().st_mode & 0o077 for path in new.rglob("*"))


def test_keys_stay_out_if_asked(home: CoordinatorHome, tmp_path: Path) -> None:
    out, new = tmp_path / "b.tar", tmp_path / "new"
    assert run("backup", out, "--without-keys", "--home", home.path).exit_code == 0
    assert run("restore", out, "--home", new).exit_code == 0
    assert {path.name for path in home.path.iterdir()} - {path.name for path in new.iterdir()} == {
        *("signing.key", "pki", ".backup.lock")
    }


def test_of_a_registry_on_postgresql_the_operator_is_told(
    tmp_path: Path, foundation, postgres: Postgres
) -> None:
    config = HomeConfig(foundation=str(foundation.path), registry=postgres.new_database())
    home = CoordinatorHome.create(tmp_path / "coordinator", config)
    done = run("backup", tmp_path / "b.tar", "--home", home.path, "--json")
    assert json.loads(done.stdout)["registry"] is False
    assert "pg_dump" in done.stderr


def test_a_sites_backup_makes_no_coordinator(home: CoordinatorHome, tmp_path: Path) -> None:
    from crafts_client.cli import app as client

    out = tmp_path / "b.tar"
    assert run("backup", out, "--home", home.path).exit_code == 0
    words = ["restore", str(out), "--home", str(tmp_path / "site")]
    done = CliRunner().invoke(client, words)
    assert (done.exit_code, "backup of a coordinator, not of a site" in done.stderr) == (1, True)
