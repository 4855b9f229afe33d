"""What is known of a study, its images, its readers and their answers, as plain values."""

from dataclasses import dataclass
from datetime import datetime

from crafts_core.study.questions import Questions


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyInfo:
    """What the study is."""

    name: str
    token: str
    seed: int
    questions: Questions
    created_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyImage:
    """An image as it is shown, and the truth about it."""

    png: bytes
    is_synthetic: bool
    is_calibration: bool
    type: str | None
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """A reader by number and code."""

    number: int
    code: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """Where a reader is."""

    done: int
    total: int
    trial: str | None
    """None when all is read."""
    is_calibration: bool
    can_undo: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Truth:
    """What a calibration image is."""

    is_synthetic: bool
    type: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """One answer that stands, beside the truth. Calibration images are in none."""

    reader: int
    place: int
    image: int
    source: str
    is_synthetic: bool
    type: str | None
    is_repeat: bool
    score: int
    nuclei: int | None
    architecture: int | None
    stain: int | None
    artefacts: int | None
    type_guess: str | None
    seconds: float
    answered_at: datetime
