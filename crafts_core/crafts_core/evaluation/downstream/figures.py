"""What is said of downstream use: a row for each task, measure, number of patients and arm."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

from crafts_core.evaluation.downstream.pool import Kind
from crafts_core.evaluation.resampling import Interval

TaskName = Literal["classification", "retrieval", "pretraining", "questions"]
Verdict = Literal["helps", "makes no difference that could be seen", "harms"]

ADDED: tuple[Kind, ...] = ("augmented", "both")


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Score(_Record):
    """One arm in one exam, mean of all splits. Intervals are 90 %, by patients and splits."""

    task: TaskName
    measure: str
    patients: int | None
    """Of each class whose real tiles were learnt from, or as many as it has; None for all."""
    arm: Kind
    generator: str
    """Whose images were learnt from; empty where none were."""
    value: float
    interval: Interval
    chance: float
    difference: float | None
    """To the same exam after real tiles only; None of that row itself."""
    difference_interval: Interval | None

    verdict: Verdict | None
    """Of arms that add something to the real tiles: what the difference says."""


def verdict_of(kind: Kind, difference: Interval | None) -> Verdict | None:
    """Whether adding something helps: only where the whole interval says so."""
    if difference is None or kind not in ADDED:
        return None
    if difference.low > 0:
        return "helps"
    return "harms" if difference.high < 0 else "makes no difference that could be seen"


class Images(_Record):
    """One generator, and how many of its images were learnt from."""

    generator: str
    generator_hash: str
    foundation_hash: str
    privacy: str
    """What was promised to the patients behind the weights."""
    images: int


class Downstream(_Record):
    """The result, and what it was measured with."""

    classes: tuple[str, ...]
    tiles: int
    patients: int
    splits: int
    encoder: str
    encoder_hash: str
    foundation_hash: str
    """Whose aligner sees images and captions."""
    tile_px: int
    mpp: float
    pretraining_steps: int
    questions: tuple[str, ...]
    generators: tuple[Images, ...]
    """Those that were asked for, then the public foundation."""
    scores: tuple[Score, ...]
    not_measured: tuple[str, ...]
