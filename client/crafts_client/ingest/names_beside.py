"""Names that stand beside a date, or beside a word of birth: whose they are, the date says.

There a word that is also an eponym (``Hans Müller, born 3.4.1950``) names a person, and so does one
that pathology does not know.
"""

import re
from collections.abc import Iterable, Iterator

from crafts_client.ingest.identifiers import Kind, Span
from crafts_client.ingest.names import PARTICLES, name_after
from crafts_client.ingest.plain_words import SURNAMES_TOO, is_eponym, is_plain

_MOST_WORDS = 6
_MIN_DIGITS = 4
"""Of a date that may be one of birth; ``in March`` is none."""
_BIRTH = re.compile(
    r"\*(?=\s?\d)|\b(?:born|geb\.|geboren(?:e[nr]?)?|n[ée]e|DOB|D\.O\.B\.|date\sof\sbirth|geburtsdatum"
    r"|n[ée]e?\sle|nat[oa]|nacid[oa])(?!\w)",
    re.IGNORECASE,
)
_BETWEEN = re.compile(r"[\s,;:(\[*–-]{0,4}$")
_STOPS = re.compile(r"[\s,:;–-]{0,3}")
_WORD_BEFORE = re.compile(r"(?:[^\W\d_]+(?:['’-][^\W\d_]+)*|(?<![^\W_])[A-Z]\.)[\s,]{0,2}$")
_SENTENCE_START = re.compile(r"(?:^|[.!?:;\n])\s*$")


def find_names_beside(text: str, dates: Iterable[Span]) -> Iterator[Span]:
    """Every name before a full date, and before or after a word of birth."""
    for date in dates:
        is_birth = bool(_BIRTH.match(text, date.start))
        digits = sum(letter.isdigit() for letter in text[date.start : date.end])
        # After ``on`` or ``vom`` it is a day of what was done.
        is_bare = text[date.start].isdigit() or text[date.start].isupper()
        if is_birth or (is_bare and digits >= _MIN_DIGITS):
            yield from _before(text, date.start, is_birth=is_birth)
        end = name_after(text, _past_stops(text, date.end)) if is_birth else None
        if end is not None:
            yield Span(date.end, end, Kind.NAME)
    for birth in _BIRTH.finditer(text):
        yield from _before(text, birth.start(), is_birth=True)
        end = name_after(text, birth.end())
        if end is not None:
            yield Span(birth.start(), end, Kind.NAME)


def _before(text: str, end: int, *, is_birth: bool) -> Iterator[Span]:
    """The words of a name that end there."""
    head = text[max(0, end - 200) : end]
    offset = end - len(head)
    stop = len(_BETWEEN.sub("", head))
    start, num_words, is_known = stop, 0, True
    position = stop
    for _ in range(_MOST_WORDS):
        found = _WORD_BEFORE.search(head[:position])
        if found is None:
            break
        word = found.group().rstrip(" ,\n")
        if _is_name(word):
            start, num_words, is_known = found.start(), num_words + 1, is_known and is_eponym(word)
        elif not (word in PARTICLES or word[1:] == "." or word.lower() in SURNAMES_TOO):
            break
        position = found.start()
    if num_words == 0:
        return
    # One word at the beginning of a sentence begins with a capital whatever it is.
    is_any_word = num_words == 1 and not is_known and _SENTENCE_START.search(head[:start])
    if is_birth or not is_any_word:
        yield Span(offset + min(start, position), offset + stop, Kind.NAME)


def _past_stops(text: str, place: int) -> int:
    found = _STOPS.match(text, place)
    return place if found is None else found.end()


def _is_name(word: str) -> bool:
    return len(word) > 1 and word[0].isupper() and (is_eponym(word) or not is_plain(word))
