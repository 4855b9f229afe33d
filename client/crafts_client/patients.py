"""A cohort as the trainer sees it: any patient's tiles as one batch, straight from the cache.

Nothing here names a patient; the index is the place in the tile store. A tile that cannot be used
(unreadable, or not finite, in whatever is kept of it) weighs nothing and stops nothing: an error
would tell that its patient was drawn.

Shape letters: B tiles, C H W latent, L tokens, D features, K anchors.
"""

import zlib
from collections.abc import Collection, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from crafts_client.errors import HomeError
from crafts_client.home import SiteHome
from crafts_core.foundation import Foundation
from crafts_core.plan_sections import Modality
from crafts_core.stages.alignment import NO_CLASS
from crafts_core.stages.batch import TileBatch
from crafts_core.tiles.augment import turned_as_view
from crafts_core.tiles.conditions import to_floats
from crafts_core.tiles.latents import LatentCache, tile_keys
from crafts_core.tiles.store import TileStore, readable
from crafts_core.vocabulary import caption_class
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
        self._num_unusable = 0
        self._classes: dict[tuple[str, ...], Tensor] = {}

    @classmethod
    def of(cls, home: SiteHome, foundation: Foundation) -> "PatientTiles":
        """A home's own tiles. Shards are not read here: ``tiles check`` does that.

        Raises:
            TileStoreError: there is no finished tile store or latent cache.
            HomeError: the tiles are another cohort's.
        """
        store = TileStore.open(home.tile_store_path, check_shards=False)
        if store.cohort != home.config.cohort:
            raise HomeError(
                f"the tile store holds cohort {store.cohort}, site.toml says "
                f"{home.config.cohort}; set cohort back, or ingest again"
            )
        return cls(store, LatentCache.open(store, foundation.manifest.hash), foundation)

    @property
    def pseudonyms(self) -> Sequence[str]:
        """Of everybody in the store, whoever has withdrawn as well."""
        return self._store.patients

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

    def take_num_unusable(self) -> int:
        """How many drawn tiles could not be used, since this was last asked.

        Counted on patients without noise: for the site's own eyes.
        """
        taken, self._num_unusable = self._num_unusable, 0
        return taken

    def batch(
        self,
        patient: int,
        *,
        max_tiles: int,
        generator: torch.Generator,
        modality: Modality | None = None,
        captions: tuple[str, ...] = (),
    ) -> TileBatch:
        """Up to ``max_tiles`` of one patient's tiles, drawn uniformly without replacement.

        Each tile weighs the same and the weights sum to one, whatever the number of tiles; one that
        cannot be used is left out, and the others keep their weights. Where the cache has several
        views of a tile, one is drawn.

        With a ``modality`` only tiles that have such a condition are drawn, and it comes along. A
        patient without any gives an empty batch: sampled like everybody, contributing nothing.
        With ``captions`` every tile says which of them is its own.
        """
        every_row = self._store.tile_rows_of(self._places[patient])
        if modality is not None:
            every_row = every_row[self._store.has_condition(every_row, modality)]
        rows = _chosen(every_row, max_tiles, generator)
        view_B = None
        if self._cache.views > 1:
            view_B = torch.randint(self._cache.views, (len(rows),), generator=generator).numpy()
        caption_ids = self._store.caption_ids(rows)
        parts = [
            self._cache.latents(rows, view_B),
            self._cache.text(caption_ids),
            self._cache.tile_embeddings(rows, view_B),
            self._cache.caption_embeddings(caption_ids),
        ]
        if modality is not None:
            parts.append(self._conditions(rows, view_B, modality))
        if captions:
            parts.append(self.classes_of(captions)[caption_ids])
        latents_BCHW, text_BLD, tile_BD, caption_BD, *more = self._usable(parts)
        weight_B = latents_BCHW.new_full((len(latents_BCHW),), 1.0 / max(len(rows), 1))
        return TileBatch(
            latents_BCHW=latents_BCHW,
            text_BLD=text_BLD,
            null_text_LD=self._foundation.null_text_LD,
            weight_B=weight_B,
            tile_embedding_BD=tile_BD,
            caption_embedding_BD=caption_BD,
            condition_BCHW=more.pop(0) if modality is not None else None,
            class_B=more.pop(0).squeeze(1) if captions else None,
        )

    def embeddings(
        self,
        patient: int,
        *,
        max_tiles: int,
        generator: torch.Generator,
        captions: tuple[str, ...],
    ) -> tuple[Tensor, Tensor]:
        """Of up to ``max_tiles`` of a patient's tiles as they are: embeddings and classes."""
        every_row = self._store.tile_rows_of(self._places[patient])
        rows = _chosen(every_row, max_tiles, generator)
        class_B1 = self.classes_of(captions)[self._store.caption_ids(rows)]
        embedding_BD, class_B1 = self._usable([self._cache.tile_embeddings(rows), class_B1])
        return embedding_BD, class_B1.squeeze(1)

    def images(
        self, patient: int, *, max_tiles: int, generator: torch.Generator
    ) -> npt.NDArray[np.uint8]:
        """Pixels of up to ``max_tiles`` of a patient's tiles, (B, H, W, 3), that can be read."""
        every_row = self._store.tile_rows_of(self._places[patient])
        images_BHWC, is_readable_B = readable(
            self._store.read_images, _chosen(every_row, max_tiles, generator)
        )
        self._num_unusable += int((~is_readable_B).sum())
        return images_BHWC[is_readable_B]

    def classes_of(self, captions: tuple[str, ...]) -> Tensor:
        """Of every caption of the store which of the study's it is, a column; found once."""
        if captions not in self._classes:
            found = [caption_class(text, captions) for text in self._store.captions]
            column = [[NO_CLASS if number is None else number] for number in found]
            self._classes = {captions: torch.tensor(column)}
        return self._classes[captions]

    def _usable(self, parts_B: Sequence[Tensor]) -> list[Tensor]:
        """Only the tiles of which all parts are finite, on the device."""
        finite = [part_B.flatten(1).isfinite().all(dim=1) for part_B in parts_B]
        is_usable_B = torch.stack(finite).all(dim=0)
        self._num_unusable += int((~is_usable_B).sum())
        return [part_B[is_usable_B].to(self._foundation.device) for part_B in parts_B]

    def _conditions(self, rows: Places, view_B: Places | None, modality: Modality) -> Tensor:
        """Of some rows, turned as their views are, (B, C, H, W); NaN where one is unreadable."""
        read = partial(self._store.read_conditions, modality=modality)
        stored_BCHW, is_readable_B = readable(read, rows)
        if view_B is not None:
            for place, (row, view) in enumerate(zip(rows, view_B, strict=True)):
                over_HWC = stored_BCHW[place].transpose(1, 2, 0)
                turned_HWC = turned_as_view(over_HWC, int(view), key=self._keys[row])
                stored_BCHW[place] = turned_HWC.transpose(2, 0, 1)
        condition_BCHW = torch.from_numpy(to_floats(stored_BCHW, modality))
        condition_BCHW[torch.from_numpy(~is_readable_B)] = torch.nan
        return condition_BCHW


def _chosen(every_row: Places, max_tiles: int, generator: torch.Generator) -> Places:
    """Up to so many of some rows, each as likely as any."""
    rows: Places = every_row[
        torch.randperm(len(every_row), generator=generator)[:max_tiles].numpy()
    ]
    return rows
