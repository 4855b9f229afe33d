"""The audit log shows what was done, and that nobody changed it."""

import json
import threading
from io import FileIO
from pathlib import Path

import pytest

from crafts_core.durable import newest_lines
from crafts_server.audit_log import AuditLog, Event
from crafts_server.errors import AuditLogError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    log = AuditLog(tmp_path / "audit.jsonl")
    for site in ("north", "south", "west"):
        log.write(Event.ENROLLED, site=site)
    return tmp_path / "audit.jsonl"


def edited(lines: list[str], number: int, **changes: object) -> list[str]:
    values = json.loads(lines[number])
    return [*lines[:number], json.dumps(values | changes), *lines[number + 1 :]]


def test_what_was_written_is_read(path: Path) -> None:
    entries = AuditLog(path).verify()
    assert [entry.facts["site"] for entry in entries] == ["north", "south", "west"]
    assert AuditLog(path).num_entries == 3
    assert AuditLog(path.with_name("none.jsonl")).num_entries == 0
    assert AuditLog(path.with_name("none.jsonl")).verify() == []


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda lines: edited(lines, 1, facts={"site": "evil"}), 2),
        (lambda lines: edited(lines, 0, at="2020-01-01T00:00:00+00:00"), 1),
        (lambda lines: [lines[0], lines[2]], 2),
        (lambda lines: lines[1:], 1),
        (lambda lines: [lines[0], lines[2], lines[1]], 2),
        (lambda lines: [*lines, lines[2]], 4),
        (lambda lines: [lines[0], "{}", *lines[1:]], 2),
        (lambda lines: [lines[0], "no json", *lines[1:]], 2),
        (lambda lines: edited(lines, 2, more=1), 3),
    ],
)
def test_a_changed_line_is_named(path: Path, change, line: int) -> None:
    path.write_text("".join(text + "\n" for text in change(path.read_text().splitlines())))
    with pytest.raises(AuditLogError, match=f"line {line} is not what was written"):
        AuditLog(path).verify()


def test_a_line_that_a_crash_tore_is_written_over(path: Path) -> None:
    whole = path.read_text()
    path.write_text(whole + '{"number": 4, "at": "20')
    assert len(AuditLog(path).verify()) == 3
    AuditLog(path).write(Event.LEFT, site="west")
    assert [entry.event for entry in AuditLog(path).verify()][3:] == [Event.LEFT]


def test_writers_do_not_tear_the_chain(path: Path) -> None:
    def write() -> None:
        for _ in range(10):
            AuditLog(path).write(Event.INVITED, site="x")

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(AuditLog(path).verify()) == 43


def test_the_newest_lines_are_read_and_checked_without_the_others(path: Path) -> None:
    log = AuditLog(path)
    whole = log.verify()
    assert log.recent(2) == whole[1:]
    assert log.recent(100) == whole
    assert AuditLog(path.with_name("none.jsonl")).recent(5) == []
    lines = path.read_text().splitlines()
    for change in (edited(lines, 1, at="x"), [lines[0], lines[2]], [*lines, "no json"]):
        path.write_text("".join(text + "\n" for text in change))
        with pytest.raises(AuditLogError, match="one of the newest lines was altered"):
            log.recent(3)


def test_a_look_and_a_line_read_the_end_of_the_file_alone(path: Path, monkeypatch) -> None:
    """After years as on the first day: 100,000 lines took 102 ms a look, 208 ms a line."""
    padding = b"x" * 5_000_000 + b"\n"
    path.write_bytes(padding + path.read_bytes())
    read = 0

    class Counted(FileIO):
        def read(self, size: int = -1, /) -> bytes:
            nonlocal read
            content = super().read(size)
            read += len(content)
            return content

    monkeypatch.setattr(Path, "open", lambda self, mode: Counted(self, mode))
    log = AuditLog(path)
    assert log.num_entries == 3
    log.write(Event.LEFT, site="west")
    assert log.num_entries == 4
    assert read < 500_000


@pytest.mark.parametrize("torn", ["", "x", "x" * 200_000])
@pytest.mark.parametrize("width", [1, 65_535, 65_536, 65_537, 200_000])
def test_the_end_of_a_file_is_whole_lines_and_a_torn_one(path: Path, torn: str, width: int) -> None:
    lines = [f"{number}".ljust(width, ".") for number in range(5)]
    path.write_text("".join(line + "\n" for line in lines) + torn)
    for most in (1, 2, 5, 9):
        found, num_torn = newest_lines(path, most)
        assert [line.decode() for line in found] == lines[-most:]
        assert num_torn == len(torn)
    path.write_bytes(b"")
    assert newest_lines(path, 3) == ([], 0)
    assert newest_lines(path.with_name("none"), 3) == ([], 0)
