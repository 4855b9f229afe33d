"""Real tiles to measure with: pixels, patients, captions and labels, in an order of their own.

A store's rows follow pseudonyms, which follow the site's secret salt. A figure must not: whatever
draws tiles or patients at random takes them ``in_order_of_content`` first.

Letters: N tiles.
"""

import hashlib
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from crafts_core.errors import CraftsError
from crafts_core.evaluation.encoder import Images
from crafts_core.tiles.store import Rows, TileStore


class OverlapError(CraftsError):
    """Tiles to measure on were trained on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RealTiles:
    """Real tiles with their patients and captions. Rows belong together."""

    images_NHWC: Images
    patients: npt.NDArray[np.str_]
    captions: Sequence[str]
    labels: Sequence[str] = ()
    """What each tile shows, in a word, where the site's table had one; else empty, or ``""``."""
    says_patients: bool = True
    """False where nobody says whose tiles are: those of other pixels are then other patients'."""

    @classmethod
    def read(cls, store: TileStore, rows: Rows) -> Self:
        """Those rows of a store."""
        return cls(
            images_NHWC=store.read_images(rows),
            patients=np.asarray(store.patients)[store.patient_indices(rows)],
            captions=[store.captions[place] for place in store.caption_ids(rows)],
            labels=[str(label) for label in store.labels[np.asarray(rows, dtype=np.int64)]],
        )

    @classmethod
    def cat(cls, parts: Sequence[Self]) -> Self:
        """All tiles in order."""
        return cls(
            images_NHWC=np.concatenate([part.images_NHWC for part in parts]),
            patients=np.concatenate([part.patients for part in parts]),
            captions=[caption for part in parts for caption in part.captions],
            labels=[label for part in parts for label in part.labels],
            says_patients=all(part.says_patients for part in parts),
        )

    def __len__(self) -> int:
        return len(self.images_NHWC)

    @property
    def classes(self) -> list[str]:
        """The class of each tile: its label, or its caption where it has none."""
        labels = self.labels or [""] * len(self.captions)
        return [label or caption for label, caption in zip(labels, self.captions, strict=True)]

    @property
    def has_captions(self) -> bool:
        """Whether every tile says what it shows."""
        return all(self.captions)

    @property
    def num_repeated(self) -> int:
        """Tiles that count together with another of the same pixels, since nobody says whose."""
        return 0 if self.says_patients else len(self) - len(np.unique(self.patients))

    @property
    def side_px(self) -> int:
        return int(self.images_NHWC.shape[1])

    def in_the_middle(self, side_px: int) -> Self:
        """The square of that side in the middle of each tile."""
        return replace(self, images_NHWC=middle(self.images_NHWC, side_px))

    def take(self, rows_N: npt.NDArray[np.int64]) -> Self:
        """Some tiles, in that order."""
        return replace(
            self,
            images_NHWC=self.images_NHWC[rows_N],
            patients=self.patients[rows_N],
            captions=[self.captions[row] for row in rows_N],
            labels=[self.labels[row] for row in rows_N] if self.labels else (),
        )

    def in_order_of_content(self) -> Self:
        """The same tiles in an order that pixels and captions decide, patients numbered by it.

        Two sites with the same tiles and other salts get the same. Where two patients have the
        same tiles, either may come first.
        """
        keys = [_digest(*tile) for tile in zip(self.images_NHWC, self.captions, strict=True)]
        tiles_of = defaultdict(list)
        for patient, key in zip(self.patients.tolist(), keys, strict=True):
            tiles_of[patient].append(key)
        rank = {patient: sorted(tiles) for patient, tiles in tiles_of.items()}
        order = sorted(range(len(keys)), key=lambda row: (keys[row], rank[str(self.patients[row])]))
        ordered = self.take(np.asarray(order, dtype=np.int64))
        numbers = {name: place for place, name in enumerate(dict.fromkeys(ordered.patients))}
        names = np.asarray([f"{numbers[name]:08d}" for name in ordered.patients])
        return replace(ordered, patients=names)


def middle(images_NHWC: Images, side_px: int) -> Images:
    """The square of that side in the middle of each image; an image that fits is not copied."""
    top, left = ((side - side_px) // 2 for side in images_NHWC.shape[1:3])
    return images_NHWC[:, top : top + side_px, left : left + side_px]


def pixel_digests(images_NHWC: Images) -> set[bytes]:
    """SHA-256 of each image's pixels."""
    return {pixel_digest(image) for image in images_NHWC}


def pixel_digest(image_HWC: Images) -> bytes:
    """SHA-256 of an image's pixels."""
    return _digest(image_HWC, "")


def _digest(image_HWC: Images, caption: str) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(image_HWC).tobytes() + caption.encode()).digest()


def rows_in_order_of_content(store: TileStore, *, seed: int) -> npt.NDArray[np.int64]:
    """All rows of a store in an order that seed and pixels decide and no pseudonym."""
    drawn = _drawn(store, seed)
    return np.asarray(sorted(range(len(drawn)), key=drawn.__getitem__), dtype=np.int64)


def rows_by_content(store: TileStore, count: int, *, seed: int) -> npt.NDArray[np.int64]:
    """``count`` rows of a store, or all, a choice that seed and pixels decide."""
    if count >= store.num_tiles:
        return np.arange(store.num_tiles)
    return np.sort(rows_in_order_of_content(store, seed=seed)[:count])


def read_by_content(stores: Sequence[TileStore], count: int, *, seed: int) -> RealTiles:
    """``count`` tiles of several stores, or all: the same ones however they are dealt to stores."""
    drawn = sorted(
        (key, place, row)
        for place, store in enumerate(stores)
        for row, key in enumerate(_drawn(store, seed))
    )[:count]
    rows_of = [sorted(row for _, of, row in drawn if of == place) for place in range(len(stores))]
    return RealTiles.cat(
        [
            RealTiles.read(store, np.asarray(rows, dtype=np.int64))
            for store, rows in zip(stores, rows_of, strict=True)
        ]
    )


def _drawn(store: TileStore, seed: int) -> list[bytes]:
    """A number for each tile that seed and pixels decide."""
    return [hashlib.sha256(seed.to_bytes(8, "big") + digest).digest() for digest in store.digests()]


def require_others(training: TileStore, held_out: TileStore) -> None:
    """Refuse to measure on what was trained on.

    Raises:
        OverlapError: the two have a tile (by its pixels) or a patient (by its pseudonym) in common.
    """
    tiles = set(training.digests()) & set(held_out.digests())
    patients = set(training.patients) & set(held_out.patients)
    _refuse_common(tiles, patients, training.path, held_out.path)


def require_other_tiles(
    training: RealTiles, held_out: RealTiles, training_path: Path, held_out_path: Path
) -> None:
    """The same of tiles that were read; of patients where both say whose theirs are.

    Raises:
        OverlapError: the two have a tile or a patient in common; the paths name them.
    """
    tiles = pixel_digests(training.images_NHWC) & pixel_digests(held_out.images_NHWC)
    says = training.says_patients and held_out.says_patients
    patients = set(training.patients.tolist()) & set(held_out.patients.tolist()) if says else ()
    _refuse_common(tiles, patients, training_path, held_out_path)


def _refuse_common(
    tiles: Collection[bytes], patients: Collection[str], training: Path, held_out: Path
) -> None:
    if tiles or patients:
        raise OverlapError(
            f"{training} and {held_out} have {len(tiles)} tiles and {len(patients)} patients in "
            "common; measure on patients that nobody trained on"
        )
