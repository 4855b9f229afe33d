"""A prompt without a word that was trained on is named."""

import pytest

from crafts_core.known_words import strange_prompts
from crafts_core.vocabulary import CANCER_TYPES, compose_caption


@pytest.mark.parametrize(
    "prompt", ["a dog on a skateboard", "Gare du Nord", "ein Hund", "H&E stained image of a dog"]
)
def test_what_no_caption_says_is_strange(prompt: str) -> None:
    assert strange_prompts([prompt], []) == [prompt]


@pytest.mark.parametrize(
    "prompt", ["", "  ", "tissue", "H&E", "a dog with lung carcinoma", "GLANDS"]
)
def test_one_known_word_is_enough_and_any_tissue_may_be_asked_for(prompt: str) -> None:
    assert strange_prompts([prompt], []) == []


def test_captions_of_the_generator_count() -> None:
    assert strange_prompts(["Langerhans islets"], []) == ["Langerhans islets"]
    assert strange_prompts(["Langerhans islets"], ["human islets"]) == []


def test_no_composed_caption_is_strange() -> None:
    captions = [compose_caption(cancer, None) for cancer in CANCER_TYPES]
    assert strange_prompts(captions, []) == []
