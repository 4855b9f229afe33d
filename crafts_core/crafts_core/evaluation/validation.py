"""Is an encoder a ruler for tissue? How it answers to real tiles that were spoilt on purpose.

Real tiles that something was done to are measured against the real tiles of other patients. A ruler
of tissue must see shuffled patches and blur, and mind the stain less than either, since figures by
a ruler that does not see structure praise a colour map.

Distances are told as shares of the distance between two patients: how far one patient's tiles lie
from another's. Neither grows with the number of patients, so the verdict does not.

Shape letters: N tiles, D features, P patients.
"""

import itertools
from collections.abc import Callable

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from crafts_core.evaluation.changes import PATCHES_PX, blurred, recoloured, restained, shuffled
from crafts_core.evaluation.colour import ColourMoments, in_colours_of
from crafts_core.evaluation.discrepancy import Discrepancy
from crafts_core.evaluation.encoder import Encoder, Features, Images
from crafts_core.evaluation.fidelity import Reference, between_patients
from crafts_core.evaluation.real_tiles import RealTiles
from crafts_core.evaluation.resampling import Interval, Patients, Rows, halves
from crafts_core.progress import Progress

LEAST_SHARE = 0.02
"""Shuffled patches of 32 px must stand so far from real tiles, in distances of two patients."""
FEWEST_PATIENTS = 20
"""With several tiles each. Of fewer, neither the distance between two nor a change is known."""
COPIES = 8
KNOWN_FAULTS = {
    "ce82283e9ec619aa": "it hardly sees shuffled patches and goes by the stain (docs/encoders.md)",
    "eea9d6c87a89cb16": "it minds the stain more than blur, unless colours are matched first",
}
"""Of encoders that come with this package, by the start of their hash."""
_FEWEST_OF_A_CLASS = 4
_SPLITS = 20
_CLASSES_MATCHED = "each class in the colours of all"


class ValidationConfig(BaseModel):
    """How much is looked at."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    max_tiles: int = Field(default=400, ge=32, le=100_000)
    tiles_per_patient: int = Field(default=8, ge=1, le=1000)
    """At most, so that no slide decides alone."""
    num_bootstrap: int = Field(default=200, ge=20, le=100_000)
    seed: int = Field(default=0, ge=0)


class Answer(BaseModel):
    """How far the ruler puts one change from the real tiles."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    change: str
    distance: float
    """Squared MMD to the real tiles of other patients."""
    share: float
    """The distance over that between two patients."""
    share_interval: Interval | None
    """90 %, over patients; None where tiles were chosen and not changed."""
    matched_share: float | None
    """``share`` once colours were matched beforehand; None where that would change nothing."""


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
    two_patients: float
    """Squared MMD of one patient's tiles from another's, on average."""
    answers: tuple[Answer, ...]
    faults: tuple[str, ...]
    """Why it should not be the main figure; empty where it may."""

    def share(self, change: str) -> float:
        """A change's distance, in distances of two patients."""
        return next(answer.share for answer in self.answers if answer.change == change)


def validate(
    encoder: Encoder,
    tiles: RealTiles,
    config: ValidationConfig,
    *,
    mpp: float,
    reconstruct: Callable[[Images], Images] | None = None,
    progress: Progress | None = None,
) -> Validation:
    """Measure how an encoder answers.

    Args:
        encoder: What is judged.
        tiles: Real tiles of several patients and classes.
        config: How much is looked at.
        mpp: Scale of the tiles.
        reconstruct: A VAE there and back, whose row is then added.
        progress: Called with what, done and all.

    Raises:
        ValueError: too few patients or classes, tiles too small to be shuffled, or real tiles that
            do not differ between patients.
    """
    rng = np.random.default_rng(config.seed)
    tiles = _chosen(tiles.in_order_of_content(), config, rng)
    changed = _changes(tiles, rng, reconstruct, mpp)
    plain, matched = _embedded(encoder, tiles, changed, mpp, progress)
    ruler = _Ruler(plain.pop("real"), tiles)
    answers = [
        *(ruler.of_changed(name, plain[name], matched[name], config) for name in plain),
        *ruler.of_chosen(matched[_CLASSES_MATCHED], rng),
    ]
    return Validation(
        encoder=encoder.name,
        encoder_hash=encoder.hash,
        metric="mmd2",
        tiles=len(tiles),
        patients=ruler.reference.num_patients,
        classes=len(set(tiles.classes)),
        tile_px=tiles.images_NHWC.shape[1],
        mpp=mpp,
        two_patients=ruler.unit,
        answers=tuple(answers),
        faults=faults({answer.change: answer.share for answer in answers}),
    )


def warning_of(encoder: Encoder) -> str | None:
    """What to tell whoever chooses this encoder, if it is known not to see tissue."""
    fault = next((why for start, why in KNOWN_FAULTS.items() if encoder.hash.startswith(start)), "")
    return f"{encoder.name} should not give the main figure: {fault}" if fault else None


def faults(shares: dict[str, float]) -> tuple[str, ...]:
    """What speaks against a ruler whose answers, in distances of two patients, are these."""
    largest = f"patches of {PATCHES_PX[-1]} px shuffled"
    found = []
    if shares[largest] < LEAST_SHARE:
        found.append(
            f"{largest} lie at {shares[largest]:.1%} of the distance between two patients, below "
            f"{LEAST_SHARE:.1%}: structure hardly stands out"
        )
    for change in ("recoloured", "restained"):
        if shares[change] > shares["blurred"]:
            found.append(
                f"{change} tiles lie at {shares[change]:.1%} of the distance between two patients, "
                f"above blur at {shares['blurred']:.1%}: it goes by the stain"
            )
    return tuple(found)


def _chosen(tiles: RealTiles, config: ValidationConfig, rng: np.random.Generator) -> RealTiles:
    """Tiles of random patients, at most so many of each, until there are enough.

    Whole patients, because of those with one tile each no distance between two is known.
    """
    rows = [
        rng.permutation(np.flatnonzero(tiles.patients == name))[: config.tiles_per_patient]
        for name in rng.permutation(np.unique(tiles.patients))
    ]
    chosen = tiles.take(np.sort(np.concatenate(rows)[: config.max_tiles]))
    several = np.count_nonzero(np.unique(chosen.patients, return_counts=True)[1] > 1)
    if several < FEWEST_PATIENTS:
        raise ValueError(
            f"too few patients: expected {FEWEST_PATIENTS} with several tiles each, got {several}"
        )
    return chosen


def _changes(
    tiles: RealTiles,
    rng: np.random.Generator,
    reconstruct: Callable[[Images], Images] | None,
    mpp: float,
) -> dict[str, Images]:
    real = tiles.images_NHWC
    found = {
        "real": real,
        "recoloured": recoloured(real),
        "restained": restained(real),
        "blurred": blurred(real, mpp=mpp),
    }
    for patch_px in PATCHES_PX:
        found[f"patches of {patch_px} px shuffled"] = shuffled(real, patch_px, rng)
    if reconstruct is not None:
        found["through the VAE"] = reconstruct(real)
    return found


def _embedded(
    encoder: Encoder,
    tiles: RealTiles,
    changed: dict[str, Images],
    mpp: float,
    progress: Progress | None,
) -> tuple[dict[str, Features], dict[str, Features]]:
    """Features of each change as it is, and with its colours brought to the real ones."""
    target = ColourMoments.of(tiles.images_NHWC)
    plain: dict[str, Features] = {}
    matched: dict[str, Features] = {}
    for done, (name, images_NHWC) in enumerate(changed.items()):
        plain[name] = encoder.embed(images_NHWC, mpp=mpp)
        if name != "real":
            matched[name] = encoder.embed(in_colours_of(images_NHWC, target), mpp=mpp)
        if progress is not None:
            progress("changes embedded", done + 1, len(changed))
    of_class_NHWC, class_N = tiles.images_NHWC.copy(), np.asarray(tiles.classes)
    for name in set(tiles.classes):
        of_class_NHWC[class_N == name] = in_colours_of(of_class_NHWC[class_N == name], target)
    matched[_CLASSES_MATCHED] = encoder.embed(of_class_NHWC, mpp=mpp)
    return plain, matched


class _Ruler:
    """Real tiles, and how far others lie from them, in distances of two patients."""

    def __init__(self, features_ND: Features, tiles: RealTiles) -> None:
        self.features_ND = features_ND
        self.reference = Reference.fit(features_ND, tiles.patients)
        self.unit = between_patients(self.reference)
        if self.unit <= 0:
            raise ValueError("patients do not differ: expected tiles that say whose they are")
        self._class_N = np.asarray(tiles.classes)

    def of_changed(
        self, name: str, features_ND: Features, matched_ND: Features, config: ValidationConfig
    ) -> Answer:
        """All tiles after something was done to them, and after their colours were matched, too."""
        found, matched = self._changed(features_ND), self._changed(matched_ND)
        low, high = found.interval(config.num_bootstrap, config.seed)
        return Answer(
            change=name,
            distance=found.squared(),
            share=found.squared() / self.unit,
            share_interval=Interval(low / self.unit, high / self.unit),
            matched_share=matched.squared() / self.unit,
        )

    def of_chosen(self, matched_ND: Features, rng: np.random.Generator) -> list[Answer]:
        """Some of the tiles; ``matched_ND`` is each class in the colours of all."""
        distances = self.classes(self.features_ND) | {"duplicates": self.duplicates(rng)}
        matched = self.classes(matched_ND)
        return [
            Answer(
                change=name,
                distance=distance,
                share=distance / self.unit,
                share_interval=None,
                matched_share=matched[name] / self.unit if name in matched else None,
            )
            for name, distance in distances.items()
        ]

    def _changed(self, features_ND: Features) -> Discrepancy:
        reference = self.reference
        x_ND = reference.scale(features_ND)
        return self._between(x_ND, reference.patient_M, reference.features_MD, reference.patient_M)

    def classes(self, features_ND: Features) -> dict[str, float]:
        """How far a class lies from another, and from all tiles; means over the classes."""
        x_ND, patient_N = self.reference.scale(features_ND), self.reference.patient_M
        members = [
            rows
            for name in np.unique(self._class_N)
            if self._is_known(rows := np.flatnonzero(self._class_N == name))
        ]
        if len(members) < 2:
            return {}
        wrong = [
            self._between(x_ND[a], patient_N[a], x_ND[b], patient_N[b]).squared()
            for a, b in itertools.combinations(members, 2)
        ]
        alone = [
            self._between(
                x_ND[rows], patient_N[rows], self.reference.features_MD, patient_N
            ).squared()
            for rows in members
        ]
        return {"wrong class": float(np.mean(wrong)), "one class only": float(np.mean(alone))}

    def duplicates(self, rng: np.random.Generator) -> float:
        """Of copies of few tiles of one half of the patients, as images for the other half."""
        reference, found = self.reference, []
        for _ in range(_SPLITS):
            first, second = halves(reference.patient_M, rng)
            few = rng.choice(second, max(2, len(second) // COPIES), replace=False)
            x_ND = np.repeat(reference.features_MD[few], COPIES, axis=0)
            asked_N = rng.choice(reference.patient_M[first], len(x_ND))
            real_ND, patient_N = reference.features_MD[first], reference.patient_M[first]
            found.append(self._between(x_ND, asked_N, real_ND, patient_N).squared())
        return float(np.mean(found))

    def _is_known(self, rows: Rows) -> bool:
        enough = len(rows) >= _FEWEST_OF_A_CLASS
        return enough and len(np.unique(self.reference.patient_M[rows])) > 1

    def _between(
        self, x_ND: Features, patient_N: Patients, y_MD: Features, patient_M: Patients
    ) -> Discrepancy:
        kernel = self.reference.kernel
        return Discrepancy.of(
            kernel(x_ND, x_ND), kernel(y_MD, y_MD), kernel(x_ND, y_MD), patient_N, patient_M
        )
