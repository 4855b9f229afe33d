"""What a coordinator, another site or a table says reaches a person's eyes harmlessly, everywhere.

Each place where text of others is shown has a case here. The far side is made up: it signs what it
likes, as a hostile coordinator can.
"""

import hashlib
import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from crafts_client import agreed_patients, doctor, enrolment, foundation_fetch
from crafts_client.approvals import Approval
from crafts_client.cli import app
from crafts_client.home import SiteHome
from crafts_client.ingest.ingest_page import write_ingest_page
from crafts_client.ingest.report import IngestReport, SourceOutcome
from crafts_core.foundation_manifest import MANIFEST_NAME, embedded_path
from crafts_core.registrar import messages
from crafts_privacy import signing
from support.hostile import TEXT, assert_harmless
from support.sites import Coordinator, make_site_home, plan_values

SENT = TEXT.replace("\ud800", "")
"""What fits into a message of the wire."""


@pytest.fixture
def home(tmp_path: Path, foundation, coordinator) -> SiteHome:
    return make_site_home(tmp_path / "site", foundation, coordinator.public_key)


@pytest.fixture
def replies(monkeypatch) -> dict[str, Callable[..., object]]:
    """What the far side answers, by call; it has signed everything itself."""
    answers: dict[str, Callable[..., object]] = {}

    class Registrar:
        record = SimpleNamespace(signer="", registrar_address=SENT)

        def __init__(self, home: SiteHome) -> None: ...

        def __enter__(self):
            return self

        def __exit__(self, *_: object) -> None: ...

        def call(self, name: str, **fields: object) -> object:
            return answers[name](**fields)

    # Imported before the first is changed: one imported after it would keep the made-up one.
    for module in (enrolment, agreed_patients, foundation_fetch, doctor):
        monkeypatch.setattr(module, "Registrar", Registrar)
    monkeypatch.setattr(Registrar.record, "signer", "")
    return answers


def run(home: SiteHome, *arguments: object, code: int = 0):
    done = CliRunner().invoke(app, [*map(str, arguments), "--home", str(home.path)])
    assert done.exit_code == code, done.output
    return done


def signed(coordinator: Coordinator, text: str):
    signature = signing.sign(coordinator._key, text.encode())
    return messages.SignedPlan(json=text, signature=signature, public_key=coordinator.public_key)


def offering(*plans: object) -> Callable[..., object]:
    return lambda: SimpleNamespace(plans=plans)


def test_plan_list_names_an_impossible_key(home, coordinator, replies, foundation) -> None:
    values = plan_values(foundation.manifest.hash)
    texts = [json.dumps(values | {SENT: 1}), json.dumps(values | {"transport": {SENT: 1}})]
    replies["ListPlans"] = offering(*(signed(coordinator, text) for text in texts))
    shown = run(home, "plan", "list").stdout
    assert_harmless(shown, num_lines=3)
    assert [line.split()[0] for line in shown.splitlines()] == ["unreadable", "unreadable", "this"]


@pytest.mark.parametrize("command", ["list", "show"])
def test_plan_list_and_show_of_a_module_name(
    home, coordinator, replies, foundation, command: str
) -> None:
    """Which modules a plan trains are any texts."""
    plan = coordinator.plan(adapter={"kind": "lora", "targets": [SENT]})
    replies["ListPlans"] = offering(signed(coordinator, plan.to_json()))
    wanted = [] if command == "list" else [plan.hash[:16]]
    done = run(home, "plan", command, *wanted)
    assert all(line.isprintable() for line in done.stdout.splitlines())
    if command == "show":
        assert_harmless(done.stdout)


@pytest.mark.parametrize("command", ["show", "approve"])
def test_what_the_registrar_says_when_it_refuses(home, replies, monkeypatch, command) -> None:
    def refuses() -> object:
        raise enrolment.EnrolmentError(f"the coordinator says: {TEXT}")

    replies["ListPlans"] = refuses
    assert_harmless(run(home, "plan", command, "a" * 64, code=1).stderr, num_lines=1)
    replies["DeclarePatients"] = lambda **_: refuses()
    assert_harmless(run(home, "declare", code=1).stderr, num_lines=1)


def test_a_roster_with_an_impossible_site(home, coordinator, replies, monkeypatch) -> None:
    plan = coordinator.plan()
    replies["ListPlans"] = offering(signed(coordinator, plan.to_json()))
    entry = {"site": TEXT, "declared_patients": 1}
    text = json.dumps({"plan_hash": plan.hash, "sites": [entry], TEXT: 1})
    replies["GetRoster"] = lambda **_: SimpleNamespace(json=text, signature="")
    monkeypatch.setattr(signing, "verify", lambda *_: None)
    assert run(home, "plan", "roster", plan.hash[:16], code=1).stderr.count("\n") == 1


def manifest(**changes: object) -> dict[str, object]:
    values = json.loads((embedded_path() / MANIFEST_NAME).read_text())
    return values | {"name": "other", "kind": "imported"} | changes


def test_a_fetched_foundation_with_a_licence_and_files_that_lie(home, replies) -> None:
    """A licence is any text, and it is shown beside the verdict."""
    folder = home.foundations_path / "0000000000000000"
    folder.mkdir(parents=True)
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest(licence=SENT, files={})))
    assert_harmless(run(home, "foundation", "list").stdout)
    listed = json.loads(run(home, "foundation", "list", "--json").stdout)
    (found,) = [each for each in listed if each["licence"] == SENT]
    done = run(home, "foundation", "approve", found["hash"])
    assert_harmless(done.stdout, num_lines=1)

    sent = json.dumps(manifest(files={SENT: "0" * 64})).encode()
    replies["GetFoundation"] = lambda: SimpleNamespace(manifest=sent)
    replies["ReadFoundation"] = lambda **_: SimpleNamespace(data=b"")
    refused = run(home, "foundation", "fetch", code=1).stderr
    assert refused.count("\n") == 1
    assert refused.removesuffix("\n").isprintable()


def test_a_foundation_of_many_files_fills_no_disk(home, replies, monkeypatch) -> None:
    monkeypatch.setattr(foundation_fetch, "_MOST_BYTES", 25)
    piece = b"0123456789"
    digest = hashlib.sha256(piece).hexdigest()
    sent = json.dumps(manifest(files=dict.fromkeys(("a.txt", "b.txt", "c.txt"), digest))).encode()
    replies["GetFoundation"] = lambda: SimpleNamespace(manifest=sent)
    replies["ReadFoundation"] = lambda path, offset: SimpleNamespace(data=b"" if offset else piece)
    refused = run(home, "foundation", "fetch", code=1).stderr
    assert "with c.txt the foundation is larger than any is" in refused


def test_doctor_shows_an_address_and_an_error_of_the_coordinator(
    home, replies, monkeypatch
) -> None:
    replies["ListPlans"] = offering()
    replies["DeclarePatients"] = lambda **_: SimpleNamespace(agreed_patients=1)
    monkeypatch.setattr(doctor, "CHECKS", (doctor.registrar,))
    monkeypatch.setattr(doctor, "check_agreed", lambda _: None)
    assert_harmless(run(home, "doctor").stdout, num_lines=3)

    def refuses() -> object:
        raise enrolment.EnrolmentError(TEXT)

    replies["ListPlans"] = refuses
    assert_harmless(run(home, "doctor", code=1).stdout, num_lines=1)


def test_status_of_a_home_whose_files_were_written_by_somebody_else(home, monkeypatch) -> None:
    approved = {TEXT: Approval(study=TEXT, approved_at=datetime.now(UTC))}
    monkeypatch.setattr("crafts_client.approvals.Approvals.all", lambda _: approved)
    shown = run(home, "status").stdout
    assert all(line.isprintable() for line in shown.splitlines())
    assert not any(line.startswith("approved by") for line in shown.splitlines())


def test_an_export_of_another_hospital(home, tmp_path: Path) -> None:
    other = tmp_path / "other.csv"
    other.write_text(f"# crafts ledger export 2: {json.dumps({TEXT: TEXT})}\n")
    refused = run(home, "budget", "--also", other, code=1).stderr
    assert refused.removesuffix("\n").isprintable()


def test_a_table_of_slides(home, tmp_path: Path) -> None:
    """Names of files and columns are of whoever made the table."""
    for number, text in enumerate((f'file,patient,"{SENT}"\n', f'file,patient\n"{SENT}",p\n')):
        table = tmp_path / f"{number}.csv"
        table.write_text(text, encoding="utf-8", newline="")
        done = CliRunner().invoke(
            app, ["ingest", str(table), "--home", str(home.path), "--processes", "1"]
        )
        assert done.exit_code == 1
        assert all(line.isprintable() for line in done.output.splitlines())
        assert not any(line.startswith("approved") for line in done.output.splitlines())


def test_the_ingest_page(tmp_path: Path) -> None:
    outcome = SourceOutcome(line=2, file=SENT, patient=SENT, num_tiles=0, rejected={}, skipped=SENT)
    report = IngestReport.of("slides", [outcome])
    page = write_ingest_page(report, tmp_path).read_text(encoding="utf-8")
    assert "\\u001b[2K\\u001b[1A\\r\\napproved" in page
    assert all(line.isprintable() for line in page.split("\n"))
    assert "<script" not in page
