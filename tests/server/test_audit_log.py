"""The audit log shows what was done, and that nobody changed it."""

import json
import threading
from pathlib import Path

import pytest

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
