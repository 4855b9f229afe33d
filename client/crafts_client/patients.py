"""A cohort as the trainer sees it: any patient's tiles as one batch, straight from the cache.

Nothing here names a patient; the index is the place in the tile store. Shape letters: B tiles,
C H W latent, L tokens, D features, K anchors.
"""

from collections.abc import Collection

import torch

from crafts_core.aligner import profile
from crafts_core.foundation import Foundation
from crafts_core.stages.batch import TileBatch
from crafts_core.tiles.latents import LatentCache
from crafts_core.tiles.store import TileStore


class PatientTiles:
    """Tiles by patient: cached latents, caption states, and profiles over the public anchors."""

    def __init__(self, store: TileStore, cache: LatentCache, foundation: Foundation) -> None:
        self._store = store
        self._cache = cache
        self._foundation = foundation
        self._places = list(range(store.num_patients))

    def leave_out(self, withdrawn: Collection[str]) -> None:
        """Train without these pseudonyms from now on."""
        everybody = enumerate(self._store.patients)
        self._places = [place for place, patient in everybody if patient not in withdrawn]

    @property
    def num_patients(self) -> int:
        """Exact and therefore private: it decides who is sampled and never leaves the site."""
        return len(self._places)

    def batch(self, patient: int, *, max_tiles: int, generator: torch.Generator) -> TileBatch:
        """Up to ``max_tiles`` of one patient's tiles, drawn uniformly without replacement.

        Each tile weighs the same and the weights sum to one, whatever the number of tiles; where
        the cache has several views of a tile, one is drawn. The profiles v and w are those of
        design section 6.
        """
        all_rows = torch.from_numpy(self._store.tile_rows_of(self._places[patient]))
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
            weight_B=torch.full((len(rows),), 1.0 / len(rows), device=device),
            tile_profile_BK=profile(tile_BD, foundation.anchors_KD),
            caption_profile_BK=profile(caption_BD, foundation.anchors_KD),
        )


def probe_batch(foundation: Foundation, num_tiles: int = 3) -> TileBatch:
    """Public probe tiles as a batch, for checks that must not touch a patient."""
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
    )
