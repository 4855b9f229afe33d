"""Types of tissue to draw many images of, with attributes drawn from the public grammar."""

from collections.abc import Sequence

import numpy as np

from crafts_core.vocabulary import (
    CANCER_TYPES,
    NORMAL_ORGANS,
    TissueAttributes,
    VocabularyError,
    cancer_type,
    compose_caption,
    label_caption,
    label_code,
    sample_attributes,
)

ALL_TYPES = "all"
_NORMAL = "normal "


def read_types(words: Sequence[str]) -> list[str]:
    """Types as labels: TCGA codes, and ``normal <organ>``. Each once, in the order given.

    Args:
        words: Codes, plain names, ``normal <organ>``; several may share a word, with commas
            between. ``all`` is every cancer type.

    Raises:
        VocabularyError: names a word that is no type, or says that there is none.
    """
    labels: dict[str, None] = {}
    for word in (part.strip() for text in words for part in text.split(",")):
        if word.lower() == ALL_TYPES:
            labels.update(dict.fromkeys(cancer.code for cancer in CANCER_TYPES))
        elif word:
            labels[read_type(word)] = None
    if not labels:
        raise VocabularyError("no type is named; `crafts prompts` lists them, `all` is every one")
    return list(labels)


def caption_of_type(
    label: str, rng: np.random.Generator, *, with_attributes: bool
) -> tuple[str, TissueAttributes | None]:
    """A caption of a type, and what it says is to be seen; how often follows public textbooks."""
    organ = label.removeprefix(_NORMAL) if label.startswith(_NORMAL) else None
    cancer = None if organ is not None else cancer_type(label)
    if not with_attributes:
        return compose_caption(cancer, None, organ=organ), None
    attributes = sample_attributes(rng, cancer, organ=organ)
    return compose_caption(cancer, attributes, organ=organ), attributes


def read_type(word: str) -> str:
    """One type as its label.

    Raises:
        VocabularyError: the word is none.
    """
    code = label_code(word)
    if code is not None:
        return code
    caption = label_caption(word)
    normal = (
        organ for organ in NORMAL_ORGANS if caption == compose_caption(None, None, organ=organ)
    )
    return _NORMAL + next(normal)
