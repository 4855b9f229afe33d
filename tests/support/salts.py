"""The same real tiles as sites with other secret salts would have them."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from crafts_core.evaluation.real_tiles import RealTiles
from crafts_core.tiles import TileStore
from crafts_core.tiles.conditions import STORED_CHANNELS, encode_condition
from crafts_core.tiles.records import TileRecord, encode_tile
from crafts_core.tiles.writer import TileStoreWriter

SALTS = (["7f", "02", "c1", "90", "44"], ["13", "e0", "25", "08", "9d"])
"""Pseudonyms of the same five patients under two salts."""


def resalted(tiles: RealTiles, seed: int) -> RealTiles:
    """Other pseudonyms, hence another order of patients and rows."""
    names = np.unique(tiles.patients)
    pseudonyms = dict(zip(names, np.random.default_rng(seed).permutation(len(names)), strict=True))
    renamed = np.array([f"{pseudonyms[name]:04x}" for name in tiles.patients])
    return replace(tiles, patients=renamed).take(np.argsort(renamed, kind="stable"))


def write_salted(
    path: Path, pseudonyms: list[str], *, tile_px: int, masks: bool = False
) -> TileStore:
    """Two tiles of each patient, with masks of nuclei or without, in the order of pseudonyms."""
    rng = np.random.default_rng(0)
    num = 2 * len(pseudonyms)
    images = rng.integers(256, size=(num, tile_px, tile_px, 3), dtype=np.uint8)
    shape = (num, STORED_CHANNELS["nuclei"], tile_px, tile_px)
    stored = rng.integers(2, size=shape, dtype=np.uint8)
    with TileStoreWriter(path, cohort="x", tile_px=tile_px, mpp=1.0) as writer:
        for place in np.argsort(pseudonyms, kind="stable"):
            name = pseudonyms[place]
            for row in (2 * place, 2 * place + 1):
                record = TileRecord(
                    tile_id=f"{name}-{row}", patient=name, case="c", slide="s", x=0, y=0,
                    level0_width=1, level0_height=1, mpp=1.0, caption=f"caption {row % 3}",
                    label="", tissue_fraction=1, sharpness=1,
                )  # fmt: skip
                mask = {"nuclei": encode_condition(stored[row], "nuclei")} if masks else None
                writer.add(record, encode_tile(images[row]), mask)
    return TileStore.open(path)
