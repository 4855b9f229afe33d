"""The public words: 30 types, exact captions, a prompt bank that never changes by accident."""

import hashlib
from dataclasses import asdict

import numpy as np
import pytest

from crafts_core.vocabulary import (
    CANCER_TYPES,
    NORMAL_ORGANS,
    PATTERN_PHRASES,
    PartialAttributes,
    VocabularyError,
    cancer_type,
    caption_class,
    compose_caption,
    corpus,
    label_caption,
    label_code,
    prompt_bank,
    sample_attributes,
)

TCGA_30 = (
    "ACC BLCA BRCA CESC COAD ESCA GBM HNSC KICH KIRC KIRP LGG LIHC LUAD LUSC MESO OV PAAD PCPG "
    "PRAD READ SARC SKCM STAD TGCT THCA THYM UCEC UCS UVM"
).split()


def test_the_thirty_types_are_the_tcga_projects() -> None:
    assert [cancer.code for cancer in CANCER_TYPES] == TCGA_30
    assert len({cancer.name for cancer in CANCER_TYPES}) == 30


def test_a_caption_names_everything_that_was_drawn() -> None:
    rng = np.random.default_rng(0)
    for cancer in CANCER_TYPES:
        attributes = sample_attributes(rng, cancer)
        caption = compose_caption(cancer, attributes)
        said = [cancer.name, cancer.organ, PATTERN_PHRASES[attributes.growth_pattern]]
        said += [f"{attributes.nuclear_grade} grade", f"{attributes.stroma} stroma"]
        assert all(part in caption for part in [*said, *attributes.features])


def test_attributes_are_typical_of_their_type() -> None:
    rng = np.random.default_rng(1)
    clear = next(cancer for cancer in CANCER_TYPES if cancer.code == "KIRC")
    drawn = [sample_attributes(rng, clear) for _ in range(50)]
    assert all("clear cytoplasm" in attributes.features for attributes in drawn)
    assert {attributes.growth_pattern for attributes in drawn} == {"nests"}


def test_weights_of_a_look_are_probabilities() -> None:
    for cancer in CANCER_TYPES:
        assert sum(cancer.look.grades) == pytest.approx(1)
        assert sum(cancer.look.stroma) == pytest.approx(1)
        assert all(0 < p <= 1 for p in cancer.look.features.values())


@pytest.mark.parametrize(
    ("label", "code"),
    [("LUAD", "LUAD"), ("TCGA-KIRC", "KIRC"), ("lung_scc", "LUSC"), ("glioblastoma", "GBM"),
     ("colon_n", None), ("normal lung", None), (" coad ", "COAD")],
)  # fmt: skip
def test_labels_of_known_data_sets_are_understood(label: str, code: str | None) -> None:
    assert label_code(label) == code
    assert label_caption(label).startswith("H&E, ")


@pytest.mark.parametrize("label", ["", "lung_xyz", "normal unicorn", "TCGA-"])
def test_an_unknown_label_is_refused_by_name(label: str) -> None:
    with pytest.raises(VocabularyError, match="unknown cancer type"):
        label_caption(label)


def test_normal_tissue_needs_a_known_organ() -> None:
    with pytest.raises(VocabularyError, match="known: colon"):
        compose_caption(None, None, organ="unicorn")


def test_the_prompt_bank_covers_all_types_without_repeats() -> None:
    bank = prompt_bank()
    assert [prompt.cancer_code for prompt in bank] == [c for c in TCGA_30 for _ in range(4)]
    assert len({prompt.text for prompt in bank}) == len(bank)


def test_the_prompt_bank_is_the_published_one() -> None:
    """Anchors are part of every profile: a change here makes another foundation."""
    text = "\n".join(prompt.text for prompt in prompt_bank())
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "36545623214e0d00"


def test_the_corpus_holds_every_word_a_caption_can_hold() -> None:
    words = set(" ".join(corpus()).replace(",", " ").split())
    rng = np.random.default_rng(2)
    captions = [compose_caption(c, sample_attributes(rng, c)) for c in CANCER_TYPES]
    captions += [
        compose_caption(None, sample_attributes(rng, None, organ=organ), organ=organ)
        for organ in NORMAL_ORGANS
    ]
    assert {word for text in captions for word in text.replace(",", " ").split()} <= words


def test_a_caption_says_only_what_was_noted() -> None:
    colon = cancer_type("COAD")
    noted = PartialAttributes(stroma="scant", features=("necrosis",))
    assert (
        compose_caption(colon, noted) == "H&E, colon adenocarcinoma, colon, scant stroma, necrosis"
    )
    assert compose_caption(colon, PartialAttributes()) == compose_caption(colon, None)


def test_a_label_is_composed_with_its_attributes() -> None:
    noted = PartialAttributes(growth_pattern="crypts")
    assert label_caption("normal colon", noted) == "H&E, normal colon, regular crypts"
    assert label_caption("lung_aca", noted) == "H&E, lung adenocarcinoma, lung, regular crypts"


def test_all_attributes_are_composed_as_by_the_grammar_of_prompts() -> None:
    rng = np.random.default_rng(1)
    for cancer in CANCER_TYPES:
        drawn = sample_attributes(rng, cancer)
        same = PartialAttributes(**asdict(drawn))
        assert compose_caption(cancer, same) == compose_caption(cancer, drawn)


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("H&E, normal colon", 0),
        ("H&E, lung adenocarcinoma, lung", 2),
        ("H&E, lung adenocarcinoma, lung, glands", 2),
        ("H&E, lung adenocarcinoma, metastasis", 1),
        ("H&E, normal colonic mucosa", None),
        ("H&E", None),
        ("", None),
    ],
)
def test_a_caption_is_of_the_longest_class_that_it_begins_with(
    caption: str, expected: int | None
) -> None:
    classes = (
        "H&E, normal colon",
        "H&E, lung adenocarcinoma",
        "H&E, lung adenocarcinoma, lung",
    )
    assert caption_class(caption, classes) == expected
