"""Attributes of tissue as a person writes them into a table, one column each."""

import re
from collections.abc import Mapping, Sequence
from typing import TypeVar

from crafts_core.vocabulary import (
    FEATURES,
    GRADES,
    GROWTH_PATTERNS,
    STROMA_AMOUNTS,
    PartialAttributes,
)

ATTRIBUTE_COLUMNS = ("growth_pattern", "nuclear_grade", "stroma", "features")

_SEPARATORS = re.compile(r"[;|]")
_Word = TypeVar("_Word", bound=str)


def read_attributes(cells: Mapping[str, str], problems: list[str]) -> PartialAttributes:
    """The attributes that are filled in.

    Args:
        cells: By column; others than ``ATTRIBUTE_COLUMNS`` are ignored. Features are separated by
            ``;`` or ``|``.
        problems: Gets a sentence for each word that is unknown, which is left out.
    """
    named = [word for word in _SEPARATORS.split(cells.get("features", "")) if word.strip()]
    features = {_one_of("features", word, FEATURES, problems) for word in named}
    return PartialAttributes(
        growth_pattern=_cell(cells, "growth_pattern", GROWTH_PATTERNS, problems),
        nuclear_grade=_cell(cells, "nuclear_grade", GRADES, problems),
        stroma=_cell(cells, "stroma", STROMA_AMOUNTS, problems),
        features=tuple(feature for feature in FEATURES if feature in features),
    )


def _cell(
    cells: Mapping[str, str], column: str, allowed: Sequence[_Word], problems: list[str]
) -> _Word | None:
    word = cells.get(column, "")
    return _one_of(column, word, allowed, problems) if word else None


def _one_of(column: str, word: str, allowed: Sequence[_Word], problems: list[str]) -> _Word | None:
    """The allowed value that is written so, in any case and with _ for spaces."""
    written = " ".join(word.lower().replace("_", " ").split())
    if written in allowed:
        return allowed[[str(value) for value in allowed].index(written)]
    problems.append(f"{column} {word.strip()!r} is none of: {', '.join(allowed)}")
    return None
