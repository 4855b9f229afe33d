"""Is an encoder a ruler for tissue? How it answers to real tiles that were spoilt on purpose.

Patients are split in halves at random, many times. One half is the reference; the other half is
measured against it as it is (the floor: real against real), and changed. A ruler of tissue must
see shuffled patches and blur, and mind the stain less than either, since figures by a ruler that
does not see structure praise a colour map.

Shape letters: N tiles, D features.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from crafts_core.evaluation.changes import PATCHES_PX, blurred, recoloured, restained, shuffled
from crafts_core.evaluation.encoder import Encoder, Features, Images
from crafts_core.evaluation.fidelity import Interval, Reference, mmd_squared

Rows = npt.NDArray[np.int64]
Changes = dict[str, Images]
LEAST_FLOORS = 3.0
"""Shuffled patches of 32 px must stand this far above real against real."""
COPIES = 8
KNOWN_FAULTS = {
    "ce82283e9ec619aa": "it hardly sees shuffled patches and goes by the stain (docs/encoders.md)",
    "eea9d6c87a89cb16": "it minds the stain more than blur, unless colours are matched first",
}
"""Of encoders that come with this package, by the start of their hash."""
_FEWEST_OF_A_CLASS = 4


class ValidationConfig(BaseModel):
    """How much is looked at."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    max_tiles: int = Field(default=400, ge=32, le=100_000)
    tiles_per_patient: int = Field(default=8, ge=1, le=1000)
    """At most, so that no slide decides alone."""
    num_splits: int = Field(default=20, ge=2, le=10_000)
    seed: int = Field(default=0, ge=0)


class LabelledTiles(NamedTuple):
    """Real tiles of several patients and classes. Rows belong together."""

    images_NHWC: Images
    patients: npt.NDArray[np.str_]
    classes: npt.NDArray[np.str_]
    mpp: float

    def take(self, rows: Rows) -> "LabelledTiles":
        """Some tiles, in that order."""
        return self._replace(
            images_NHWC=self.images_NHWC[rows],
            patients=self.patients[rows],
            classes=self.classes[rows],
        )


class Answer(BaseModel):
    """How far the ruler puts one change from the real tiles."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    change: str
    distance: float
    """Mean over the splits."""
    interval: Interval
    """Where 90 % of the splits lie."""
    floors: float
    """The distance in units of real against real."""


class Validation(BaseModel):
    """The table of one encoder on one set of tiles."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    encoder: str
    encoder_hash: str
    metric: str
    tiles: int
    patients: int
    classes: int
    tile_px: int
    mpp: float
    floor: float
    answers: tuple[Answer, ...]
    faults: tuple[str, ...]
    """Why it should not be the main figure; empty where it may."""

    def floors(self, change: str) -> float:
        """A change's distance, in floors."""
        return next(answer.floors for answer in self.answers if answer.change == change)


def validate(
    encoder: Encoder,
    tiles: LabelledTiles,
    config: ValidationConfig,
    *,
    reconstruct: Callable[[Images], Images] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Validation:
    """Measure how an encoder answers.

    Args:
        encoder: What is judged.
        tiles: Real tiles; patients are what is split.
        config: How much is looked at.
        reconstruct: A VAE there and back, whose row is then added.
        progress: Called with what, done and all.

    Raises:
        ValueError: too few patients or classes, tiles too small to be shuffled, or real tiles that
            do not differ between patients.
    """
    rng = np.random.default_rng(config.seed)
    tiles = tiles.take(_chosen(tiles.patients, config, rng))
    changed = _changes(tiles, rng, reconstruct)
    features = {}
    for done, (name, images) in enumerate(changed.items()):
        features[name] = encoder.embed(images, mpp=tiles.mpp)
        if progress is not None:
            progress("changes embedded", done + 1, len(changed))
    distances = _distances(features, tiles, config, rng)
    floor = float(np.mean(distances["real"]))
    if floor <= 0:
        raise ValueError("patients do not differ: expected several tiles of each of many patients")
    answers = tuple(_answer(name, values, floor) for name, values in distances.items())
    return Validation(
        encoder=encoder.name,
        encoder_hash=encoder.hash,
        metric="mmd2",
        tiles=len(tiles.patients),
        patients=len(np.unique(tiles.patients)),
        classes=len(np.unique(tiles.classes)),
        tile_px=tiles.images_NHWC.shape[1],
        mpp=tiles.mpp,
        floor=floor,
        answers=answers,
        faults=faults({answer.change: answer.floors for answer in answers}),
    )


def warning_of(encoder: Encoder) -> str | None:
    """What to tell whoever chooses this encoder, if it is known not to see tissue."""
    fault = next((why for start, why in KNOWN_FAULTS.items() if encoder.hash.startswith(start)), "")
    return f"{encoder.name} should not give the main figure: {fault}" if fault else None


def faults(floors: dict[str, float]) -> tuple[str, ...]:
    """What speaks against a ruler whose answers, in floors, are these."""
    largest = f"patches of {PATCHES_PX[-1]} px shuffled"
    found = []
    if floors[largest] < LEAST_FLOORS:
        found.append(
            f"{largest} lie at {floors[largest]:.1f} floors, below {LEAST_FLOORS:.0f}: "
            "structure hardly stands out from real against real"
        )
    for change in ("recoloured", "restained"):
        if floors[change] > floors["blurred"]:
            found.append(
                f"{change} tiles lie at {floors[change]:.1f} floors, above blur at "
                f"{floors['blurred']:.1f}: it goes by the stain"
            )
    return tuple(found)


def _chosen(
    patients: npt.NDArray[np.str_], config: ValidationConfig, rng: np.random.Generator
) -> Rows:
    """Tiles of random patients, at most so many of each, until there are enough.

    Whole patients, because a floor between patients of one tile each would be nothing.
    """
    rows = [
        rng.permutation(np.flatnonzero(patients == name))[: config.tiles_per_patient]
        for name in rng.permutation(np.unique(patients))
    ]
    return np.sort(np.concatenate(rows)[: config.max_tiles])


def _changes(
    tiles: LabelledTiles,
    rng: np.random.Generator,
    reconstruct: Callable[[Images], Images] | None,
) -> Changes:
    real = tiles.images_NHWC
    found = {
        "real": real,
        "recoloured": recoloured(real),
        "restained": restained(real),
        "blurred": blurred(real, mpp=tiles.mpp),
    }
    for patch_px in PATCHES_PX:
        found[f"patches of {patch_px} px shuffled"] = shuffled(real, patch_px, rng)
    if reconstruct is not None:
        found["through the VAE"] = reconstruct(real)
    return found


def _distances(
    features: dict[str, Features],
    tiles: LabelledTiles,
    config: ValidationConfig,
    rng: np.random.Generator,
) -> dict[str, list[float]]:
    """Of each change in each split; what is made by choosing tiles comes last."""
    reference = Reference.fit(features["real"], tiles.patients)
    scaled = {name: reference.scale(values) for name, values in features.items()}
    real = scaled["real"]
    kernel = reference.kernel(real, real)
    within = {name: reference.kernel(values, values) for name, values in scaled.items()}
    across = {name: reference.kernel(values, real) for name, values in scaled.items()}
    chosen: dict[str, list[float]] = {"wrong class": [], "one class only": [], "duplicates": []}
    changed: dict[str, list[float]] = {name: [] for name in scaled}
    for _ in range(config.num_splits):
        first, second = _halves(reference, rng)

        def distance(left: Rows, right: Rows, name: str = "real") -> float:
            return mmd_squared(
                within[name][np.ix_(left, left)],
                kernel[np.ix_(right, right)],
                across[name][np.ix_(left, right)],
            )

        for name, values in changed.items():
            values.append(distance(second, first, name))
        own, other = (_by_class(tiles.classes, half) for half in (first, second))
        wrong = [distance(other[b], own[a]) for a in own for b in other if a != b]
        alone = [distance(rows, first) for rows in other.values()]
        few = rng.choice(second, max(2, len(second) // COPIES), replace=False)
        for name, found in (
            ("wrong class", wrong),
            ("one class only", alone),
            ("duplicates", [distance(np.repeat(few, COPIES), first)]),
        ):
            if found:
                chosen[name].append(float(np.mean(found)))
    return changed | {name: values for name, values in chosen.items() if values}


def _halves(reference: Reference, rng: np.random.Generator) -> tuple[Rows, Rows]:
    """Tiles of one half of the patients, and of the other."""
    chosen = rng.permutation(reference.num_patients)[: reference.num_patients // 2]
    is_first = np.isin(reference.patient_M, chosen)
    return np.flatnonzero(is_first), np.flatnonzero(~is_first)


def _by_class(classes: npt.NDArray[np.str_], rows: Rows) -> dict[str, Rows]:
    """Rows of each class that has enough of them."""
    members = {str(name): rows[classes[rows] == name] for name in np.unique(classes[rows])}
    return {name: own for name, own in members.items() if len(own) >= _FEWEST_OF_A_CLASS}


def _answer(change: str, values: list[float], floor: float) -> Answer:
    low, high = np.quantile(values, [0.05, 0.95])
    distance = float(np.mean(values))
    return Answer(
        change=change,
        distance=distance,
        interval=Interval(float(low), float(high)),
        floors=distance / floor,
    )
