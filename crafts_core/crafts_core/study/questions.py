"""What a reader is asked of an image, and which answers there are."""

from dataclasses import dataclass
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from crafts_core.errors import CraftsError
from crafts_core.vocabulary import CANCER_TYPES, NORMAL_ORGANS

SCORES = {
    1: "certainly real",
    2: "probably real",
    3: "perhaps real",
    4: "perhaps synthetic",
    5: "probably synthetic",
    6: "certainly synthetic",
}
"""Real or synthetic, and how sure: one scale, so that one key answers both."""
FIRST_SYNTHETIC = 4
ATTRIBUTES = {
    "nuclei": ("Nuclei", "unlike real tissue", "as in real tissue"),
    "architecture": ("Architecture", "unlike real tissue", "as in real tissue"),
    "stain": ("Stain", "unlike real tissue", "as in real tissue"),
    "artefacts": ("Artefacts", "disturbing", "none"),
}
"""Heading, and what 1 and 5 of a rating mean."""
MAX_RATING = 5
UNSURE = "unsure"
TYPE_NAMES = {
    **{cancer.code: f"{cancer.name}, {cancer.organ}" for cancer in CANCER_TYPES},
    **{f"normal {organ}": f"normal {organ}" for organ in NORMAL_ORGANS},
}
"""Labels of the vocabulary and how a reader sees them."""
TYPE_CHOICES = {UNSURE: "cannot tell", **TYPE_NAMES}

Rating = Annotated[int, Field(ge=1, le=MAX_RATING)]


class StudyError(CraftsError):
    """A study that cannot be made, opened, served or analysed; or an answer that is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Questions:
    """What is asked besides real or synthetic."""

    ratings: bool
    types: bool


class Answer(BaseModel):
    """What a reader says of one image."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    trial: Annotated[str, Field(max_length=64)]
    score: Annotated[int, Field(ge=min(SCORES), le=max(SCORES))]
    nuclei: Rating | None = None
    architecture: Rating | None = None
    stain: Rating | None = None
    artefacts: Rating | None = None
    type_guess: Annotated[str, Field(max_length=64)] | None = None
    seconds: Annotated[float, Field(ge=0, le=86_400)]
    """For how long the image was looked at."""

    def check(self, questions: Questions) -> None:
        """Whether it answers what a study asks, and nothing else.

        Raises:
            StudyError: an answer is missing, was not asked for, or is no type of the vocabulary.
        """
        for name in ATTRIBUTES:
            if (getattr(self, name) is not None) != questions.ratings:
                raise StudyError(f"expected {'a' if questions.ratings else 'no'} rating of {name}")
        if questions.types and self.type_guess not in TYPE_CHOICES:
            raise StudyError("expected a type of the vocabulary")
        if not questions.types and self.type_guess is not None:
            raise StudyError("expected no type")
