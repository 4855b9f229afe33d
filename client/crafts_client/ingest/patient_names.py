"""Which names are one patient's, which may be, and which a spreadsheet spoilt.

Privacy is promised to patients: one who has two names would be promised half of it, and two who
share a name something that neither has. Only what is beyond doubt is joined (barcodes that begin
with the participant); what only looks alike is told, for a person to decide.
"""

import re
import unicodedata
from itertools import groupby

_BARCODES = tuple(
    re.compile(pattern + r"(?:-.*)?", re.IGNORECASE | re.DOTALL)
    for pattern in (
        r"(TCGA-[A-Z0-9]{2}-[A-Z0-9]{4})",
        r"(TARGET-\d{2}-[A-Z0-9]{6})",
        r"(GTEX-[A-Z0-9]{4,5})",
        r"(C3[LN]-\d{5})",
    )
)
"""Of TCGA, TARGET, GTEx and CPTAC: the participant, then sample, portion, slide."""
_SEPARATORS = re.compile(r"[_.\s‐-―−]")
_WHOLE_FLOAT = re.compile(r"(\d+)[.,]0+")
_GROUPED = re.compile(r"\d{1,3}(?:[ .,'’]\d{3})+")
_ACCENTS = re.compile("[\u0300-\u036f]")
_RUNS = re.compile(r"[^\W\d_]+|\d+")
_NUKTA = 7
"""The class of the dot below Indian letters, which some write and some do not."""
_DIGITS = re.compile(r"(\d+)")
_SHORTENED = re.compile(r"[+-]?\d(?:[.,]\d+)?[eE]\+\d{2,3}")
_DAY = re.compile(r"\d{1,2}-(?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec)")
EXACT_DIGITS = 15
"""As many of a number as a spreadsheet keeps."""

_MISSING = frozenset({
    "nan", "-nan", "na", "n/a", "n.a.", "n.a", "#n/a", "#n/a n/a", "#na", "#nv", "<na>", "nat",
    "na_character_", "none", "null", "nil", "(none)", "(null)", "missing", "unknown",
    "not available", "not applicable", "#ref!", "#name?", "#value!", "#div/0!", "#null!", "#num!",
    "#bezug!", "#wert!",
})  # fmt: skip
"""What pandas, R, databases, spreadsheets and people write where they have nothing to say."""


def is_missing(cell: str) -> bool:
    """Whether a cell only says that there is nothing in it."""
    text = " ".join(_visible(cell).casefold().split())
    return text in _MISSING or not any(letter.isalnum() for letter in text)


def participant(name: str) -> str:
    """Whose sample a barcode names, where all barcodes of its kind do; else the name as it is."""
    plain = _SEPARATORS.sub("-", _visible(name).strip())
    for barcode in _BARCODES:
        if found := barcode.fullmatch(plain):
            return found[1].upper()
    return name


def likeness(name: str) -> str:
    """The same for names that a person may have written, or a program changed, for one patient.

    Capitals, accents, dashes, blanks, zeros before a number, ``.0`` after it and signs that cannot
    be seen make no difference.
    """
    decomposed = unicodedata.normalize("NFKD", _visible(name)).casefold()
    text = unicodedata.normalize("NFC", _ACCENTS.sub("", decomposed)).strip()
    if whole := _WHOLE_FLOAT.fullmatch(text):
        text = whole[1]
    elif _GROUPED.fullmatch(text):
        text = "".join(_RUNS.findall(text))
    # Letters and digits part themselves; between two numbers the gap is what tells 1-11 from 11-1.
    parts = ["".join(part) for is_part, part in groupby(text, _is_of_a_name) if is_part]
    runs = [run for part in parts for run in _DIGITS.split(part) if run]
    runs = [f"-{_number(run)}" if run.isdecimal() else run for run in runs]
    return "".join(runs) or text


def _is_of_a_name(letter: str) -> bool:
    """Letters, digits, and the vowels that Indian and Thai letters carry, which are no accents."""
    is_vowel = "\u0900" <= letter <= "\u109f" and unicodedata.category(letter) in ("Mc", "Mn")
    return letter.isalnum() or (is_vowel and unicodedata.combining(letter) != _NUKTA)


def _number(digits: str) -> str:
    """In Latin digits, without zeros in front."""
    return "".join(str(unicodedata.decimal(digit)) for digit in digits).lstrip("0") or "0"


def lost_in_a_spreadsheet(name: str) -> str | None:
    """Why a name cannot be what was once typed; None where nothing speaks for it."""
    if _SHORTENED.fullmatch(name):
        return "is a long number that a spreadsheet cut short, so that several people may have it"
    if _DAY.fullmatch(name):
        return "is a number that a spreadsheet took for a day"
    return None


def is_rounded(name: str) -> bool:
    """Whether a number has only zeros where a spreadsheet keeps no digits."""
    return is_long_number(name) and not name[EXACT_DIGITS:].strip("0")


def is_long_number(name: str) -> bool:
    """Whether a name is a number that a spreadsheet does not keep whole."""
    return name.isdecimal() and len(name) > EXACT_DIGITS


def _visible(name: str) -> str:
    """Without zero-width spaces, marks of direction, soft hyphens and the like."""
    kept = (c for c in name if c.isspace() or unicodedata.category(c) not in ("Cf", "Cc"))
    return unicodedata.normalize("NFKC", "".join(kept))
