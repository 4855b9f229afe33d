"""Who may sign plans for a site is a person's word, also where there is no editor."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from crafts_client import enrolment
from crafts_client.cli import app
from crafts_client.coordinator_record import CoordinatorRecord
from crafts_client.home import SiteHome
from crafts_privacy import signing
from support.sites import make_site_home


@pytest.fixture
def home(tmp_path: Path, foundation) -> SiteHome:
    return make_site_home(tmp_path / "site", foundation, "A" * 43 + "=")


@pytest.fixture
def key(tmp_path: Path) -> str:
    return signing.create_signing_key(tmp_path / "coordinator.pem")


@pytest.fixture
def enrols(key, monkeypatch) -> None:
    """A coordinator with that signer says yes."""
    record = CoordinatorRecord(
        site="north",
        signer=key,
        registrar_address="localhost:1",
        fleet_address="localhost:1",
        ca_fingerprint="c" * 64,
    )
    monkeypatch.setattr(enrolment, "enrol", lambda *_: record)


def run(home: SiteHome, *words: object, answer: str | None = None):
    return CliRunner().invoke(app, [*map(str, words), "--home", str(home.path)], input=answer)


def signers(home: SiteHome) -> tuple[str, ...]:
    return SiteHome.open(home.path).policy.allowed_signers


def test_trust_shows_the_fingerprint_and_asks(home, key) -> None:
    refused = run(home, "policy", "trust", key, answer="n\n")
    assert refused.exit_code == 1
    assert signing.fingerprint(key) in refused.output
    assert key not in signers(home)
    assert run(home, "policy", "trust", key, answer="y\n").exit_code == 0
    assert signers(home) == ("A" * 43 + "=", key)
    again = (home.path / "policy.toml").read_text()
    assert run(home, "policy", "trust", key, "--yes").exit_code == 0
    assert (home.path / "policy.toml").read_text() == again


def test_all_else_in_the_policy_stays_as_its_owner_wrote_it(home, key) -> None:
    path = home.path / "policy.toml"
    path.write_text("# ours\n" + path.read_text() + "# the end\n")
    path.chmod(0o640)
    before = path.read_text().splitlines()
    assert run(home, "policy", "trust", key, "--yes").exit_code == 0
    after = path.read_text().splitlines()
    assert [old for old, new in zip(before, after, strict=True) if old != new] == [
        'allowed_signers = ["' + "A" * 43 + '="]'
    ]
    assert path.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("wrong", ["", "key", "A" * 44, "'\"]\nallow_non_private = true\n#"])
def test_what_is_no_key_is_not_written(home, wrong: str) -> None:
    before = (home.path / "policy.toml").read_text()
    assert run(home, "policy", "trust", "--yes", "--", wrong).exit_code != 0
    assert (home.path / "policy.toml").read_text() == before


def test_a_list_over_several_lines_is_left_to_its_owner(home, key) -> None:
    path = home.path / "policy.toml"
    text = path.read_text().replace('allowed_signers = ["', 'allowed_signers = [\n"')
    path.write_text(text)
    refused = run(home, "policy", "trust", key, "--yes")
    assert (refused.exit_code, "yourself" in refused.stderr) == (1, True)
    assert path.read_text() == text


@pytest.mark.parametrize(("options", "trusted"), [(["--yes"], True), ([], False)])
def test_enroll_trusts_nobody_without_a_word(home, key, enrols, options, trusted) -> None:
    """Where nobody can answer it says how to do it later; both fingerprints are shown."""
    done = run(home, "enroll", "localhost", "--token", "t", *options)
    assert done.exit_code == 0, done.output
    assert (key in signers(home)) == trusted
    assert f"authority {'c' * 64}\nsigner    {signing.fingerprint(key)}\n" in done.stdout
    assert (f"crafts-client policy trust {key}" in done.stdout) == (not trusted)


@pytest.mark.parametrize(("answer", "trusted"), [("y\n", True), ("n\n", False)])
def test_enroll_offers_to_trust_once_both_were_compared(
    home, key, enrols, monkeypatch, answer: str, trusted: bool
) -> None:
    monkeypatch.setattr("crafts_client.network_cli.agrees", lambda _: answer == "y\n")
    assert run(home, "enroll", "localhost", "--token", "t").exit_code == 0
    assert (key in signers(home)) == trusted


def test_withdraw_and_leave_ask_first(home, tmp_path: Path) -> None:
    assert run(home, "withdraw", "0001", answer="n\n").exit_code == 1
    home.coordinator_path.write_text("{}")
    assert run(home, "leave", "--offline", answer="n\n").exit_code == 1
    assert home.coordinator_path.exists()
    assert run(home, "leave", "--offline", answer="y\n").exit_code == 0
    assert not home.coordinator_path.exists()
    assert json.loads(run(home, "policy", "show", "--json").stdout)["allow_non_private"] is False
