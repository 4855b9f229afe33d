"""A home that was put back never pays for what it does not know that it spent."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from typer.testing import CliRunner

from crafts_client import home_backup
from crafts_client.cli import app
from crafts_client.errors import EnrolmentError, HomeError
from crafts_client.home import SiteHome
from crafts_client.home_backup import back_up, put_back
from crafts_client.outbox import Outbox
from crafts_client.register import PatientRegister
from crafts_client.site_key import site_key
from crafts_client.trainer import Trainer
from crafts_core.backup import BackupError
from crafts_core.errors import CraftsError
from crafts_privacy.errors import LedgerPlaceError, LedgerTamperedError
from crafts_privacy.ledger import EntryKind, Ledger
from crafts_privacy.place import Place
from support.asked_sites import Study
from support.sites import make_site_home

pytestmark = pytest.mark.slow


def run(*arguments: object, text: str = ""):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=text)


@pytest.fixture
def study(coordinator) -> Study:
    return Study(coordinator)


@pytest.fixture
def home(tmp_path: Path, foundation, study) -> Path:
    """A site that has answered the first round."""
    path = make_site_home(tmp_path / "site", foundation, study.coordinator.public_key).path
    assert isinstance(study.ask(path, 1), str)
    return path


@pytest.fixture
def share(tmp_path: Path, home: Path) -> Path:
    """A witness folder of that site."""
    folder = tmp_path / "share"
    folder.mkdir()
    done = run("ledger", "witness", folder, "--home", home)
    file = home / "site.toml"
    line = done.stdout.partition("set: ")[2].strip()
    file.write_text(file.read_text().replace("witness_folders = []", line))
    return folder


def backup_of(home: Path, name: str = "backup.tar") -> Path:
    out = home.with_name(name)
    done = run("backup", out, "--tiles", "--home", home)
    assert done.exit_code == 0, done.stderr
    return out


def lose(home: Path) -> None:
    shutil.rmtree(home)


def restore(file: Path, home: Path, *more: object) -> None:
    done = run("restore", file, "--home", home, *more)
    assert done.exit_code == 0, done.stderr


def events(home: Path) -> int:
    return len(Ledger(home / "ledger.db").events("main"))


def test_everything_comes_back_and_is_the_owners_alone(home: Path) -> None:
    out = backup_of(home)
    assert out.stat().st_mode & 0o777 == 0o600
    new = home.with_name("new")
    restore(out, new)
    before, after = (
        {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
        for folder in (home, new)
    )
    assert {path for path in before if path.suffix != ".lock"} <= after
    for path in before:
        if path.suffix != ".lock" and not path.name.startswith("ledger.db"):
            assert (new / path).read_bytes() == (home / path).read_bytes()
            assert (new / path).stat().st_mode & 0o077 == 0
    ours, theirs = Ledger(home / "ledger.db").entries(), Ledger(new / "ledger.db").entries()
    assert theirs[:-1] == ours
    assert theirs[-1].kind is EntryKind.RESTORED


def test_a_home_that_was_put_back_pays_for_nothing_also_in_its_old_place(
    home: Path, study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system may give the old numbers to the new files: the place would be the same."""
    out = backup_of(home)
    lose(home)
    restore(out, home)
    monkeypatch.setattr(Place, "differences", lambda *_: [])
    refused = study.ask(home, 2)
    assert isinstance(refused, LedgerPlaceError)
    assert "put back from a backup" in str(refused)
    assert events(home) == 1
    assert run("budget", "--home", home).exit_code == 0, "it may be read"


def test_who_vouches_that_nothing_was_spent_since_goes_on(home: Path, study: Study) -> None:
    out = backup_of(home)
    lose(home)
    restore(out, home)
    asked = run("ledger", "move", "--home", home, text="n\n")
    assert "You vouch that no round was answered since then" in asked.stdout
    assert isinstance(study.ask(home, 2), LedgerPlaceError)
    assert run("ledger", "move", "--home", home, text="y\n").exit_code == 0
    assert isinstance(study.ask(home, 2), str)
    assert events(home) == 2
    assert "put back from a backup of" in run("ledger", "show", "--home", home).stdout


def test_an_old_backup_needs_what_was_spent_since(home: Path, share: Path, study: Study) -> None:
    out = backup_of(home)
    assert isinstance(study.ask(home, 2), str)
    spent = Ledger(home / "ledger.db").entries()
    lose(home)
    restore(out, home)
    moved = run("ledger", "move", "--yes", "--home", home)
    assert moved.exit_code == 1
    assert "does not continue it" in moved.stderr
    assert isinstance(study.ask(home, 3), LedgerPlaceError)

    lose(home)
    (export,) = share.glob("*.csv")
    restore(out, home, "--ledger", export)
    assert Ledger(home / "ledger.db").entries()[:-1] == spent
    assert isinstance(study.ask(home, 3), LedgerPlaceError), "a person has to say so"
    assert run("ledger", "move", "--yes", "--home", home).exit_code == 0
    assert isinstance(study.ask(home, 3), str)
    assert events(home) == 3


def test_the_coordinator_is_asked_before_a_ledger_is_moved(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = backup_of(home)
    lose(home)
    restore(out, home)
    (home / "coordinator.json").write_text("{}")
    for error in (LedgerTamperedError("it saw more"), EnrolmentError("it is away")):

        def says(_home: SiteHome, error: CraftsError = error) -> None:
            raise error

        monkeypatch.setattr(home_backup, "witness_ledger", says)
        moved = run("ledger", "move", "--yes", "--home", home)
        assert (moved.exit_code, str(error) in moved.stderr) == (1, True)
        assert Ledger(home / "ledger.db").restored_from() is not None


def test_a_backup_of_a_home_that_had_no_ledger_yet_pays_for_nothing_either(
    tmp_path: Path, foundation, study: Study
) -> None:
    home = make_site_home(tmp_path / "young", foundation, study.coordinator.public_key).path
    out = backup_of(home)
    assert isinstance(study.ask(home, 1), str)
    lose(home)
    restore(out, home)
    assert isinstance(study.ask(home, 1), LedgerPlaceError)
    assert run("ledger", "move", "--yes", "--home", home).exit_code == 0
    refused = study.ask(home, 1)
    assert isinstance(refused, HomeError), "others may know a key that was made since"
    assert "site.key is missing" in str(refused)


@pytest.mark.parametrize("which", ["older", "another", "edited"])
def test_only_an_export_that_goes_on_from_the_backup_is_taken(
    home: Path, study: Study, foundation, which: str
) -> None:
    export = home.with_name("export.csv")
    source = home
    if which == "another":
        source = make_site_home(
            home.with_name("south"), foundation, study.coordinator.public_key, name="south"
        ).path
        assert isinstance(study.ask(source, 1), str)
    assert run("ledger", "export", export, "--home", source).exit_code == 0
    assert isinstance(study.ask(home, 2), str)
    if which == "edited":
        export.write_text(export.read_text().replace("committed", "reserved"))
    out = backup_of(home)
    done = run("restore", out, "--home", home.with_name("new"), "--ledger", export)
    assert done.exit_code == 1
    assert not (home.with_name("new") / "site.toml").exists()


def test_keys_stay_out_if_asked_and_tiles_unless_asked(home: Path, study: Study) -> None:
    out = home.with_name("bare.tar")
    assert run("backup", out, "--without-keys", "--home", home).exit_code == 0
    new = home.with_name("new")
    done = run("restore", out, "--home", new)
    assert "next: put keys/ and salt back; then crafts-client ingest TABLE" in done.stdout
    assert not any((new / name).exists() for name in ("keys", "salt", "tiles"))
    assert PatientRegister(new / "patients.jsonl").cohorts() == {
        **PatientRegister(home / "patients.jsonl").cohorts()
    }
    assert run("ledger", "move", "--yes", "--home", new).exit_code == 0
    shutil.copytree(home / "tiles", new / "tiles")
    assert isinstance(study.ask(new, 2), HomeError), "its key is missed"


def test_a_withdrawal_that_is_in_the_backup_comes_back(home: Path) -> None:
    register = PatientRegister(home / "patients.jsonl")
    register.withdraw(next(iter(register.cohorts())))
    new = home.with_name("new")
    restore(backup_of(home), new)
    assert PatientRegister(new / "patients.jsonl").withdrawn == register.withdrawn


def check_payments(home: Path) -> None:
    """The ledger is in order, and knows every release of the outbox."""
    hashes = {entry.hash for entry in Ledger(home / "ledger.db").entries()}
    assert {paid.entry_hash for paid in Outbox(home / "outbox").payments()} <= hashes


def test_what_left_while_a_home_was_copied_is_paid_for_in_the_copy(
    home: Path, study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    files_of = home_backup.files_of

    def answers_first(path: Path, **values: object):
        assert isinstance(study.ask(home, 2), str)
        return files_of(path, **values)

    monkeypatch.setattr(home_backup, "files_of", answers_first)
    out, new = backup_of(home), home.with_name("new")
    restore(out, new)
    check_payments(new)
    assert events(new) == 2


def test_a_round_that_was_open_in_a_backup_stays_paid_for(
    home: Path, share: Path, study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reserved is spent: in the copy, beside what was answered since, and when asked again."""
    out, train = home.with_name("backup.tar"), Trainer.train

    def copied_first(*arguments: object, **values: object) -> object:
        back_up(SiteHome.open(home), out, keys=True, tiles=True)
        return train(*arguments, **values)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train", copied_first)
        assert isinstance(study.ask(home, 2), str)
    spent = events(home)
    lose(home)

    restore(out, home)
    kinds = [entry.kind for entry in Ledger(home / "ledger.db").entries()]
    assert kinds[-2:] == [EntryKind.RESERVED, EntryKind.RESTORED]
    assert events(home) == spent, "the open round counts"
    moved = run("ledger", "move", "--yes", "--home", home)
    assert "does not continue it" in moved.stderr, "the share saw it answered"

    lose(home)
    (export,) = share.glob("*.csv")
    restore(out, home, "--ledger", export)
    assert run("ledger", "move", "--yes", "--home", home).exit_code == 0
    assert "after round 2 had been released" in str(study.ask(home, 2))
    assert events(home) == spent, "the export saw it answered: nobody asks for it again"


def test_a_round_that_was_open_in_a_backup_is_charged_anew_when_asked_again(
    home: Path, study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have been answered since, and a coordinator that hides its heads asks once more."""
    out = home.with_name("backup.tar")

    def copied_and_killed(*_arguments: object, **_values: object) -> object:
        back_up(SiteHome.open(home), out, keys=True, tiles=True)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train", copied_and_killed)
        with pytest.raises(KeyboardInterrupt):
            study.ask(home, 2)
    lose(home)
    restore(out, home)
    assert run("ledger", "move", "--yes", "--home", home).exit_code == 0
    assert events(home) == 2
    assert isinstance(study.ask(home, 2), str)
    assert events(home) == 3
    assert isinstance(study.ask(home, 3), str)
    assert events(home) == 4


def test_backups_of_a_site_at_work_are_whole(home: Path, study: Study) -> None:
    stop = threading.Event()

    def work() -> None:
        for number in (2, 3):
            study.ask(home, number)
        stop.set()

    worker = threading.Thread(target=work)
    worker.start()
    made = []
    while not stop.wait(0.2) or not made:
        out = home.with_name(f"b{len(made)}.tar")
        back_up(SiteHome.open(home), out, keys=True, tiles=False)
        made.append(out)
    worker.join()
    for out in made:
        new = home.with_name(out.stem)
        put_back(out, new, newest_ledger=None)
        check_payments(new)
    assert events(home) == 3


def test_a_home_with_a_damaged_ledger_is_not_backed_up(home: Path) -> None:
    (home / "ledger.db.head").unlink()
    done = run("backup", home.with_name("b.tar"), "--home", home)
    assert done.exit_code == 1
    assert not home.with_name("b.tar").exists()


DRIVER = """
import contextlib, io, json, os, pathlib, signal, sys
from crafts_client import home_backup  # what a command imports late, once for all forks
from crafts_client.cli import app

count = last = 0

def dying(call):
    def counted(*arguments):
        global count
        count += 1
        if count == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments)
    return counted

def forked(point, words):
    global last
    said, saying = os.pipe()
    child = os.fork()
    if child == 0:
        last = point
        os.fsync, pathlib.Path.rename = dying(os.fsync), dying(pathlib.Path.rename)
        with contextlib.redirect_stdout(io.StringIO()):
            failed = app(words, standalone_mode=False)
        os.write(saying, str(count).encode())
        os._exit(1 if failed else 0)
    os.close(saying)
    with os.fdopen(said) as file:
        told = file.read()
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        return -os.WTERMSIG(status)
    assert status == 0, "the command failed by itself"
    return int(told)

print(json.dumps([forked(*command) for command in json.loads(sys.argv[1])]))
"""
"""Runs commands in forks of one process that has imported everything; each dies at a point."""


def run_until(*commands: tuple[int, list[object]]) -> list[int]:
    """Run each command until so many syncs and renames have begun; 0 is never.

    Returns:
        For each the signal that ended it, negative, or how many a whole run has.
    """
    asked = json.dumps([(point, [str(word) for word in words]) for point, words in commands])
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, asked],
        env=os.environ | {"PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    ends: list[int] = json.loads(done.stdout)
    return ends


def test_a_backup_that_was_killed_is_not_there(home: Path) -> None:
    outs = [home.with_name(f"b{point}.tar") for point in (1, 2)]
    killed = [(point + 1, ["backup", out, "--home", home]) for point, out in enumerate(outs)]
    assert run_until(*killed) == [-signal.SIGKILL] * 2
    for out in outs:
        assert not out.exists()
        assert run("backup", out, "--home", home).exit_code == 0
    left = {path.name for path in home.parent.iterdir() if path.name.startswith(".b")}
    assert left == set()


def test_a_restore_that_was_killed_is_no_home(home: Path) -> None:
    """At the first sync, or with some files moved: never a home that pays."""
    out = home.with_name("b.tar")
    assert run("backup", out, "--home", home).exit_code == 0
    (steps,) = run_until((0, ["restore", out, "--home", home.with_name("whole")]))
    points = {f"new-{point}": point for point in (1, steps - 3, steps - 1)}
    assert len(points) == 3
    killed = [
        (point, ["restore", out, "--home", home.with_name(name)]) for name, point in points.items()
    ]
    assert run_until(*killed) == [-signal.SIGKILL] * 3
    for name, point in points.items():
        new = home.with_name(name)
        with pytest.raises(HomeError, match="no site home"):
            SiteHome.open(new)
        again = run("restore", out, "--home", new)
        if point > 1:
            assert "is not empty" in again.stderr
            shutil.rmtree(new)
            again = run("restore", out, "--home", new)
        assert again.exit_code == 0
        assert Ledger(new / "ledger.db").restored_from() is not None


def test_a_backup_of_something_else_is_refused(home: Path) -> None:
    with pytest.raises(BackupError, match="no backup"):
        put_back(home / "site.toml", home.with_name("new"), newest_ledger=None)


def test_a_witness_folder_below_the_home_is_not_put_back_with_it(
    home: Path, study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A share that is mounted there would be away, and its old head in its place."""
    folder = home / "share"
    folder.mkdir()
    assert run("ledger", "witness", folder, "--home", home).exit_code == 0
    file = home / "site.toml"
    text = file.read_text()
    file.write_text(text.replace("witness_folders = []", f'witness_folders = ["{folder}"]'))
    monkeypatch.chdir(home.parent)
    out = backup_of(Path(home.name))
    lose(home)
    restore(out, home)
    assert not folder.exists()
    moved = run("ledger", "move", "--yes", "--home", home)
    assert (moved.exit_code, "mount it again" in moved.stderr) == (1, True)


def test_a_register_that_was_lost_is_missed_after_a_backup_too(home: Path, study: Study) -> None:
    """Else nobody would know any more who withdrew."""
    for name in ("patients.jsonl", "patients.jsonl.head"):
        (home / name).unlink()
    out = backup_of(home)
    lose(home)
    restore(out, home)
    assert run("ledger", "move", "--yes", "--home", home).exit_code == 0
    refused = study.ask(home, 2)
    assert isinstance(refused, HomeError)
    assert "patients were trained on here" in str(refused)


def test_a_backup_from_before_the_first_round_goes_on_by_an_export(
    tmp_path: Path, foundation, study: Study
) -> None:
    home = make_site_home(tmp_path / "young", foundation, study.coordinator.public_key).path
    site_key(SiteHome.open(home), None)  # as enrolment in a plan of sums does
    out, export = backup_of(home), tmp_path / "newest.csv"
    assert isinstance(study.ask(home, 1), str)
    assert run("ledger", "export", export, "--home", home).exit_code == 0
    spent = Ledger(home / "ledger.db").entries()
    lose(home)
    restore(out, home, "--ledger", export)
    assert Ledger(home / "ledger.db").entries()[:-1] == spent
    assert run("ledger", "move", "--yes", "--home", home).exit_code == 0
    assert isinstance(study.ask(home, 2), str)
    assert events(home) == 2


def test_who_vouches_is_told_whom_nobody_asked(home: Path, share: Path) -> None:
    """A backup from before the folder was begun does not name it."""
    new = home.with_name("new")
    restore(backup_of(home), new)
    asked = run("ledger", "move", "--home", new, text="n\n")
    assert f"{share} saw no more of it" in asked.stdout
    file = new / "site.toml"
    file.write_text(file.read_text().replace(f'"{share}"', ""))
    asked = run("ledger", "move", "--home", new, text="n\n")
    assert "Nobody was asked" in asked.stdout
    assert "witness_folders" in asked.stdout


def test_a_backup_without_keys_goes_on_by_an_export_and_the_kept_key(
    home: Path, study: Study
) -> None:
    out, export, kept = (home.with_name(name) for name in ("bare.tar", "newest.csv", "kept.key"))
    assert run("backup", out, "--without-keys", "--home", home).exit_code == 0
    shutil.copy(home / "keys" / "site.key", kept)
    assert isinstance(study.ask(home, 2), str)
    assert run("ledger", "export", export, "--home", home).exit_code == 0
    new = home.with_name("new")
    refused = run("restore", out, "--home", new, "--ledger", export)
    assert (refused.exit_code, "--site-key" in refused.stderr) == (1, True)
    restore(out, new, "--ledger", export, "--site-key", kept)
    assert events(new) == 2
    assert not (new / "keys").exists()
    kept.write_bytes(b"no key")
    refused = run(
        "restore", out, "--home", home.with_name("x"), "--ledger", export, "--site-key", kept
    )
    assert refused.exit_code == 1
