"""Names that a site lists, of staff and patients, to be taken out of all its captions.

Scrubbing by shape leaves a bare surname, because captions are full of words that look like one. A
list settles it: every word of it goes, however it is spelled or joined. Words that pathology knows
as well (``Gross``, ``Gleason``) would take its own words along: they stay, and are shown.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from crafts_client.ingest.errors import IngestError
from crafts_client.ingest.identifiers import Kind, Span
from crafts_client.ingest.known_names import fold
from crafts_client.ingest.names import PARTICLES, TITLES
from crafts_client.ingest.plain_words import is_eponym, is_plain

MAX_NAMES_BYTES = 2**24
MIN_LETTERS = 3
"""Shorter names (``Li``) are also symbols: they stay, and are shown."""
MAX_ABBREVIATION = 4
"""So short a word without a capital (``max``) is no name."""
_WORD = re.compile(r"[^\W\d_]+")
_BEFORE = re.compile(r"(?<![^\W\d_])[^\W\d_]{1,2}['’‘]$")
_AFTER = re.compile(r"['’]s\b")


@dataclass(frozen=True, slots=True, kw_only=True)
class ListedNames:
    """What a list of names says about a text. Names people: never leaves the site."""

    words: frozenset[str]
    """What is taken out, in the one spelling that ``_spelled`` gives."""
    doubtful: frozenset[str]
    """What is shown where it stands as it is listed."""

    @classmethod
    def of(cls, names: Iterable[str]) -> Self:
        """Each name may have several words, and a title."""
        words = {word for name in names for word in _WORD.findall(name)}
        words = {w for w in words if w.lower() not in PARTICLES | TITLES}
        doubtful = {w for w in words if len(w) < MIN_LETTERS or is_plain(w) or is_eponym(w)}
        return cls(
            words=frozenset(_spelled(word) for word in words - doubtful),
            doubtful=frozenset(doubtful),
        )

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a list: UTF-8, one name a line; empty lines and those after ``#`` do not count.

        Raises:
            IngestError: it cannot be read, or a line holds no name.
        """
        try:
            if path.stat().st_size > MAX_NAMES_BYTES:
                raise IngestError(f"{path} is larger than {MAX_NAMES_BYTES >> 20} MiB")
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise IngestError(f"list of names {path} is not UTF-8; save it as UTF-8") from error
        except OSError as error:
            raise IngestError(f"cannot read list of names {path}: {error.strerror}") from error
        listed = [(n, line) for n, line in enumerate(lines, 1) if line.partition("#")[0].strip()]
        odd = [(n, "no name on it") for n, line in listed if not _WORD.search(line)]
        if odd:
            raise IngestError(*(f"{path} line {number}: {told}" for number, told in odd))
        return cls.of(line.partition("#")[0] for _, line in listed)

    def find(self, text: str) -> Iterator[Span]:
        """Where listed names stand, with ``O'`` before them and a genitive after."""
        for match in _WORD.finditer(text):
            if _spelled(match.group()) in self.words and _can_be_meant(match.group()):
                before = _BEFORE.search(text, max(0, match.start() - 3), match.start())
                after = _AFTER.match(text, match.end())
                yield Span(
                    match.start() if before is None else before.start(),
                    match.end() if after is None else after.end(),
                    Kind.LISTED,
                )

    def doubts(self, text: str) -> Iterator[str]:
        """Listed words that stay because they may mean something else."""
        return (word for word in _WORD.findall(text) if word in self.doubtful)


NOBODY = ListedNames(words=frozenset(), doubtful=frozenset())


def _can_be_meant(word: str) -> bool:
    is_short = len(word) <= MAX_ABBREVIATION and word[0].islower()
    return not is_short and not is_plain(word)


def _spelled(word: str) -> str:
    """One spelling for Müller, Mueller, MULLER and Muller."""
    return re.sub(r"(?<=[aou])e", "", fold(word).replace("ß", "ss"))
