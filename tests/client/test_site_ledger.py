"""What was sealed for sending knows of the ledger: a lost or older one is never taken for new."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from crafts_client.cli import app
from crafts_client.doctor import Verdict, ledger
from crafts_client.errors import OutboxError
from crafts_client.home import SiteHome
from crafts_client.outbox import Outbox
from crafts_client.privacy_report import privacy_report
from crafts_client.site import Site
from crafts_client.site_ledger import existing_ledger, open_ledger
from crafts_privacy.errors import LedgerTamperedError
from crafts_privacy.ledger import Ledger
from support.sites import make_site_home

pytestmark = pytest.mark.slow


@pytest.fixture
def home(tmp_path: Path, foundation, coordinator) -> SiteHome:
    return make_site_home(tmp_path / "site", foundation, coordinator.public_key)


@pytest.fixture
def trained(home, foundation, coordinator) -> SiteHome:
    """Two rounds; ``backup`` beside the home holds the ledger and its witness after the first."""
    plan = coordinator.plan()
    state, site = coordinator.start(plan), Site(home, foundation)
    site.answer(coordinator.message(plan, state))
    (home.path.parent / "backup").mkdir()
    for path in ledger_files(home):
        shutil.copy(path, home.path.parent / "backup")
    request = coordinator.request(plan, state, number=2)
    site.answer(coordinator.message(plan, state, request=request))
    return home


def ledger_files(home: SiteHome) -> list[Path]:
    return [home.ledger_path, home.ledger_path.with_name("ledger.db.head")]


def lose_the_database(home: SiteHome) -> None:
    home.ledger_path.unlink()


def lose_database_and_witness(home: SiteHome) -> None:
    for path in ledger_files(home):
        path.unlink()


def lose_those_and_the_records(home: SiteHome) -> None:
    lose_database_and_witness(home)
    (home.outbox_path / "releases.jsonl").unlink()


def lose_those_and_the_sealed_files(home: SiteHome) -> None:
    lose_database_and_witness(home)
    for path in home.outbox_path.glob("*.safetensors"):
        path.unlink()


def put_both_back_from_a_backup(home: SiteHome) -> None:
    for path in ledger_files(home):
        shutil.copy(home.path.parent / "backup" / path.name, path)


def put_a_fresh_ledger_there(home: SiteHome) -> None:
    lose_database_and_witness(home)
    Ledger(home.ledger_path)


@pytest.mark.parametrize(
    "lose",
    [
        lose_the_database,
        lose_database_and_witness,
        lose_those_and_the_records,
        lose_those_and_the_sealed_files,
        put_both_back_from_a_backup,
        put_a_fresh_ledger_there,
    ],
)
def test_a_ledger_that_is_lost_or_older_is_found_by_whoever_asks(
    trained, foundation, lose: Callable[[SiteHome], None]
) -> None:
    lose(trained)
    before = sorted(trained.path.rglob("*"))

    for ask in (existing_ledger, open_ledger, privacy_report, lambda home: Site(home, foundation)):
        with pytest.raises(LedgerTamperedError, match="restore the newest"):
            ask(trained)
    for command in (["budget"], ["status"], ["ledger", "verify"], ["report"]):
        done = CliRunner().invoke(app, [*command, "--home", str(trained.path)])
        assert done.exit_code == 1, command
        assert "restore the newest" in done.stderr
    assert {*trained.path.rglob("*")} - {*before} <= {trained.path / "join.lock"}, "nothing new"


def test_a_ledger_in_order_opens(trained) -> None:
    ledger = existing_ledger(trained)
    assert ledger is not None
    assert len(ledger.entries()) == 5


def test_a_sealed_file_that_was_damaged_is_no_witness_and_is_named(trained) -> None:
    sealed = min(trained.outbox_path.glob("*.safetensors"))
    sealed.write_bytes(b"x")
    with pytest.raises(OutboxError, match=sealed.name):
        existing_ledger(trained)


def test_the_doctor_makes_no_ledger(home) -> None:
    before = sorted(home.path.rglob("*"))
    (finding,) = ledger(home)
    assert (finding.verdict, finding.found) == (Verdict.OK, "nothing was trained here yet")
    assert sorted(home.path.rglob("*")) == before


def test_a_release_that_a_crash_left_uncommitted_is_named_until_the_site_starts(
    home, foundation, coordinator, monkeypatch
) -> None:
    plan = coordinator.plan()
    message = coordinator.message(plan, coordinator.start(plan))
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "commit", _killed)
        with pytest.raises(KeyboardInterrupt):
            Site(home, foundation).answer(message)

    named = [line for line in privacy_report(home).unsubstantiated if "sealed" in line]
    assert named == [
        "transmissions: 1 sealed updates are not committed in the ledger; start crafts-client "
        "join, which commits what a crash left"
    ]
    Site(home, foundation)
    report = privacy_report(home)
    assert not any("sealed" in line for line in report.unsubstantiated)
    (sealed,) = Outbox(home.outbox_path).records()
    assert [sent.hash for sent in report.transmissions] == [sealed]


def test_a_release_whose_record_a_crash_took_is_recorded_before_it_leaves(
    home, foundation, coordinator
) -> None:
    plan = coordinator.plan()
    message = coordinator.message(plan, coordinator.start(plan))
    site = Site(home, foundation)
    release = site.answer(message)
    (home.outbox_path / "releases.jsonl").unlink()
    site.answer(message)
    assert Outbox(home.outbox_path).records().keys() == {release.hash}


def _killed(*_: object, **__: object) -> None:
    raise KeyboardInterrupt
