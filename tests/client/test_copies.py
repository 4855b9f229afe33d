"""Two copies of a home, asked for the same round: one charge, one answer."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from crafts_client.cli import app
from crafts_client.errors import HomeError, WitnessError
from crafts_client.home import SiteHome
from crafts_client.refusals import refusal_of
from crafts_client.site import Site
from crafts_client.site_ledger import open_ledger
from crafts_privacy import signing
from crafts_privacy.errors import LedgerPlaceError, LedgerTamperedError
from crafts_privacy.ledger import EntryKind, Ledger
from crafts_privacy.place import Place
from crafts_privacy.signed_head import SignedHead
from support.asked_sites import Study
from support.sites import make_site_home

pytestmark = pytest.mark.slow


def run(*arguments: object, text: str = ""):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=text)


@pytest.fixture
def share(tmp_path: Path) -> Path:
    """A folder that both copies see, as on a share of the hospital."""
    folder = tmp_path / "share"
    folder.mkdir()
    return folder


@pytest.fixture
def study(coordinator) -> Study:
    return Study(coordinator)


@pytest.fixture
def home(tmp_path: Path, foundation, study) -> Path:
    """A site that has answered the first round."""
    path = make_site_home(tmp_path / "site", foundation, study.coordinator.public_key).path
    assert isinstance(study.ask(path, 1), str)
    return path


def copy_of(home: Path) -> Path:
    return Path(shutil.copytree(home, home.with_name("copy")))


def test_of_two_copies_exactly_one_answers(home: Path, study: Study) -> None:
    copy = copy_of(home)
    answers = [study.ask(path, 2) for path in (copy, home)]
    assert [isinstance(answer, str) for answer in answers] == [False, True]
    assert isinstance(answers[0], LedgerPlaceError)
    assert refusal_of(answers[0]).code == 150
    assert len(Ledger(copy / "ledger.db").events("main")) == 1, "and the copy charged nothing"


def test_a_site_that_was_open_before_it_became_a_copy_answers_no_more(
    home: Path, study: Study, foundation
) -> None:
    request = study.coordinator.request(study.plan, study.state, number=2)
    message = study.coordinator.message(study.plan, study.state, request=request)
    running = Site(SiteHome.open(home), foundation)
    copy = copy_of(home)
    home.rename(home.with_name("original"))
    copy.rename(home)
    with pytest.raises(LedgerPlaceError):
        running.answer(message)


def test_a_person_can_move_a_ledger_and_vouches_for_it(home: Path, study: Study) -> None:
    moved = home.rename(home.with_name("elsewhere"))
    assert isinstance(study.ask(moved, 2), LedgerPlaceError)
    assert run("ledger", "export", moved.with_name("x.csv"), "--home", moved).exit_code == 1
    assert run("budget", "--home", moved).exit_code == 0, "it may be read"
    report = run("report", "--home", moved, "--out", moved.with_name("report"))
    assert "NOT SUBSTANTIATED  ledger: " in report.stdout, "a copy does not know all"
    asked = run("ledger", "move", "--home", moved, text="n\n")
    assert asked.exit_code == 1
    assert "every other copy of this home is gone or will never train again" in asked.stdout
    assert isinstance(study.ask(moved, 2), LedgerPlaceError)
    assert run("ledger", "move", "--home", moved, text="y\n").exit_code == 0
    assert Ledger(moved / "ledger.db").entries()[-1].kind is EntryKind.PLACED
    assert isinstance(study.ask(moved, 2), str)
    again = run("ledger", "move", "--yes", "--home", moved)
    assert "bound to this place already" in again.stderr


def begin_witness(home: Path, share: Path) -> None:
    done = run("ledger", "witness", share, "--home", home)
    assert done.exit_code == 0, done.stderr
    line = done.stdout.partition("set: ")[2].strip()
    file = home / "site.toml"
    file.write_text(file.read_text().replace("witness_folders = []", line))
    assert SiteHome.open(home).witness_folders == (share,)


@pytest.mark.parametrize("first", ["original", "copy"])
def test_an_operator_who_lies_is_caught_by_the_folder(
    home: Path, share: Path, study: Study, first: str
) -> None:
    begin_witness(home, share)
    copy = copy_of(home)
    assert run("ledger", "move", "--yes", "--home", copy).exit_code == 0
    order = (home, copy) if first == "original" else (copy, home)
    answers = [study.ask(path, 2) for path in order]
    assert [isinstance(answer, str) for answer in answers] == [True, False]
    assert isinstance(answers[1], LedgerTamperedError)
    assert "another copy went on" in str(answers[1])
    assert len(Ledger(order[1] / "ledger.db").events("main")) == 1, "it was asked before charging"


def test_two_copies_that_train_at_the_same_time_release_one_answer(
    home: Path, share: Path, study: Study, monkeypatch
) -> None:
    """Of a cloned machine, whose place is the same: the second finds the folder ahead."""
    monkeypatch.setattr(Place, "differences", lambda *_: [])
    begin_witness(home, share)
    copy, inside = copy_of(home), []
    train = Site._train

    def trains_while_the_other_does(site: Site, *arguments: object):
        if not inside:
            inside.append(site)
            inside.append(study.ask(home, 2))
        return train(site, *arguments)

    monkeypatch.setattr(Site, "_train", trains_while_the_other_does)
    late = study.ask(copy, 2)
    assert isinstance(inside[1], str)
    assert isinstance(late, LedgerTamperedError)
    assert len(Ledger(copy / "ledger.db").events("main")) == 2, "it trained, and keeps the answer"


def test_a_ledger_put_back_with_all_that_is_beside_it_is_found(
    home: Path, share: Path, study: Study
) -> None:
    begin_witness(home, share)
    backup = copy_of(home)
    assert isinstance(study.ask(home, 2), str)
    shutil.rmtree(home)
    backup.rename(home)
    assert run("ledger", "move", "--yes", "--home", home).exit_code == 0
    assert isinstance(study.ask(home, 2), LedgerTamperedError)


def away(share: Path) -> None:
    share.rename(share.with_name("unplugged"))


def not_mounted(share: Path) -> None:
    away(share)
    share.mkdir()


def head_file(share: Path) -> Path:
    (path,) = share.glob("*.json")
    return path


def damaged(share: Path) -> None:
    head_file(share).write_text("{}")


def edited(share: Path) -> None:
    head = SignedHead.model_validate_json(head_file(share).read_text())
    head_file(share).write_text(head.model_copy(update={"sequence": 1}).model_dump_json())


def anothers(share: Path) -> None:
    signing.create_signing_key(share / "key")
    head = SignedHead.model_validate_json(head_file(share).read_text())
    other = SignedHead.sign(
        signing.load_signing_key(share / "key"), head.head, site=head.site, ledger=head.ledger
    )
    head_file(share).write_text(other.model_dump_json())


@pytest.mark.parametrize(
    ("change", "code", "says"),
    [
        (away, 151, "mount it again"),
        (not_mounted, 151, "holds no head of this site"),
        (damaged, 105, "is damaged"),
        (edited, 105, "is not what a site signed"),
        (anothers, 105, "signed by another key"),
    ],
)
def test_a_folder_that_cannot_speak_for_the_ledger_stops_the_site(
    home: Path, share: Path, study: Study, change: Callable[[Path], None], code: int, says: str
) -> None:
    begin_witness(home, share)
    change(share)
    refused = study.ask(home, 2)
    assert isinstance(refused, WitnessError | LedgerTamperedError)
    assert (refusal_of(refused).code, says in str(refused)) == (code, True), refused
    assert len(Ledger(home / "ledger.db").events("main")) == 1, "nothing was charged"


def test_a_folder_that_goes_away_during_a_round_keeps_the_answer_sealed(
    home: Path, share: Path, study: Study, monkeypatch
) -> None:
    begin_witness(home, share)
    train, unplugged = Site._train, share.with_name("unplugged")

    def unplugs(site: Site, *arguments: object):
        share.rename(unplugged)
        return train(site, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Site, "_train", unplugs)
        assert isinstance(study.ask(home, 2), WitnessError)
    unplugged.rename(share)
    assert isinstance(study.ask(home, 2), str)
    assert len(Ledger(home / "ledger.db").events("main")) == 2, "charged once"


def test_a_folder_begins_once(home: Path, share: Path) -> None:
    begin_witness(home, share)
    before = head_file(share).read_bytes()
    again = run("ledger", "witness", share, "--home", home)
    assert again.exit_code == 1
    assert "is there already" in again.stderr
    assert head_file(share).read_bytes() == before


def test_the_key_is_the_owners_and_is_not_replaced_in_silence(home: Path, study: Study) -> None:
    key = SiteHome.open(home).site_key_path
    assert key.stat().st_mode & 0o777 == 0o600
    assert list(key.parent.iterdir()) == [key]
    key.unlink()
    refused = study.ask(home, 2)
    assert isinstance(refused, HomeError)
    assert "put it back" in str(refused)
    assert not key.exists()


def test_a_ledger_of_before_is_bound_and_gets_a_key_at_its_first_use(
    tmp_path: Path, foundation, study: Study
) -> None:
    home = make_site_home(tmp_path / "old", foundation, study.coordinator.public_key)
    Ledger(home.ledger_path)
    assert isinstance(study.ask(home.path, 1), str)
    assert open_ledger(home).is_bound()
    assert isinstance(study.ask(copy_of(home.path), 2), LedgerPlaceError)
