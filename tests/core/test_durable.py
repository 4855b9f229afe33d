"""A reader sees the old file or the new one, never a part; secrets are the owner's from birth."""

import errno
import os
import stat
import threading
import time
from pathlib import Path

import pytest

from crafts_core import durable


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    durable.write_file(path, "old")

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(durable.os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            durable.write_file(path, "new")
    assert path.read_text() == "old"
    durable.write_file(path, b"newer")
    assert path.read_bytes() == b"newer"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, object]]:
    """What happened in ``tmp_path``: what was synced with which content, and what renamed."""
    events: list[tuple[str, object]] = []
    sync, rename = os.fsync, Path.replace

    def synced(descriptor: int) -> None:
        found = os.fstat(descriptor)
        if stat.S_ISDIR(found.st_mode):
            events.append(("folder", sorted(file.name for file in tmp_path.iterdir())))
        else:
            (file,) = (each for each in tmp_path.iterdir() if each.stat().st_ino == found.st_ino)
            events.append(("file", file.read_bytes()))
        sync(descriptor)

    def renamed(path: Path, target: Path) -> Path:
        events.append(("name", target.name))
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", renamed)
    return events


def test_what_was_written_is_on_the_disk_before_it_has_its_name(tmp_path: Path, disk) -> None:
    durable.write_file(tmp_path / "file", "whole")
    assert disk == [("file", b"whole"), ("name", "file"), ("folder", ["file"])]


def test_an_appended_line_is_on_the_disk_before_the_call_returns(tmp_path: Path, disk) -> None:
    durable.append_line(tmp_path / "records", "one")
    assert disk == [("file", b"one\n"), ("folder", ["records"])]


def test_a_secret_is_the_owners_and_is_never_replaced(tmp_path: Path) -> None:
    path = tmp_path / "key"
    durable.create_secret(path, b"a")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(FileExistsError):
        durable.create_secret(path, b"b")
    assert path.read_bytes() == b"a"


def test_a_secret_that_could_not_be_written_whole_is_not_there(tmp_path: Path, monkeypatch) -> None:
    """Half of a key was taken for the key ever after."""

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(durable.os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            durable.create_secret(tmp_path / "key", b"a")
    assert list(tmp_path.iterdir()) == []
    durable.create_secret(tmp_path / "key", b"b")
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


def test_a_secret_where_no_file_has_a_second_name(tmp_path: Path, monkeypatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(durable.os, "link", refuse)
    path = tmp_path / "key"
    durable.create_secret(path, b"a")
    assert path.read_bytes() == b"a"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(FileExistsError):
        durable.create_secret(path, b"b")
    assert path.read_bytes() == b"a"


def test_a_private_file_stays_private_when_replaced(tmp_path: Path) -> None:
    path = tmp_path / "report"
    path.write_text("open to all")
    durable.write_file(path, "private", mode=0o600)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_directory_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    half = tmp_path / ".thing.writing"
    half.mkdir()
    (half / "left over").write_text("x")
    durable.write_directory(tmp_path / "thing", {"a": b"1"})
    assert {file.name for file in (tmp_path / "thing").iterdir()} == {"a"}
    with pytest.raises(FileExistsError):
        durable.write_directory(tmp_path / "thing", {"a": b"2"})


def test_lines_are_appended_and_a_torn_one_does_not_swallow_the_next(tmp_path: Path) -> None:
    path = tmp_path / "records"
    durable.append_line(path, "one", mode=0o600)
    durable.append_line(path, "two")
    assert path.read_text() == "one\ntwo\n"
    assert path.stat().st_mode & 0o777 == 0o600
    path.write_text("one\ntw")
    durable.append_line(path, "three")
    assert path.read_text() == "one\ntw\nthree\n"


def test_a_lock_whose_file_was_removed_is_nobodys(tmp_path: Path) -> None:
    """Who waited for it gets the one that others ask for now, not a file without a name."""
    path, held = tmp_path / "lock", BlockingIOError("held")
    has_it, may_end = threading.Event(), threading.Event()

    def waits() -> None:
        with durable.exclusive_lock(path, held=held, timeout_s=30.0):
            has_it.set()
            may_end.wait(30.0)

    waiter = threading.Thread(target=waits)
    with durable.exclusive_lock(path, held=held):
        waiter.start()
        time.sleep(0.1)
        path.unlink()
    assert has_it.wait(30.0)
    with pytest.raises(BlockingIOError, match="held"), durable.exclusive_lock(path, held=held):
        pass
    may_end.set()
    waiter.join()
