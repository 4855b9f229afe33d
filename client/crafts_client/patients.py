"""A cohort as the trainer sees it: any patient's tiles as one batch, straight from the cache.

Nothing here names a patient; the index is the place in the tile store. Shape letters: B tiles,
C H W latent, L tokens, D features, K anchors.
"""

import zlib
from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from crafts_core.aligner import profile
from crafts_core.foundation import Foundation
from crafts_core.plan import Modality
from crafts_core.stages.batch import TileBatch
from crafts_core.tiles.augment import turned_as_view
from crafts_core.tiles.conditions import NUM_CHANNELS, to_floats
from crafts_core.tiles.latents import LatentCache, tile_keys
from crafts_core.tiles.store import TileStore
from crafts_privacy.ranks import Ranks

Places = npt.NDArray[np.int64]


class PatientTiles:
    """Tiles by patient: cached latents, caption states, and profiles over the public anchors."""

    def __init__(self, store: TileStore, cache: LatentCache, foundation: Foundation) -> None:
        self._store = store
        self._cache = cache
        self._foundation = foundation
        self._places = list(range(store.num_patients))
        # What lies over a tile has to turn with its variant.
        self._keys = tile_keys(store) if cache.views > 1 else []

    def leave_out(self, withdrawn: Collection[str]) -> None:
        """Train without these pseudonyms from now on."""
        everybody = enumerate(self._store.patients)
        self._places = [place for place, patient in everybody if patient not in withdrawn]

    @property
    def num_patients(self) -> int:
        """Exact and therefore private: it decides who is sampled and never leaves the site."""
        return len(self._places)

    def of_rank(self, ranks: Ranks) -> Sequence[int]:
        """Whom one of a site's devices deals with: told by the pseudonym alone.

        Were patients dealt out by their number, one more would send the next ones to other devices,
        which may round otherwise.
        """
        return [
            index
            for index in range(self.num_patients)
            if zlib.crc32(self.pseudonym(index).encode()) % ranks.count == ranks.rank
        ]

    def pseudonym(self, patient: int) -> str:
        """Of the patient at an index."""
        return self._store.patients[self._places[patient]]

    def batch(
        self,
        patient: int,
        *,
        max_tiles: int,
        generator: torch.Generator,
        modality: Modality | None = None,
    ) -> TileBatch:
        """Up to ``max_tiles`` of one patient's tiles, drawn uniformly without replacement.

        Each tile weighs the same and the weights sum to one, whatever the number of tiles; where
        the cache has several views of a tile, one is drawn. The profiles v and w are those of
        design section 6.

        With a ``modality`` only tiles that have such a condition are drawn, and it comes along. A
        patient without any gives an empty batch: sampled like everybody, contributing nothing.
        """
        every_row = self._store.tile_rows_of(self._places[patient])
        if modality is not None:
            every_row = every_row[self._store.has_condition(every_row, modality)]
        all_rows = torch.from_numpy(every_row)
        chosen = torch.randperm(len(all_rows), generator=generator)[:max_tiles]
        rows = all_rows[chosen].numpy()
        view_B = None
        if self._cache.views > 1:
            view_B = torch.randint(self._cache.views, (len(rows),), generator=generator).numpy()
        caption_ids = self._store.caption_ids(rows)
        foundation, device = self._foundation, self._foundation.device
        tile_BD = self._cache.tile_embeddings(rows, view_B).to(device)
        caption_BD = self._cache.caption_embeddings(caption_ids).to(device)
        return TileBatch(
            latents_BCHW=self._cache.latents(rows, view_B).to(device),
            text_BLD=self._cache.text(caption_ids).to(device),
            null_text_LD=foundation.null_text_LD,
            weight_B=torch.full((len(rows),), 1.0 / max(len(rows), 1), device=device),
            tile_profile_BK=profile(tile_BD, foundation.anchors_KD),
            caption_profile_BK=profile(caption_BD, foundation.anchors_KD),
            condition_BCHW=None if modality is None else self._conditions(rows, view_B, modality),
        )

    def _conditions(self, rows: Places, view_B: Places | None, modality: Modality) -> Tensor:
        """Of some rows, turned as their views are; (B, C, H, W) on the device."""
        if not len(rows):
            side = self._store.tile_px
            return torch.zeros(
                0, NUM_CHANNELS[modality], side, side, device=self._foundation.device
            )
        stored_BCHW = self._store.read_conditions(rows, modality)
        if view_B is not None:
            for place, (row, view) in enumerate(zip(rows, view_B, strict=True)):
                over_HWC = stored_BCHW[place].transpose(1, 2, 0)
                turned_HWC = turned_as_view(over_HWC, int(view), key=self._keys[row])
                stored_BCHW[place] = turned_HWC.transpose(2, 0, 1)
        return torch.from_numpy(to_floats(stored_BCHW, modality)).to(self._foundation.device)


def probe_batch(
    foundation: Foundation, num_tiles: int = 3, *, modality: Modality | None = None
) -> TileBatch:
    """Public probe tiles as a batch, for checks that must not touch a patient.

    No probe tile has a condition; what stands in for it is noise from a fixed seed.
    """
    tiles = foundation.probe.tiles_NCHW[:num_tiles]
    captions = list(foundation.probe.captions[:num_tiles])
    anchors_KD = foundation.anchors_KD
    return TileBatch(
        latents_BCHW=foundation.generator.encode_images(tiles / 127.5 - 1.0),
        text_BLD=foundation.generator.encode_captions(captions),
        null_text_LD=foundation.null_text_LD,
        weight_B=torch.full((len(captions),), 1.0 / len(captions), device=foundation.device),
        tile_profile_BK=profile(foundation.aligner.embed_images(tiles), anchors_KD),
        caption_profile_BK=profile(foundation.aligner.embed_captions(captions), anchors_KD),
        condition_BCHW=None if modality is None else _made_up(foundation, len(captions), modality),
    )


def _made_up(foundation: Foundation, count: int, modality: Modality) -> Tensor:
    side = foundation.manifest.tile_px
    source = torch.Generator().manual_seed(0)
    shape = (count, NUM_CHANNELS[modality], side, side)
    return torch.rand(shape, generator=source).to(foundation.device)
