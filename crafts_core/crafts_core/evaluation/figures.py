"""What an evaluation says: one row for each generator and each baseline.

Every number is None where it cannot be measured; ``not_measured`` then says why, a line for each
reason. Intervals are 90 % unless they say otherwise, by patient where real tiles are resampled.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict

from crafts_core.evaluation.alignment import Alignment
from crafts_core.evaluation.baselines import ArmName
from crafts_core.evaluation.examiner import Gate
from crafts_core.evaluation.judges import ClassShare
from crafts_core.evaluation.memorisation import Memorisation
from crafts_core.evaluation.resampling import Interval


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Distances(_Record):
    """Squared MMD of images to the held-out tiles, three ways; smaller is closer."""

    mmd2: float
    """In the encoder's features of the images as they are."""
    mmd2_interval: Interval
    colour: float
    """In statistics of optical density alone."""
    colour_interval: Interval
    structure: float
    """In the encoder's features, after the set's colours were mapped onto the held-out ones."""
    structure_interval: Interval
    frechet: float | None
    """Fréchet distance in the encoder's features; None for real tiles."""
    frechet_interval: Interval | None = None
    kid: float | None = None
    """Squared MMD of the encoder's features under a cubic polynomial kernel."""
    kid_interval: Interval | None = None
    cmmd: float | None = None
    """In thousandths, under a Gaussian kernel; None where the encoder is no CLIP."""
    cmmd_interval: Interval | None = None


class Fidelity(Distances):
    """Distances of one generator, and what they were measured with."""

    encoder: str
    encoder_hash: str


class Arm(Distances):
    """One row of a comparison."""

    name: ArmName
    n: int
    """Images, or real tiles."""
    precision: float | None = None
    precision_interval: Interval | None = None
    recall: float | None = None
    recall_interval: Interval | None = None
    density: float | None = None
    density_interval: Interval | None = None
    coverage: float | None = None
    coverage_interval: Interval | None = None
    shape_agreement: float | None = None
    """Share of images in which a judge that sees no colour finds their class; mean of classes."""
    shape_agreement_interval: Interval | None = None
    shape_by_class: dict[str, ClassShare] = {}
    """The shares that ``shape_agreement`` is the mean of, by class."""
    colour_agreement: float | None = None
    """The same by a judge that sees only colour."""
    colour_agreement_interval: Interval | None = None
    drift: float | None = None
    """D: 0 as real tiles under their own captions, 1 as real tiles under wrong ones."""
    drift_interval: Interval | None = None
    alignment: Alignment | None = None
    """Of the images and their captions; None where there are no captions."""


class Comparison(_Record):
    """The result: rows, real tiles first, and what they were measured with."""

    encoder: str
    encoder_hash: str
    metric: str
    """``mmd2``: squared maximum mean discrepancy, unbiased; smaller is closer."""
    n: int
    """Images drawn from each generator, or measured of a folder."""
    drawn_by: str = ""
    """How all were drawn that were drawn for it; empty in results of earlier versions."""
    n_heldout: int
    heldout_patients: int
    resampled: Literal["patient", "image"] = "patient"
    """What intervals are by: each image is its own patient where nobody says whose it is."""
    repeated_images: int = 0
    repeated_tiles: int = 0
    """Of the images, and of the real ones: how many count together with another of the same pixels
    where nobody says whose they are."""
    foundation_hash: str = ""
    """Whose aligner saw images and captions, and who drew the foundation's images."""
    tile_px: int | None = None
    mpp: float | None = None
    """Size and scale at which all were compared; None in results of earlier versions."""
    floor: float
    """Real against real: other patients of the same hospitals."""
    floor_interval: Interval
    arms: tuple[Arm, ...]
    judged_classes: tuple[str, ...]
    """What the judges tell apart; empty where there was nothing to judge."""
    training_tiles: int | None
    """Real tiles of training patients that judges and colour map learnt from."""
    gate: Gate | None
    """Whether drift can be told here; None where nobody could be asked."""
    memorisation: Memorisation | None = None
    """Only where there are tiles that were trained on."""
    not_measured: tuple[str, ...]

    def arm(self, name: ArmName) -> Arm | None:
        """That row, if it was measured."""
        return next((arm for arm in self.arms if arm.name == name), None)


class Evaluation(Comparison):
    """That of a generator. Fields that end in foundation or generator repeat rows of ``arms``."""

    distance_foundation: float
    distance_foundation_interval: Interval
    distance_generator: float
    distance_generator_interval: Interval
    frechet_foundation: float
    frechet_generator: float
    drift_foundation: float | None
    drift_generator: float | None
