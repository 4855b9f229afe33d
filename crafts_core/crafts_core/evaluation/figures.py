"""What an evaluation says: one row for each generator and each baseline.

Every number is None where it cannot be measured; ``not_measured`` then says why, a line for each
reason. Intervals are 90 % unless they say otherwise, by patient where real tiles are resampled.
"""

from pydantic import BaseModel, ConfigDict

from crafts_core.evaluation.baselines import ArmName
from crafts_core.evaluation.examiner import Gate
from crafts_core.evaluation.fidelity import Interval


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
    recall: float | None = None
    density: float | None = None
    coverage: float | None = None
    shape_agreement: float | None = None
    """Share of images in which a judge that sees no colour finds their class; mean of classes."""
    shape_agreement_interval: Interval | None = None
    colour_agreement: float | None = None
    """The same by a judge that sees only colour."""
    colour_agreement_interval: Interval | None = None
    drift: float | None = None
    """D: 0 as real tiles under their own captions, 1 as real tiles under wrong ones."""
    drift_interval: Interval | None = None


class Evaluation(_Record):
    """The result. Fields that end in foundation or generator repeat rows of ``arms``."""

    encoder: str
    encoder_hash: str
    metric: str
    """``mmd2``: squared maximum mean discrepancy, unbiased; smaller is closer."""
    n: int
    """Images drawn from each generator."""
    n_heldout: int
    heldout_patients: int
    floor: float
    """Real against real: other patients of the same hospitals."""
    floor_interval: Interval
    distance_foundation: float
    distance_foundation_interval: Interval
    distance_generator: float
    distance_generator_interval: Interval
    frechet_foundation: float
    frechet_generator: float
    drift_foundation: float | None
    drift_generator: float | None
    arms: tuple[Arm, ...]
    judged_classes: tuple[str, ...]
    """What the judges tell apart; empty where there was nothing to judge."""
    training_tiles: int | None
    """Real tiles of training patients that judges and colour map learnt from."""
    gate: Gate | None
    """Whether drift can be told here; None where nobody could be asked."""
    not_measured: tuple[str, ...]

    def arm(self, name: ArmName) -> Arm | None:
        """That row, if it was measured."""
        return next((arm for arm in self.arms if arm.name == name), None)
