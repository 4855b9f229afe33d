"""The same real tiles as a site with another secret salt would have them."""

from dataclasses import replace

import numpy as np

from crafts_core.evaluation.real_tiles import RealTiles


def resalted(tiles: RealTiles, seed: int) -> RealTiles:
    """Other pseudonyms, hence another order of patients and rows."""
    names = np.unique(tiles.patients)
    pseudonyms = dict(zip(names, np.random.default_rng(seed).permutation(len(names)), strict=True))
    renamed = np.array([f"{pseudonyms[name]:04x}" for name in tiles.patients])
    return replace(tiles, patients=renamed).take(np.argsort(renamed, kind="stable"))
