"""The public words of the system: 30 cancer types, tissue attributes, captions, the prompt bank.

The 30 types are TCGA projects. What each type tends to look like is textbook histology, written
here as weights; it decides what procedural tissue is rendered and what its caption says. Stain and
scanner never enter a caption: they belong to a laboratory, not to a tissue.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from crafts_core.errors import CraftsError

GrowthPattern = Literal[
    "glands", "crypts", "follicles", "papillae", "nests", "squamous", "sheets", "cords",
    "trabeculae", "spindle", "fibrillar", "alveoli",
]  # fmt: skip
Grade = Literal["low", "intermediate", "high"]
Stroma = Literal["scant", "moderate", "abundant"]
Feature = Literal[
    "clear cytoplasm", "eosinophilic cytoplasm", "goblet cells", "colloid", "keratin pearls",
    "prominent nucleoli", "necrosis", "pigment", "many lymphocytes", "red blood cells",
    "myxoid stroma",
]  # fmt: skip

PATTERN_PHRASES: dict[GrowthPattern, str] = {
    "glands": "glands with lumina",
    "crypts": "regular crypts",
    "follicles": "follicles",
    "papillae": "papillae",
    "nests": "nests of cells",
    "squamous": "squamous nests",
    "sheets": "solid sheets of cells",
    "cords": "cords of cells",
    "trabeculae": "trabeculae",
    "spindle": "spindle cells in fascicles",
    "fibrillar": "fibrillar background",
    "alveoli": "thin walls around air spaces",
}
GROWTH_PATTERNS: tuple[GrowthPattern, ...] = tuple(PATTERN_PHRASES)
GRADES: tuple[Grade, ...] = get_args(Grade)
STROMA_AMOUNTS: tuple[Stroma, ...] = get_args(Stroma)
FEATURES: tuple[Feature, ...] = get_args(Feature)


class VocabularyError(CraftsError):
    """A label that is neither a cancer type nor a known tissue."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TissueAttributes:
    """What can be seen on one tile, and hence what its caption may say."""

    growth_pattern: GrowthPattern
    nuclear_grade: Grade
    stroma: Stroma
    features: tuple[Feature, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PartialAttributes:
    """What a person noted of a tissue. A caption says nothing of what is None."""

    growth_pattern: GrowthPattern | None = None
    nuclear_grade: Grade | None = None
    stroma: Stroma | None = None
    features: tuple[Feature, ...] = ()


SomeAttributes = TissueAttributes | PartialAttributes


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """How often a tissue shows which attributes: weights, and probabilities of features."""

    patterns: dict[GrowthPattern, float]
    grades: tuple[float, float, float]
    stroma: tuple[float, float, float]
    features: dict[Feature, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class CancerType:
    """One of the 30 types: TCGA code, plain name, organ, and its typical look."""

    code: str
    name: str
    organ: str
    look: Look


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A public caption of the prompt bank."""

    text: str
    cancer_code: str


_LOW, _MIXED, _HIGH = (0.7, 0.25, 0.05), (0.2, 0.5, 0.3), (0.05, 0.25, 0.7)
_SCANT, _SOME, _MUCH = (0.8, 0.2, 0.0), (0.2, 0.6, 0.2), (0.0, 0.25, 0.75)


def _look(
    patterns: dict[GrowthPattern, float],
    grades: tuple[float, float, float],
    stroma: tuple[float, float, float],
    features: dict[Feature, float] | None = None,
) -> Look:
    return Look(patterns=patterns, grades=grades, stroma=stroma, features=features or {})


_COLORECTAL = _look(
    {"glands": 0.85, "sheets": 0.15}, _MIXED, _SOME, {"necrosis": 0.4, "goblet cells": 0.25}
)
_SQUAMOUS: dict[Feature, float] = {
    "keratin pearls": 0.6,
    "eosinophilic cytoplasm": 0.3,
    "many lymphocytes": 0.3,
}
_LOOKS: dict[str, tuple[str, str, Look]] = {
    "ACC": ("adrenocortical carcinoma", "adrenal gland", _look({"sheets": 0.6, "trabeculae": 0.4}, _MIXED, _SCANT, {"eosinophilic cytoplasm": 0.8, "clear cytoplasm": 0.2})),
    "BLCA": ("urothelial carcinoma", "bladder", _look({"papillae": 0.5, "sheets": 0.5}, _HIGH, _SOME, {"prominent nucleoli": 0.3, "many lymphocytes": 0.2})),
    "BRCA": ("invasive breast carcinoma", "breast", _look({"cords": 0.5, "nests": 0.35, "glands": 0.15}, _MIXED, _MUCH, {"many lymphocytes": 0.25})),
    "CESC": ("cervical squamous cell carcinoma", "cervix", _look({"squamous": 1.0}, _MIXED, _SOME, {**_SQUAMOUS, "many lymphocytes": 0.6})),
    "COAD": ("colon adenocarcinoma", "colon", _COLORECTAL),
    "ESCA": ("esophageal carcinoma", "esophagus", _look({"squamous": 0.6, "glands": 0.4}, _MIXED, _SOME, {"keratin pearls": 0.4})),
    "GBM": ("glioblastoma", "brain", _look({"fibrillar": 1.0}, _HIGH, _SOME, {"necrosis": 0.75, "red blood cells": 0.4})),
    "HNSC": ("head and neck squamous cell carcinoma", "head and neck", _look({"squamous": 1.0}, _MIXED, _SOME, {**_SQUAMOUS, "keratin pearls": 0.85})),
    "KICH": ("chromophobe renal carcinoma", "kidney", _look({"sheets": 1.0}, _LOW, _SCANT, {"eosinophilic cytoplasm": 0.9})),
    "KIRC": ("clear cell renal carcinoma", "kidney", _look({"nests": 1.0}, _LOW, _SCANT, {"clear cytoplasm": 1.0, "red blood cells": 0.7})),
    "KIRP": ("papillary renal carcinoma", "kidney", _look({"papillae": 1.0}, _LOW, _SCANT, {"eosinophilic cytoplasm": 0.5, "red blood cells": 0.2})),
    "LGG": ("lower grade glioma", "brain", _look({"fibrillar": 1.0}, _LOW, _SOME, {"clear cytoplasm": 0.3})),
    "LIHC": ("hepatocellular carcinoma", "liver", _look({"trabeculae": 1.0}, _MIXED, _SCANT, {"eosinophilic cytoplasm": 0.9, "prominent nucleoli": 0.5})),
    "LUAD": ("lung adenocarcinoma", "lung", _look({"glands": 0.6, "papillae": 0.2, "sheets": 0.2}, _MIXED, _SOME, {"prominent nucleoli": 0.3, "many lymphocytes": 0.3})),
    "LUSC": ("lung squamous cell carcinoma", "lung", _look({"squamous": 0.8, "sheets": 0.2}, _HIGH, _SOME, {"keratin pearls": 0.5, "necrosis": 0.3})),
    "MESO": ("mesothelioma", "pleura", _look({"papillae": 0.5, "cords": 0.3, "spindle": 0.2}, _MIXED, _MUCH)),
    "OV": ("ovarian serous carcinoma", "ovary", _look({"papillae": 0.8, "sheets": 0.2}, _HIGH, _SOME, {"prominent nucleoli": 0.5})),
    "PAAD": ("pancreatic adenocarcinoma", "pancreas", _look({"glands": 1.0}, _MIXED, _MUCH, {"goblet cells": 0.2, "myxoid stroma": 0.3})),
    "PCPG": ("pheochromocytoma", "adrenal gland", _look({"nests": 1.0}, _LOW, _SCANT, {"eosinophilic cytoplasm": 0.3, "red blood cells": 0.6})),
    "PRAD": ("prostate adenocarcinoma", "prostate", _look({"glands": 0.8, "cords": 0.2}, _LOW, _SOME, {"prominent nucleoli": 0.6})),
    "READ": ("rectal adenocarcinoma", "rectum", _COLORECTAL),
    "SARC": ("sarcoma", "soft tissue", _look({"spindle": 1.0}, _HIGH, _SCANT, {"necrosis": 0.2, "myxoid stroma": 0.3})),
    "SKCM": ("cutaneous melanoma", "skin", _look({"nests": 0.5, "sheets": 0.5}, _HIGH, _SCANT, {"pigment": 0.8, "prominent nucleoli": 0.9})),
    "STAD": ("gastric adenocarcinoma", "stomach", _look({"glands": 0.7, "cords": 0.3}, _MIXED, _SOME, {"goblet cells": 0.4, "many lymphocytes": 0.3})),
    "TGCT": ("testicular germ cell tumor", "testis", _look({"sheets": 1.0}, _MIXED, _SCANT, {"clear cytoplasm": 0.9, "many lymphocytes": 0.9, "prominent nucleoli": 0.7})),
    "THCA": ("papillary thyroid carcinoma", "thyroid", _look({"papillae": 0.5, "follicles": 0.5}, _LOW, _SCANT, {"colloid": 0.9})),
    "THYM": ("thymoma", "thymus", _look({"sheets": 1.0}, _LOW, _SCANT, {"many lymphocytes": 1.0})),
    "UCEC": ("endometrial carcinoma", "uterus", _look({"glands": 0.9, "papillae": 0.1}, _MIXED, _SCANT)),
    "UCS": ("uterine carcinosarcoma", "uterus", _look({"spindle": 0.6, "glands": 0.4}, _HIGH, _SOME, {"necrosis": 0.4})),
    "UVM": ("uveal melanoma", "eye", _look({"spindle": 0.7, "sheets": 0.3}, _MIXED, _SCANT, {"pigment": 0.9, "prominent nucleoli": 0.5})),
}  # fmt: skip
CANCER_TYPES: tuple[CancerType, ...] = tuple(
    CancerType(code=code, name=name, organ=organ, look=look)
    for code, (name, organ, look) in _LOOKS.items()
)
_NORMAL_LOOKS: dict[str, Look] = {
    "colon": _look({"crypts": 1.0}, _LOW, _SOME, {"goblet cells": 1.0, "many lymphocytes": 0.4}),
    "lung": _look({"alveoli": 1.0}, _LOW, _SCANT, {"red blood cells": 0.7}),
    "liver": _look({"trabeculae": 1.0}, _LOW, _SCANT, {"eosinophilic cytoplasm": 1.0}),
    "brain": _look({"fibrillar": 1.0}, _LOW, _MUCH),
    "thyroid": _look({"follicles": 1.0}, _LOW, _SCANT, {"colloid": 1.0}),
    "stomach": _look({"crypts": 1.0}, _LOW, _SOME, {"goblet cells": 0.5}),
    "prostate": _look({"glands": 1.0}, _LOW, _MUCH),
    "kidney": _look({"follicles": 1.0}, _LOW, _SCANT, {"eosinophilic cytoplasm": 1.0}),
    "lymph node": _look({"sheets": 1.0}, _LOW, _SCANT, {"many lymphocytes": 1.0}),
    "soft tissue": _look({"spindle": 1.0}, _LOW, _MUCH),
}
NORMAL_ORGANS: tuple[str, ...] = tuple(_NORMAL_LOOKS)

_BY_CODE = {cancer.code: cancer for cancer in CANCER_TYPES}
_DATASET_LABELS = {
    "lung_aca": "LUAD", "lung_scc": "LUSC", "colon_aca": "COAD",
    "lung_n": "normal lung", "colon_n": "normal colon",
}  # fmt: skip
_GENERAL_WORDS = (
    "benign malignant tumor tissue invasive carcinoma adenocarcinoma sarcoma lymphoma metastasis",
    "nuclei nucleus cytoplasm mitoses hyperchromatic pleomorphic fibrosis inflammation edema vessel",
    "well moderately poorly differentiated papillary follicular mucinous serous solid cystic",
    "hematoxylin and eosin stained section showing the a of with in from biopsy resection",
)


def cancer_type(code: str) -> CancerType:
    """The type of a TCGA code, with or without ``TCGA-``.

    Raises:
        VocabularyError: no such code.
    """
    found = _BY_CODE.get(code.strip().upper().removeprefix("TCGA-"))
    if found is None:
        raise VocabularyError(f"unknown cancer type {code!r}; known: {', '.join(_BY_CODE)}")
    return found


def sample_attributes(
    rng: np.random.Generator, cancer: CancerType | None, *, organ: str | None = None
) -> TissueAttributes:
    """Draw what one piece of tissue shows: of a cancer type, or (None) of a normal organ."""
    look = cancer.look if cancer is not None else _normal_look(organ)
    patterns = list(look.patterns)
    weights = np.array(list(look.patterns.values()))
    pattern = patterns[rng.choice(len(patterns), p=weights / weights.sum())]
    return TissueAttributes(
        growth_pattern=pattern,
        nuclear_grade=GRADES[rng.choice(3, p=look.grades)],
        stroma=STROMA_AMOUNTS[rng.choice(3, p=look.stroma)],
        features=tuple(feature for feature, p in look.features.items() if rng.random() < p),
    )


def compose_caption(
    cancer: CancerType | None, attributes: SomeAttributes | None, *, organ: str | None = None
) -> str:
    """The caption of a tile, by a fixed grammar.

    ``cancer`` None means normal tissue of ``organ``; ``attributes`` None says only what it is.
    """
    if cancer is None:
        _normal_look(organ)
        parts = ["H&E", f"normal {organ}"]
    else:
        parts = ["H&E", cancer.name, cancer.organ]
    if attributes is not None:
        if attributes.growth_pattern is not None:
            parts.append(PATTERN_PHRASES[attributes.growth_pattern])
        if attributes.nuclear_grade is not None:
            parts.append(f"{attributes.nuclear_grade} grade nuclei")
        if attributes.stroma is not None:
            parts.append(f"{attributes.stroma} stroma")
        parts.extend(attributes.features)
    return ", ".join(parts)


def label_caption(label: str, attributes: SomeAttributes | None = None) -> str:
    """The caption of a label: TCGA code, plain name, ``normal <organ>``, or LC25000 class.

    Raises:
        VocabularyError: the label is none of these; says what is known.
    """
    known = _DATASET_LABELS.get(label.strip().lower(), label.strip())
    organ = known.lower().removeprefix("normal ")
    if organ != known.lower() and organ in _NORMAL_LOOKS:
        return compose_caption(None, attributes, organ=organ)
    named = [cancer for cancer in CANCER_TYPES if cancer.name == known.lower()]
    return compose_caption(named[0] if named else cancer_type(known), attributes)


def caption_class(caption: str, classes: Sequence[str]) -> int | None:
    """Which of some captions a caption is, or begins with before a comma; the longest counts."""
    fitting = [text for text in classes if caption == text or caption.startswith(f"{text}, ")]
    return classes.index(max(fitting, key=len)) if fitting else None


def label_code(label: str) -> str | None:
    """The cancer code of a label that ``label_caption`` knows; None for normal tissue."""
    caption = label_caption(label)
    matches = [c.code for c in CANCER_TYPES if compose_caption(c, None) == caption]
    return matches[0] if matches else None


def prompt_bank() -> tuple[Prompt, ...]:
    """The anchors of the alignment: four captions of each of the 30 types, always the same."""
    prompts: list[Prompt] = []
    for index, cancer in enumerate(CANCER_TYPES):
        rng = np.random.default_rng([30, index])
        texts = [compose_caption(cancer, None)]
        while len(texts) < 4:
            text = compose_caption(cancer, sample_attributes(rng, cancer))
            if text not in texts:
                texts.append(text)
        prompts.extend(Prompt(text=text, cancer_code=cancer.code) for text in texts)
    return tuple(prompts)


def corpus() -> Iterator[str]:
    """Sentences that hold every word a tokenizer should know whole."""
    for cancer in CANCER_TYPES:
        yield compose_caption(cancer, None)
    for organ in NORMAL_ORGANS:
        yield compose_caption(None, None, organ=organ)
    yield from PATTERN_PHRASES.values()
    yield from sorted({f for cancer in CANCER_TYPES for f in cancer.look.features})
    yield "low intermediate high grade nuclei scant moderate abundant stroma"
    yield from _GENERAL_WORDS


def _normal_look(organ: str | None) -> Look:
    if organ not in _NORMAL_LOOKS:
        known = ", ".join(NORMAL_ORGANS)
        raise VocabularyError(f"unknown normal organ {organ!r}; known: {known}")
    return _NORMAL_LOOKS[organ]
