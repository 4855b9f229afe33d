"""A log knows each line that is not what was written, and keeps what it checked by its bytes."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import pytest

from crafts_core.chained_log import START, ChainedLog


@dataclass(frozen=True)
class Line:
    number: int
    previous: str
    text: str
    hash: str


def written(number: int, previous: str, text: str) -> str:
    digest = hashlib.sha256(f"{number} {previous} {text}".encode()).hexdigest()
    return f"{number} {previous} {text} {digest}"


class Counted:
    """Reads lines, and counts how many."""

    def __init__(self) -> None:
        self.read = 0

    def __call__(self, data: bytes) -> Line | None:
        self.read += 1
        number, previous, text, digest = data.decode().split(" ")
        line = Line(int(number), previous, text, digest)
        return line if written(line.number, previous, text) == data.decode() else None


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path, previous = tmp_path / "log", START
    for number in range(1, 6):
        text = written(number, previous, f"entry{number}")
        ChainedLog(path, Counted()).append([text], mode=0o600)
        previous = text.split(" ")[-1]
    return path


def test_what_was_written_is_read_and_checked_once(path: Path) -> None:
    parse = Counted()
    log = ChainedLog(path, parse)
    assert [line.text for line in log.read().lines] == [f"entry{n}" for n in range(1, 6)]
    assert log.read().broken_at is None
    assert parse.read == 5, "the same bytes are not checked again"
    new = written(6, log.read().lines[-1].hash, "entry6")
    log.append([new], mode=0o600)
    assert len(log.read().lines) == len(ChainedLog(path, parse).read().lines) == 6
    assert parse.read == 6, "only the line that is new is checked"
    path.write_text(path.read_text().replace("entry2", "entryX"))
    assert (len(log.read().lines), log.read().broken_at) == (1, 2)
    path.write_text(path.read_text().replace("entryX", "entry2"))
    assert (len(log.read().lines), log.read().broken_at) == (6, None)


@pytest.mark.parametrize(
    ("change", "broken_at"),
    [
        (lambda lines: [*lines[:2], lines[2].replace("entry3", "entryX"), *lines[3:]], 3),
        (lambda lines: [lines[0], *lines[2:]], 2),
        (lambda lines: lines[1:], 1),
        (lambda lines: [*lines[:3], lines[4], lines[3]], 4),
        (lambda lines: [*lines, lines[4]], 6),
    ],
)
def test_a_change_is_found_at_its_line_also_after_a_look(path: Path, change, broken_at) -> None:
    log = ChainedLog(path, Counted())
    assert log.read().broken_at is None
    lines = path.read_text().splitlines()
    path.write_text("".join(f"{line}\n" for line in change(lines)))
    chain = log.read()
    assert (chain.broken_at, len(chain.lines)) == (broken_at, broken_at - 1)


def test_the_newest_are_checked_among_themselves(path: Path) -> None:
    log = ChainedLog(path, Counted())
    assert [line.number for line in log.newest(2).lines] == [4, 5]
    first, *lines = path.read_text().splitlines()
    path.write_text("".join(f"{line}\n" for line in [first, *lines[:2], lines[3]]))
    assert log.newest(3).broken_at == 3


def test_a_torn_line_is_written_over(path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole + b"6 torn")
    log = ChainedLog(path, Counted())
    assert log.read().broken_at is None
    last = log.newest(1).lines[0]
    text = written(6, last.hash, "entry6")
    log.append([text], mode=0o600)
    assert path.read_bytes() == whole + text.encode() + b"\n"


def test_no_file_is_an_empty_log(tmp_path: Path) -> None:
    log = ChainedLog(tmp_path / "none", Counted())
    assert (log.read().lines, log.newest(3).lines) == ((), ())
