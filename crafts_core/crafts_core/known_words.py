"""Prompts of which a generator knows no word: it draws some tissue all the same."""

import re
from collections.abc import Iterable, Sequence

from crafts_core.vocabulary import corpus

_WORD = re.compile(r"[^\W\d_]{2,}")
_SAY_NOTHING = frozenset(
    {
        "an",
        "and",
        "as",
        "at",
        "by",
        "for",
        "from",
        "in",
        "is",
        "of",
        "on",
        "or",
        "the",
        "to",
        "with",
    }
    | {"eosin", "hematoxylin", "image", "section", "showing", "stained", "tissue"}
)
"""Words of captions that do not tell one tissue from another."""


def strange_prompts(prompts: Sequence[str], trained_on: Iterable[str]) -> list[str]:
    """Those prompts that share no telling word with what the generator was trained on.

    A prompt without a telling word is none of them: it asks for any tissue.

    Args:
        prompts: To be drawn.
        trained_on: Public captions of the training; the package's own vocabulary counts, too.
    """
    known = {word for text in (*trained_on, *corpus()) for word in _telling(text)}
    return [prompt for prompt in prompts if (asked := _telling(prompt)) and not known & asked]


def _telling(text: str) -> set[str]:
    return {word for word in _WORD.findall(text.lower()) if word not in _SAY_NOTHING}
