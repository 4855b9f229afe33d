"""A file of lines of which each has the hash of the one before, and what may be cut off it.

An edited, inserted or removed line breaks the chain; that the newest lines are missing no file can
show by itself. A last line without its end is what a crash tore: nobody was told that it is there.
What a line holds, how it is hashed and who else knows the newest one is its owner's to say.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from crafts_core.durable import append_line, newest_lines

START = "0" * 64
"""The hash before the first line."""


class Chained(Protocol):
    """A line as it was parsed, its own hash checked."""

    @property
    def number(self) -> int:
        """From 1."""

    @property
    def previous(self) -> str:
        """Hash of the line before."""

    @property
    def hash(self) -> str:
        """Of this line's content."""


Line = TypeVar("Line", bound=Chained)
Parse = Callable[[bytes], Line | None]
"""A line from its bytes; None where its hash is not of its content."""


@dataclass(frozen=True, slots=True)
class Chain(Generic[Line]):
    """The lines that follow from each other from the first one on."""

    lines: tuple[Line, ...]
    broken_at: int | None
    """Number of the first line that is not what was written there; None if all are."""


class ChainedLog(Generic[Line]):
    """One file. Who writes holds a lock of the file's owner; errors of the disk are not caught."""

    def __init__(self, path: Path, parse: Parse[Line]) -> None:
        self._path = path
        self._parse = parse

    def read(self) -> Chain[Line]:
        """All of it, whatever a crash tore left out; empty where there is no file.

        What was checked is kept, and of a log that begins with the same bytes only the lines after
        them are checked: one of years is asked often, and how long that takes tells nobody how
        long it is.
        """
        try:
            data = self._path.read_bytes()
        except FileNotFoundError:
            data = b""
        whole = data[: data.rfind(b"\n") + 1]
        known: _Known[Line] = _known(self._path, self._parse)
        checked, chain = known.newest
        if chain.broken_at is not None or not whole.startswith(checked):
            checked, chain = b"", Chain((), None)
        if len(whole) > len(checked):
            chain = _go_on(chain.lines, whole[len(checked) :], self._parse)
            known.newest = whole, chain
        return chain

    def newest(self, most: int) -> Chain[Line]:
        """At most so many from the end, each checked against the one before it among them."""
        texts, _ = newest_lines(self._path, most)
        lines: list[Line] = []
        for text in texts:
            line = self._parse(text)
            if line is None or (lines and line.previous != lines[-1].hash):
                return Chain(tuple(lines), len(lines) + 1)
            lines.append(line)
        return Chain(tuple(lines), None)

    def append(self, texts: Sequence[str], *, mode: int) -> None:
        """Write lines durably, in place of what a crash tore."""
        _, num_torn = newest_lines(self._path, 1)
        if num_torn:
            os.truncate(self._path, self._path.stat().st_size - num_torn)
        append_line(self._path, "\n".join(texts), mode=mode)


@dataclass(slots=True)
class _Known(Generic[Line]):
    """The bytes that were checked last, and the chain in them."""

    newest: tuple[bytes, Chain[Line]]


@lru_cache(maxsize=4)
def _known(_path: Path, _parse: Parse[Line]) -> _Known[Line]:
    return _Known((b"", Chain((), None)))


def _go_on(known: tuple[Line, ...], new: bytes, parse: Parse[Line]) -> Chain[Line]:
    lines = list(known)
    for number, text in enumerate(new.split(b"\n")[:-1], start=len(known) + 1):
        line = parse(text)
        previous = lines[-1].hash if lines else START
        if line is None or (line.number, line.previous) != (number, previous):
            return Chain(tuple(lines), number)
        lines.append(line)
    return Chain(tuple(lines), None)
