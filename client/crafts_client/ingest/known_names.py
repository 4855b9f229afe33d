"""A row's own names: what its patient, case and file are called, and must not stand in its caption.

Names are looked for whatever their shape: in any case, with or without accents, and with other
separators (``P-0123`` is found as ``p_0123``, ``P0123`` and ``P. 0123``).
"""

import re
import unicodedata
from collections.abc import Collection, Iterator
from itertools import groupby
from pathlib import PurePath

from crafts_client.ingest.plain_words import SURNAMES_TOO, is_plain

_RUNS = re.compile(r"[^\W\d_]+|\d+")
_PARTS = re.compile(r"[^\W_]+")
_CLINICAL = re.compile(
    r"[a-dglmnrstv]?\d{1,2}|[^\W\d_]|a[nst]|ck|er|he|i[insv]|ki|ln|no|o[fnr]|pr|to|vi",
    re.IGNORECASE,
)
"""Too short to be kept from captions, where they mean a stage, a grade, a block or a stain."""
_GAP = r"[\W_]{0,3}"
_UMLAUT = {"ä": "ae?", "ö": "oe?", "ü": "ue?", "ß": "(?:ß|ss)"}


def identifying_names(*, patient: str, case: str, file: str, names: str = "") -> tuple[str, ...]:
    """What of a row's own names would identify it: what stands between words, and its parts.

    A word of pathology is no name (a case called ``breast-carcinoma-Wyss`` is ``Wyss``), and a
    short number is one only beside what it counts: ``patient 17``. ``names`` are those
    of people, parted by semicolons or bars.
    """
    path = PurePath(file)
    found: dict[str, None] = {}
    for name, what in ((patient, "patient"), (case, "case"), (path.stem, "slide")):
        found.update(dict.fromkeys(_of_name(name, what)))
    found.update(dict.fromkeys(_of_name(path.parent.name, "folder")))
    for name in re.split(r"[;|]", names):
        found.update(dict.fromkeys(_of_name(name, "name")))
    return tuple(found)


def known_pattern(names: Collection[str]) -> re.Pattern[str] | None:
    """Finds names in text that went through ``fold``; None if no name holds a letter or digit."""
    expressions = {expression for name in names if (expression := _expression(name))}
    if not expressions:
        return None
    # The longest first, so that a whole name goes before its parts.
    return re.compile("|".join(sorted(expressions, key=lambda text: (-len(text), text))))


def may_be_in(name: str, folded: str) -> bool:
    """Whether a name could be found in text that went through ``fold``: all its numbers are there.

    Most names have one that is not, and need no expression of their own.
    """
    runs = _RUNS.findall(unicodedata.normalize("NFC", name).lower())
    return all(fold(run) in folded for run in runs if run.isdecimal())


def fold(text: str) -> str:
    """Small letters without accents, one for each character of ``text``."""
    if text.isascii():
        return text.lower()
    return "".join(_folded(character) for character in text)


def _of_name(name: str, what: str) -> Iterator[str]:
    parts = _PARTS.findall(name)
    if len(parts) == 1 and _is_short_number(parts[0]):
        yield f"{what} {parts[0]}"
    for plain, group in groupby(parts, _is_plain_word):
        run = list(group)
        if plain or _is_short_number("".join(run)) or _CLINICAL.fullmatch("".join(run)):
            continue
        yield "-".join(run)
        yield from (part for part in run if len(part) > 2 and not _says_nothing(part))


def _is_plain_word(part: str) -> bool:
    letters = part.isalpha() and len(part) > 1
    return letters and is_plain(part) and part.lower() not in SURNAMES_TOO


def _is_short_number(text: str) -> bool:
    return text.isdecimal() and len(text) < 4


def _says_nothing(part: str) -> bool:
    return _is_short_number(part) or _CLINICAL.fullmatch(part) is not None


def _folded(character: str) -> str:
    small = unicodedata.normalize("NFD", character)[0].lower()
    return small if len(small) == 1 else character


def _expression(name: str) -> str:
    """Runs of letters and of digits in a row; neither goes on with more of its own."""
    runs = _RUNS.findall(unicodedata.normalize("NFC", name).lower())
    if not runs:
        return ""
    first, last = (r"\d" if runs[end].isdecimal() else r"[^\W\d_]" for end in (0, -1))
    body = _GAP.join(_spelled(run) for run in runs)
    return f"(?<!{first}){body}(?!{last})"


def _spelled(run: str) -> str:
    """The run as an expression that also takes ä for ae and the other way round."""
    return re.sub(r"(?<=[aou])e|ss|.", _letter, run)


def _letter(match: re.Match[str]) -> str:
    letter = match.group()
    if letter == "e":
        return "e?" if match.string[: match.start()].endswith(("a", "o", "u")) else "e"
    if letter == "ss":
        return "(?:ß|ss)"
    return _UMLAUT.get(letter) or re.escape(_folded(letter))
