"""Yes-or-no questions about a tile, from what captions say.

A part of a caption between two commas is what a tile may show: its class, its organ, an attribute.
What a caption does not say need not be absent: a growth pattern, a grade or an amount of stroma is
asked about only where the caption names one; a feature only where it names any attribute.

Letters: N tiles, Q questions.
"""

import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from crafts_core.evaluation.downstream.pool import FEWEST_PATIENTS
from crafts_core.evaluation.resampling import Patients
from crafts_core.vocabulary import FEATURES, GRADES, PATTERN_PHRASES, STROMA_AMOUNTS

Answers = npt.NDArray[np.int8]
NO, YES, UNKNOWN = 0, 1, -1
_EXCLUSIVE = (
    tuple(PATTERN_PHRASES.values()),
    tuple(f"{grade} grade nuclei" for grade in GRADES),
    tuple(f"{amount} stroma" for amount in STROMA_AMOUNTS),
)
_ATTRIBUTES = (*(phrase for family in _EXCLUSIVE for phrase in family), *FEATURES)
_STAIN = "H&E"
_MOST = 24


def in_words(phrase: str) -> str:
    """The question as a person would ask it."""
    return f"Does this tile show {phrase}?"


def caption_of(phrase: str) -> str:
    """What a caption says of a tile that shows it: the text that is embedded."""
    return f"{_STAIN}, {phrase}"


def answer(caption: str, phrase: str) -> int:
    """Yes, no, or unknown."""
    if _says(caption, phrase):
        return YES
    if phrase not in _ATTRIBUTES:
        return NO
    family = next((each for each in _EXCLUSIVE if phrase in each), _ATTRIBUTES)
    return NO if any(_says(caption, other) for other in family) else UNKNOWN


def answers(captions: Sequence[str], phrases: Sequence[str]) -> Answers:
    """Every question about every caption, (N, Q)."""
    distinct, place_N = np.unique(np.asarray(captions), return_inverse=True)
    found = [[answer(caption, phrase) for phrase in phrases] for caption in distinct.tolist()]
    return np.asarray(found, dtype=np.int8).reshape(len(distinct), len(phrases))[place_N]


def phrases_of(captions: Sequence[str], patients: Patients) -> list[str]:
    """What is worth asking: answered yes, and no, of at least four patients each.

    Phrases with the same answers are asked about once; of more than 24 those are kept whose rarer
    answer has the most patients.
    """
    parts = {part.strip() for caption in set(captions) for part in caption.split(",")}
    phrases = sorted(parts - {_STAIN, ""})
    answer_NQ = answers(captions, phrases)
    rarer: dict[str, int] = {}
    asked: set[bytes] = set()
    for place, phrase in enumerate(phrases):
        column_N = answer_NQ[:, place]
        fewest = min(len(np.unique(patients[column_N == each])) for each in (NO, YES))
        if fewest >= FEWEST_PATIENTS and column_N.tobytes() not in asked:
            asked.add(column_N.tobytes())
            rarer[phrase] = fewest
    return sorted(rarer, key=lambda phrase: (-rarer[phrase], phrase))[:_MOST]


def _says(caption: str, phrase: str) -> bool:
    """As whole words: ``normal lung`` says ``lung``."""
    return re.search(rf"(?<!\w){re.escape(phrase)}(?!\w)", caption) is not None
