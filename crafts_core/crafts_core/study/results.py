"""The figures of a study, as JSON holds them."""

from pydantic import BaseModel, ConfigDict

Interval = tuple[float, float]


class _Result(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Figure(_Result):
    """A mean over readers with 95 % intervals."""

    value: float
    by_image: Interval | None
    """These readers, other images of the same kinds."""
    by_image_and_reader: Interval | None
    """Other readers, too; None with one reader."""


class Share(_Result):
    """A share of one reader's answers, with its Wilson interval."""

    value: float
    num: int
    wilson: Interval


class OneReader(_Result):
    """Figures of one reader."""

    reader: int
    num_real: int
    num_synthetic: int
    accuracy: Share
    sensitivity: Share
    specificity: Share
    d_prime: Figure
    area: Figure
    criterion: Figure
    scores_real: tuple[int, ...]
    """How often each score was given to real images."""
    scores_synthetic: tuple[int, ...]
    median_seconds: float


class IntraRater(_Result):
    """One reader's first answers beside those to the repeats."""

    reader: int
    num_repeats: int
    same_side: Share
    """Real or synthetic, as before."""
    kappa: float | None
    kappa_score: float | None
    """Of the six scores, squared weights."""
    kappa_ratings: dict[str, float | None]


class InterRater(_Result):
    """Agreement between readers, real or synthetic."""

    cohen_mean: float | None
    """Over all pairs of readers."""
    fleiss: float | None
    alpha: float | None
    alpha_score: float | None
    """Krippendorff's, of the six scores in their order."""
    alpha_ratings: dict[str, float | None]
    alpha_type: float | None


class Rating(_Result):
    """An attribute of real images beside that of synthetic ones, 1 to 5."""

    attribute: str
    real: Figure
    synthetic: Figure
    difference: Figure
    """Synthetic less real; 0 is no difference."""
    shares_real: tuple[float, ...]
    shares_synthetic: tuple[float, ...]


class TypeGuess(_Result):
    """How often the type was named as the label says."""

    kind: str
    num: int
    right: Figure
    unsure: Figure


class StudyAnalysis(_Result):
    """All of it."""

    study: str
    seed: int
    num_real: int
    num_synthetic: int
    mean_reader: dict[str, Figure]
    readers: tuple[OneReader, ...]
    intra_rater: tuple[IntraRater, ...]
    inter_rater: InterRater | None
    ratings: tuple[Rating, ...]
    types: tuple[TypeGuess, ...]
    remarks: tuple[str, ...]
    """Why a figure is not there, or what one must not be taken for."""
