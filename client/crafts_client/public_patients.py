"""Patients that nobody is: public probe tiles as a small cohort, for an audit of what trains.

They lie in a real tile store with a real latent cache: an audit goes the site's own way from
shard to gradient. Letters: H W pixels.
"""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from crafts_client.patients import PatientTiles
from crafts_core.foundation import Foundation
from crafts_core.plan_sections import Modality
from crafts_core.stages.batch import TileBatch
from crafts_core.tiles import TileRecord, TileStore, TileStoreWriter, encode_tile
from crafts_core.tiles.conditions import encode_condition, nuclei_condition, to_bytes
from crafts_core.tiles.latents import LatentCache

TILES_EACH = 2
_COHORT = "public"
_GRAIN = 32
"""What is added to a probe tile's pixels at most, so that no two patients are alike."""
_NUCLEI = 4
"""Squares to a side of a made-up map of nuclei."""


class PublicPatients(PatientTiles):
    """A cohort that remembers who was asked for, and whose draws are known.

    A patient's choice of tiles and its noise and timesteps are the same in every step, whoever else
    was drawn: so sums of neighbouring cohorts can be compared number by number, and an attacker
    knows each patient's gradient exactly, as the promise allows it.
    """

    def __init__(self, store: TileStore, cache: LatentCache, foundation: Foundation) -> None:
        super().__init__(store, cache, foundation)
        self.names = tuple(store.patients)
        self._asked: list[int] = []

    @classmethod
    def write(
        cls, folder: Path, foundation: Foundation, *, num_patients: int, views: int
    ) -> "PublicPatients":
        """Make store and cache in an empty folder; the same from the same foundation."""
        rng = np.random.default_rng(0)
        side = foundation.manifest.tile_px
        with TileStoreWriter(folder, cohort=_COHORT, tile_px=side, mpp=1.0) as writer:
            for number in range(num_patients * TILES_EACH):
                pixels_HWC, caption = _tile(foundation, number, rng)
                record = _record(number, side, caption)
                writer.add(record, encode_tile(pixels_HWC), {"nuclei": _nuclei(side, rng)})
        store = TileStore.open(folder)
        return cls(store, LatentCache.build(store, foundation, views=views), foundation)

    def batch(
        self,
        patient: int,
        *,
        max_tiles: int,
        generator: torch.Generator,
        modality: Modality | None = None,
        captions: tuple[str, ...] = (),
    ) -> TileBatch:
        """See :class:`PatientTiles`; what is drawn afterwards from ``generator`` is fixed too."""
        return super().batch(
            patient,
            max_tiles=max_tiles,
            generator=self._asked_for(patient, generator),
            modality=modality,
            captions=captions,
        )

    def embeddings(
        self,
        patient: int,
        *,
        max_tiles: int,
        generator: torch.Generator,
        captions: tuple[str, ...],
    ) -> tuple[Tensor, Tensor]:
        """See :class:`PatientTiles`."""
        fixed = self._asked_for(patient, generator)
        return super().embeddings(patient, max_tiles=max_tiles, generator=fixed, captions=captions)

    def images(
        self, patient: int, *, max_tiles: int, generator: torch.Generator
    ) -> npt.NDArray[np.uint8]:
        """See :class:`PatientTiles`."""
        fixed = self._asked_for(patient, generator)
        return super().images(patient, max_tiles=max_tiles, generator=fixed)

    def _asked_for(self, patient: int, generator: torch.Generator) -> torch.Generator:
        place = self._places[patient]
        self._asked.append(place)
        return generator.manual_seed(place)

    def take_asked(self) -> npt.NDArray[np.float64]:
        """How often each patient was asked for since this was called last, withdrawn ones too."""
        counts = np.bincount(self._asked, minlength=len(self.names)).astype(np.float64)
        self._asked.clear()
        return counts


def _tile(
    foundation: Foundation, number: int, rng: np.random.Generator
) -> tuple[npt.NDArray[np.uint8], str]:
    """A probe tile, moved and grained, with its caption."""
    probe = foundation.probe
    which = number % len(probe.captions)
    public_HWC = probe.tiles_NCHW[which].permute(1, 2, 0).numpy().astype(np.int64)
    moved_HWC = np.roll(public_HWC, rng.integers(0, len(public_HWC), 2), axis=(0, 1))
    grained_HWC = moved_HWC + rng.integers(-_GRAIN, _GRAIN + 1, moved_HWC.shape)
    return grained_HWC.clip(0, 255).astype(np.uint8), probe.captions[which]


def _record(number: int, side: int, caption: str) -> TileRecord:
    patient = f"public{number // TILES_EACH:04d}"
    return TileRecord(
        tile_id=f"{number:08d}",
        patient=patient,
        case="",
        slide=patient,
        x=number * side,
        y=0,
        level0_width=side,
        level0_height=side,
        mpp=1.0,
        caption=caption,
        label="",
        tissue_fraction=1.0,
        sharpness=1.0,
    )


def _nuclei(side: int, rng: np.random.Generator) -> bytes:
    labels = rng.integers(0, 3, (_NUCLEI, _NUCLEI))
    whole_HW = np.kron(labels, np.ones((-(-side // _NUCLEI),) * 2, dtype=np.int64))[:side, :side]
    return encode_condition(to_bytes(nuclei_condition(whole_HW), "nuclei"), "nuclei")
