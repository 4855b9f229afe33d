"""All that can be learnt from or asked about, and which rows of it an arm may learn from.

A split puts every patient on one side: those who are asked about teach nobody, not by a tile, not
by a variant of one, and not by a caption that an image was drawn from.

Letters: R rows, L rows of a lesson, P patients.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import numpy as np
import numpy.typing as npt

from crafts_core.errors import CraftsError
from crafts_core.evaluation.encoder import Images
from crafts_core.evaluation.real_tiles import RealTiles, pixel_digest
from crafts_core.evaluation.resampling import Patients, Rows, Vector, half_of_patients

Kind = Literal["untrained", "real", "augmented", "synthetic", "both"]
"""Learnt from nothing, real tiles, these and variants of them, images, both tiles and images."""
Source = Literal["real", "augmented", "synthetic"]
Words = npt.NDArray[np.str_]
FEWEST_PATIENTS = 4
"""Of a class: two to learn from, two to be asked about."""


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to learn."""

    kind: Kind
    generator: str = ""


REAL = Arm("real")


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Images of one source; rows belong together."""

    source: Source
    generator: str = ""
    images_NHWC: Images
    classes: Sequence[str]
    captions: Sequence[str]
    patients: Patients | None = None
    """Whose tile each is, or was made of; None for synthetic ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """Real tiles, variants of them and synthetic images. Rows belong together."""

    images_RHWC: Images
    source_R: Words
    generator_R: Words
    class_R: Words
    caption_R: Words
    patient_R: Patients
    """-1 of a synthetic image."""

    @classmethod
    def of(cls, parts: Sequence[Part]) -> Self:
        """All parts, one below the other."""
        counts = [len(part.images_NHWC) for part in parts]
        return cls(
            images_RHWC=np.concatenate([part.images_NHWC for part in parts]),
            source_R=np.repeat([part.source for part in parts], counts),
            generator_R=np.repeat([part.generator for part in parts], counts),
            class_R=np.concatenate([np.asarray(part.classes) for part in parts]),
            caption_R=np.concatenate([np.asarray(part.captions) for part in parts]),
            patient_R=np.concatenate(
                [
                    np.full(count, -1) if part.patients is None else part.patients
                    for part, count in zip(parts, counts, strict=True)
                ]
            ),
        )

    @property
    def real_rows(self) -> Rows:
        return np.flatnonzero(self.source_R == "real")

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(np.unique(self.class_R[self.real_rows]).tolist())

    @property
    def num_patients(self) -> int:
        return int(self.patient_R.max()) + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Who is asked about, and who teaches each class, in the order in which they are taken."""

    number: int
    tested: Patients
    taught: Mapping[str, Patients]

    def __post_init__(self) -> None:
        both = set(self.tested.tolist()) & {p for each in self.taught.values() for p in each}
        if both:
            raise ValueError(f"{len(both)} patients are on both sides of a split")

    def tested_rows(self, pool: Pool) -> Rows:
        """Real tiles that are asked about."""
        return np.flatnonzero((pool.source_R == "real") & np.isin(pool.patient_R, self.tested))


@dataclass(frozen=True, slots=True, kw_only=True)
class Lesson:
    """Rows to learn from, and how much each counts.

    Parts of a lesson count the same, and in each part the classes: images are as many of each, and
    would otherwise help only because real tiles are not. All lessons of a shot weigh as much as its
    real tiles: a longer one is not regularised less, which would look like help.
    """

    rows: Rows
    weight_L: Vector


def usable(tiles: RealTiles, path: Path) -> tuple[RealTiles, list[str]]:
    """Tiles of classes that can be split, and what is left out, a line each.

    Raises:
        CraftsError: nobody says whose tiles they are, or fewer than two classes are left.
    """
    if not tiles.says_patients:
        raise CraftsError(
            f"{path}: nobody says whose the images are, so who teaches could be asked about; add "
            "a column patient"
        )
    alone = tiles.take(_rows_of_one_patient(tiles))
    class_N = np.asarray(alone.classes)
    counts = {
        name: len(set(alone.patients[class_N == name])) for name in np.unique(class_N).tolist()
    }
    kept = [name for name, count in counts.items() if count >= FEWEST_PATIENTS]
    if len(kept) < 2:
        raise CraftsError(
            f"{path}: expected two classes (labels, or captions) of at least {FEWEST_PATIENTS} "
            f"patients each, got {len(kept)} of {len(counts)}"
        )
    is_kept_N = np.isin(class_N, kept)
    told = []
    if shared := len(tiles) - len(alone):
        told.append(f"{shared} tiles: several patients have the same pixels")
    if rare := len(counts) - len(kept):  # not named: a class may be what one patient's caption says
        told.append(
            f"{rare} of {len(counts)} classes ({(~is_kept_N).sum()} tiles): fewer than "
            f"{FEWEST_PATIENTS} patients each"
        )
    return alone.take(np.flatnonzero(is_kept_N)), told


def _rows_of_one_patient(tiles: RealTiles) -> Rows:
    """All but tiles of which another patient has a copy: it would teach and be asked about."""
    digests = [pixel_digest(image) for image in tiles.images_NHWC]
    owners = defaultdict(set)
    for digest, patient in zip(digests, tiles.patients.tolist(), strict=True):
        owners[digest].add(patient)
    return np.flatnonzero([len(owners[digest]) == 1 for digest in digests])


def draw_split(pool: Pool, *, seed: int, number: int) -> Split:
    """A random half of each class's patients is asked about; the others teach.

    A patient with tiles of several classes is drawn with the rarest.

    Raises:
        CraftsError: a class has no patient on one of the sides.
    """
    rng = np.random.default_rng([seed, number])
    rows = pool.real_rows
    patient_N, class_N = pool.patient_R[rows], pool.class_R[rows]
    patients_of = {name: np.unique(patient_N[class_N == name]) for name in pool.classes}
    is_drawn_P, is_tested_P = (np.zeros(pool.num_patients, dtype=np.bool_) for _ in range(2))
    for patients in sorted(patients_of.values(), key=len):
        left = patients[~is_drawn_P[patients]]
        is_tested_P[left] = half_of_patients(len(left), rng)
        is_drawn_P[left] = True
    order = rng.permutation(pool.num_patients)
    taught = {
        name: order[np.isin(order, patients) & ~is_tested_P[order]]
        for name, patients in patients_of.items()
    }
    for name, patients in patients_of.items():
        if not 0 < len(taught[name]) < len(patients):
            raise CraftsError(
                f"no way was found to put patients of {name!r} on both sides of a split; add "
                "patients who have tiles of it alone, or leave it out"
            )
    return Split(number=number, tested=np.flatnonzero(is_tested_P), taught=taught)


def lesson(pool: Pool, split: Split, arm: Arm, shot: int | None) -> Lesson:
    """What an arm learns from.

    Args:
        pool: All there is.
        split: Who may teach.
        arm: Which parts are learnt from.
        shot: Patients of each class whose real tiles are there, or as many as it has; None for all.

    Raises:
        CraftsError: of a class there is nothing to learn from.
    """
    real = _tiles(pool, split, shot, "real")
    parts: dict[Kind, tuple[Rows, ...]] = {
        "untrained": (),
        "real": (real,),
        "augmented": (real, _tiles(pool, split, shot, "augmented")),
        "synthetic": (_images(pool, split, arm.generator),),
        "both": (real, _images(pool, split, arm.generator)),
    }
    chosen = parts[arm.kind]
    rows = np.concatenate(chosen) if chosen else np.empty(0, dtype=np.int64)
    missing = set(pool.classes) - set(pool.class_R[rows].tolist())
    if chosen and missing:
        raise CraftsError(
            f"{arm.generator}: no image of {min(missing)!r} is left without captions of patients "
            "who are asked about; draw more (--num)"
        )
    weights = [_even(pool.class_R[each], len(real) / len(chosen)) for each in chosen]
    return Lesson(rows=rows, weight_L=np.concatenate(weights) if weights else np.empty(0))


def _even(class_L: Words, total: float) -> Vector:
    """Weights of that sum, of which each class has the same share."""
    _, place_L, count_K = np.unique(class_L, return_inverse=True, return_counts=True)
    weight_L: Vector = total / len(count_K) / count_K[place_L]
    return weight_L


def _tiles(pool: Pool, split: Split, shot: int | None, source: Source) -> Rows:
    is_taught_R = np.zeros(len(pool.source_R), dtype=np.bool_)
    for name, patients in split.taught.items():
        is_taught_R |= (pool.class_R == name) & np.isin(pool.patient_R, patients[:shot])
    return np.flatnonzero(is_taught_R & (pool.source_R == source))


def _images(pool: Pool, split: Split, generator: str) -> Rows:
    """A generator's images, but for those from captions that no patient who teaches has."""
    said = np.unique(pool.caption_R[_tiles(pool, split, None, "real")])
    is_own_R = (pool.source_R == "synthetic") & (pool.generator_R == generator)
    return np.flatnonzero(is_own_R & np.isin(pool.caption_R, said))
