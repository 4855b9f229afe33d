"""Scrubbing: free text loses what could say whose it is, and the operator sees what it lost.

A pass finds identifiers, names and the row's own names, takes them out and tidies what is left;
passes go on until one finds nothing, so that scrubbing twice is scrubbing once. Rules find shapes,
not people: a bare surname stays unless the site lists it. Words that might be one are shown to a
person.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from crafts_client.ingest.identifiers import Kind, Span, find_identifiers
from crafts_client.ingest.known_names import fold, known_pattern, may_be_in
from crafts_client.ingest.listed_names import NOBODY, ListedNames
from crafts_client.ingest.names import find_names
from crafts_client.ingest.names_beside import find_names_beside
from crafts_client.ingest.plain_words import is_acronym, is_eponym, is_plain

MAX_PASSES = 8
"""Text that is not settled by then was made to defeat scrubbing; nothing of it is kept."""

_KEPT_TEXTS = 1024
_HOLE = "\ue000"
"""Stands where something was taken out, until the text is tidied. No input holds it."""
_HOLES = re.compile(rf"{_HOLE}(?:[\s,;:/&.!?]*{_HOLE})+")
_BRACKETS = re.compile(rf"[(\[{{][\s,;:.–-]*{_HOLE}[\s,;:.–-]*[)\]}}]")
_AROUND = re.compile(rf"(?P<left>[,;:.!?])? ?{_HOLE} ?(?P<right>(?: ?(?:[,;:!?]|\.(?!\d)))*)")
_SPACES = re.compile(r"\s+")
_INVISIBLE = ("Cc", "Cf", "Co", "Cs", "Cn")
_STRONG = ".!?"
_AT_START, _AT_END = " ,;:.!?–-", " ,;:–-"
_LOOK = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")
_SENTENCE_END = re.compile(r"(?:^|[.!?:;]|[\n•])[\s\"'“‘(\[]*$")
_CODE_AFTER = re.compile(r"[-/]?\d")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scrubbed:
    """Text without what could identify, and what that was. Only ``text`` may leave the operator."""

    text: str
    found: Mapping[Kind, int] = field(hash=False)
    """How often each kind was removed; kinds that were not are absent."""
    marked: str
    """The text as it was, with ``[date]`` and the like in place of what was removed."""
    look_at: tuple[str, ...]
    """Capitalised words inside sentences that pathology does not know, and listed names that it
    knows: kept, perhaps names."""


@dataclass(slots=True)
class _Draft:
    """The text so far, and where each of its characters stood at first."""

    text: str
    places: list[int]

    def replace(self, pattern: re.Pattern[str], new: Callable[[re.Match[str]], str] | str) -> None:
        """``re.sub`` that keeps places; a replacement is never longer than what it replaces."""
        pieces: list[str] = []
        places: list[int] = []
        end = 0
        for match in pattern.finditer(self.text):
            text = new if isinstance(new, str) else new(match)
            pieces += (self.text[end : match.start()], text)
            places += self.places[end : match.start()]
            places += self.places[match.start() : match.start() + len(text)]
            end = match.end()
        self.text = "".join((*pieces, self.text[end:]))
        self.places = places + self.places[end:]

    def strip(self, at_start: str, at_end: str) -> None:
        """``str.strip`` that keeps places."""
        stripped = self.text.lstrip(at_start)
        self.places = self.places[len(self.text) - len(stripped) :]
        self.text = stripped.rstrip(at_end)
        del self.places[len(self.text) :]

    def cut(self, spans: Iterable[Span]) -> None:
        """Leave a hole for each of some spans that are in order and do not overlap."""
        pieces: list[str] = []
        places: list[int] = []
        end = 0
        for span in spans:
            pieces += (self.text[end : span.start], _HOLE)
            places += self.places[end : span.start + 1]
            end = span.end
        self.text = "".join((*pieces, self.text[end:]))
        self.places = places + self.places[end:]


def scrub(text: str, *, known: Collection[str] = (), listed: ListedNames = NOBODY) -> Scrubbed:
    """Remove what could identify a patient.

    Args:
        text: Free text: a caption, a report.
        known: Names that must not be left whatever they look like, as ``identifying_names`` gives
            them.
        listed: Names that the site wants out of all texts.

    Returns:
        Guarantees: scrubbing the result again changes nothing; it is not longer than ``text``, has
        no run of five digits, none of ``known`` and nothing that ``listed`` finds. Time is linear
        in the length of ``text``.
    """
    original = _visible(text)
    draft = _Draft(original, list(range(len(original))))
    removed: list[Span] = []
    spans = _find(draft.text, known, listed)
    flat = original == " ".join(original.split())
    for _ in range(MAX_PASSES):
        if flat and not spans:
            break
        removed += [_in_original(span, draft) for span in spans]
        draft.cut(spans)
        _tidy(draft)
        flat = True
        spans = _find(draft.text, known, listed)
    else:
        draft = _Draft("", [])
    return Scrubbed(
        text=draft.text,
        found=_counts(removed),
        marked=_marked(original, removed),
        look_at=tuple(dict.fromkeys([*_look_at(draft.text), *listed.doubts(draft.text)])),
    )


def _visible(text: str) -> str:
    """Composed letters, and no characters that cannot be seen but split a word."""
    seen = "".join(
        letter
        for letter in text
        if letter.isspace() or unicodedata.category(letter) not in _INVISIBLE
    )
    composed = unicodedata.normalize("NFC", seen)
    return composed if len(composed) <= len(seen) else seen


def _find(text: str, known: Collection[str], listed: ListedNames) -> list[Span]:
    """What to remove, in order and without overlap."""
    found, folded = [*_by_shape(text), *listed.find(text)], fold(text)
    names = known_pattern([name for name in known if may_be_in(name, folded)])
    if names is not None:
        found += [Span(*match.span(), Kind.KNOWN) for match in names.finditer(folded)]
    return _merged(found)


@lru_cache(maxsize=_KEPT_TEXTS)
def _by_shape(text: str) -> tuple[Span, ...]:
    """Identifiers and names that follow from the text alone: many rows share a caption."""
    found = tuple(find_identifiers(text))
    dates = [span for span in found if span.kind is Kind.DATE]
    return (*found, *find_names(text), *find_names_beside(text, dates))


def _merged(spans: Iterable[Span]) -> list[Span]:
    """Overlapping spans as one, of the kind of the one that begins first, or is listed first."""
    merged: list[Span] = []
    for span in sorted(spans, key=lambda span: span.start):
        if merged and span.start < merged[-1].end:
            merged[-1] = merged[-1]._replace(end=max(merged[-1].end, span.end))
        else:
            merged.append(span)
    return merged


def _in_original(span: Span, draft: _Draft) -> Span:
    return Span(draft.places[span.start], draft.places[span.end - 1] + 1, span.kind)


def _tidy(draft: _Draft) -> None:
    """Close the holes: no empty brackets, doubled stops or hanging commas."""
    had_holes = _HOLE in draft.text
    draft.replace(_SPACES, " ")
    if had_holes:
        draft.replace(_HOLES, _one_hole)
        draft.replace(_BRACKETS, _HOLE)
        draft.replace(_AROUND, _joint)
        draft.replace(_SPACES, " ")
        draft.strip(_AT_START, _AT_END)
    draft.strip(" ", " ")


def _one_hole(match: re.Match[str]) -> str:
    """Holes with nothing but stops between; the end of a sentence is kept."""
    return f"{_HOLE}." if any(stop in match.group() for stop in _STRONG) else _HOLE


def _joint(match: re.Match[str]) -> str:
    """One stop where two would meet across a hole, the stronger one."""
    stops = [stop for stop in (match["left"] or "") + match["right"] if stop != " "]
    strong = [stop for stop in stops if stop in _STRONG]
    stop = (strong or stops[-1:] or [""])[0]
    inside = match.start() > 0 and match.end() < len(match.string)
    return stop + " " if inside else stop


def _counts(removed: Iterable[Span]) -> dict[Kind, int]:
    counts = Counter(span.kind for span in removed)
    return {kind: counts[kind] for kind in Kind if counts[kind]}


def _marked(original: str, removed: Iterable[Span]) -> str:
    pieces: list[str] = []
    end = 0
    for span in _merged(removed):
        pieces += (original[end : span.start], f"[{span.kind}]")
        end = span.end
    return " ".join("".join((*pieces, original[end:])).split())


def _look_at(text: str) -> tuple[str, ...]:
    """Words that begin with a capital where no sentence does."""
    words: dict[str, None] = {}
    for match in _LOOK.finditer(text):
        before = text[max(0, match.start() - 4) : match.start()]
        code = _CODE_AFTER.match(text, match.end())
        if code is None and not _SENTENCE_END.search(before) and _might_be_name(match.group()):
            words[match.group()] = None
    return tuple(words)


def _might_be_name(word: str) -> bool:
    """Any part of a compound counts. Surnames in capitals do from four letters on."""
    return any(
        part[0].isupper()
        and not (is_acronym(part) and (len(part) < 4 or not part.isupper()))
        and len(part) > 1
        and not is_plain(part)
        and not is_eponym(part)
        for part in word.split("-")
    )
