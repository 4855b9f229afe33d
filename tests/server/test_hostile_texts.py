"""What a site says reaches the coordinator's operator harmlessly, wherever it is shown."""

import json
from pathlib import Path

import pytest
from flwr.app import Error, Message, RecordDict
from typer.testing import CliRunner

from crafts_core.plan import Plan
from crafts_server import cli
from crafts_server.audit_log import Event
from crafts_server.checkpoints import Checkpoint
from crafts_server.home import CoordinatorHome, HomeConfig
from crafts_server.messages import error_sentence
from crafts_server.receipts import Refusal
from support.hostile import TEXT, assert_harmless
from support.receipts import receipt
from support.sites import flower_message, plan_values


@pytest.fixture
def home(tmp_path: Path, foundation) -> CoordinatorHome:
    config = HomeConfig(foundation=str(foundation.path))
    return CoordinatorHome.create(tmp_path / "coordinator", config)


def run(home: CoordinatorHome, *arguments: str, code: int = 0):
    done = CliRunner().invoke(cli.app, [*arguments, "--home", str(home.path)])
    assert done.exit_code == code, done.output
    return done


def test_why_a_site_refused(home, foundation, monkeypatch) -> None:
    """Receipts of an older version, or a forger's, hold the text as it came."""
    plan = Plan.parse(plan_values(foundation.manifest.hash))
    home.sign_plan(plan)
    registry = home.registry()
    registry.start_run("run", plan.hash)
    registry.close()
    refused = receipt(aachen=1.0).model_copy(
        update={"refused": (Refusal(site=TEXT, reason=TEXT),), "missing": (TEXT,)}
    )

    class Committed(Checkpoint):
        def __init__(self) -> None: ...

        def receipt(self):
            return refused

    monkeypatch.setattr(
        "crafts_server.checkpoints.CheckpointStore.chain", lambda _: [0, Committed()]
    )
    shown = run(home, "runs", "show", "run").stdout
    assert_harmless(shown, num_lines=4)


def test_facts_of_the_audit_log(home) -> None:
    home.audit_log.write(Event.REFUSED, site=TEXT, why=TEXT)
    assert_harmless(run(home, "log", "show").stdout, num_lines=1)
    (told,) = json.loads(run(home, "log", "show", "--json").stdout)
    assert told["facts"]["why"] == TEXT


def test_a_plan_with_an_impossible_key(home, foundation, tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    path.write_text(f"{json.dumps(TEXT.replace(chr(0xD800), ''))} = 1\n")
    done = CliRunner().invoke(cli.app, ["plan", "check", str(path)])
    assert done.exit_code == 1
    assert all(line.isprintable() for line in done.stderr.splitlines())


def test_an_answer_that_is_an_error() -> None:
    sentence = error_sentence(Message(Error(101, TEXT), reply_to=flower_message(RecordDict())))
    assert_harmless(sentence, num_lines=1)
