"""Are generated images copies of tiles that were trained on?

Are they nearer to tiles that were trained on than to tiles of as many other patients? Copies would
be; new images of the same tissue are not. Both sides must come from the same hospitals. The result
is computed from patients without noise: it belongs to whoever holds both sides, and stays there.

Letters: N tiles, G patients, M images, D features.
"""

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field
from scipy.spatial.distance import cdist

from crafts_core.evaluation.fidelity import Reference
from crafts_core.evaluation.orthogonal_encoder import OrthogonalEncoder
from crafts_core.evaluation.real_tiles import RealTiles, middle
from crafts_core.evaluation.resampling import Interval, interval_of
from crafts_core.generator import Generator
from crafts_core.progress import Progress
from crafts_core.sampler_config import SchedulerName
from crafts_core.sampling import sample_images

Vector = npt.NDArray[np.float64]
FEWEST_PATIENTS = 8


SAMPLING = {"scheduler", "num_inference_steps", "guidance_scale", "batch_size", "seed"}
"""Settings that say how images are drawn, here and in ``EvaluationConfig``."""


class MemorisationConfig(BaseModel):
    """How much is drawn, and how, and how often it is resampled."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    num_images: int = Field(default=128, ge=16, le=100_000)
    scheduler: SchedulerName = "ddim"
    num_inference_steps: int = Field(default=20, ge=1, le=1000)
    guidance_scale: float = Field(default=1.5, ge=1, le=20)
    num_resamples: int = Field(default=1000, ge=100, le=100_000)
    batch_size: int = Field(default=64, ge=1, le=4096)
    seed: int = Field(default=0, ge=0)


class Memorisation(BaseModel):
    """Nearest real tiles of generated images."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    share_nearer_members: float
    """Of the images; 0.5 without memorisation."""
    interval: Interval
    p_value: float
    """By exchanging the sides of random patients, one-sided."""
    encoder: str


def sides_of_one_size(
    members: RealTiles,
    others: RealTiles,
    *,
    patients: int,
    tiles_per_patient: int,
    rng: np.random.Generator,
) -> tuple[RealTiles, RealTiles]:
    """Random tiles of as many random patients on either side.

    Args:
        members: Tiles of patients that were trained on, in an order of content.
        others: Tiles of patients that were not.
        patients: At most so many on each side.
        tiles_per_patient: At most so many of each.
        rng: Draws both.

    Raises:
        ValueError: fewer than 8 patients on a side.
    """
    count = min(patients, *(len(np.unique(side.patients)) for side in (members, others)))
    if count < FEWEST_PATIENTS:
        raise ValueError(f"expected at least {FEWEST_PATIENTS} patients on each side, got {count}")
    first, second = (_choice(side, count, tiles_per_patient, rng) for side in (members, others))
    return first, second


def _choice(tiles: RealTiles, count: int, each: int, rng: np.random.Generator) -> RealTiles:
    """Random tiles of random patients, as many of each patient as there are, at most ``each``."""
    names = rng.permutation(np.unique(tiles.patients))[:count]
    rows = np.concatenate(
        [rng.permutation(np.flatnonzero(tiles.patients == name))[:each] for name in names]
    )
    return tiles.take(rows)


def measure_memorisation(
    generator: Generator,
    members: RealTiles,
    others: RealTiles,
    config: MemorisationConfig,
    progress: Progress | None = None,
) -> Memorisation:
    """Draw images and ask whose tiles they are near.

    Prompts come from both sides in equal parts, so that neither's tissue is asked for more. A copy
    has the stain and grain of its original, which is what the orthogonal encoder sees.
    """
    rng, encoder = np.random.default_rng(config.seed), OrthogonalEncoder()
    half = config.num_images // 2
    prompts = [str(c) for side in (members, others) for c in rng.choice(list(side.captions), half)]
    images = sample_images(
        generator,
        prompts,
        **config.model_dump(include=SAMPLING),
        progress=None if progress is None else lambda done, all_: progress("copies", done, all_),
    )
    features = [encoder.embed(side.images_NHWC) for side in (members, others)]
    patients = np.concatenate([members.patients, others.patients])
    scale = Reference.fit(np.concatenate(features), patients).scale
    share, interval, p_value = nearer_members(
        scale(encoder.embed(middle(images, members.side_px))),
        [
            [scale(own[side.patients == name]) for name in np.unique(side.patients)]
            for own, side in zip(features, (members, others), strict=True)
        ],
        num_resamples=config.num_resamples,
        rng=rng,
    )
    return Memorisation(
        share_nearer_members=share, interval=interval, p_value=p_value, encoder=encoder.name
    )


def nearer_members(
    images_MD: Vector,
    sides: list[list[Vector]],
    *,
    num_resamples: int,
    rng: np.random.Generator,
) -> tuple[float, Interval, float]:
    """How often the nearest tile is a member's.

    Args:
        images_MD: Features of generated images.
        sides: Features of each member's tiles, then of each other patient's.
        num_resamples: Bootstrap over patients, and random exchanges of sides.
        rng: For both.

    Returns:
        The share, its interval, and the p-value of no difference between the sides.
    """
    num_members = len(sides[0])
    # Distance (M, G) to the nearest tile of each patient.
    near_MG = np.stack(
        [cdist(images_MD, tiles).min(axis=1) for side in sides for tiles in side], axis=1
    )
    everybody = np.arange(near_MG.shape[1])

    def share(members_G: npt.NDArray[np.int64], others_G: npt.NDArray[np.int64]) -> float:
        nearest_M = near_MG[:, members_G].min(axis=1) - near_MG[:, others_G].min(axis=1)
        return float((nearest_M < 0).mean() + (nearest_M == 0).mean() / 2)

    members_G, others_G = everybody[:num_members], everybody[num_members:]
    found = share(members_G, others_G)
    repeats = [
        share(rng.choice(members_G, len(members_G)), rng.choice(others_G, len(others_G)))
        for _ in range(num_resamples)
    ]
    exchanged = []
    for _ in range(num_resamples):
        mixed_G = rng.permutation(everybody)
        exchanged.append(share(mixed_G[:num_members], mixed_G[num_members:]))
    as_large = 1 + sum(value >= found for value in exchanged)
    return found, interval_of(repeats), as_large / (1 + num_resamples)
