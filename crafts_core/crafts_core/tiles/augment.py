"""Variants of a tile: mirrored or turned, and stained as another laboratory might have.

A variant is a function of one tile alone, so it says nothing about other patients. Colour moves in
the space of the stains: optical densities are taken apart into hematoxylin, eosin and a rest by the
fixed matrix of Ruifrok and Johnston (2001), each is scaled and shifted at random (Tellez et al.
2018, "HED-light"), and put together again. Raw tiles stay on disk; variants are made when they are
read.

Shape letters: H W pixels, C colours, S stains.
"""

import hashlib

import numpy as np
import numpy.typing as npt

from crafts_core.stains import stained_otherwise

Pixels = npt.NDArray[np.uint8]

SCALE, SHIFT = 0.05, 0.02
"""Largest relative and absolute change of a stain's density."""


def view_of(image_HWC: Pixels, view: int, *, key: bytes) -> Pixels:
    """One variant of a square tile; view 0 is the tile itself. The same for the same key."""
    if view == 0:
        return image_HWC
    rng = _rng_of(view, key)
    turned_HWC = _turned(image_HWC, rng)
    return stained_otherwise(
        turned_HWC,
        scale_S=rng.uniform(1 - SCALE, 1 + SCALE, 3),
        shift_S=rng.uniform(-SHIFT, SHIFT, 3),
    )


def turned_as_view(image_HWC: Pixels, view: int, *, key: bytes) -> Pixels:
    """What lies over a tile, turned and mirrored as its variant is; no value changes."""
    return image_HWC if view == 0 else _turned(image_HWC, _rng_of(view, key))


def _rng_of(view: int, key: bytes) -> np.random.Generator:
    seed = hashlib.sha256(key + view.to_bytes(4, "big")).digest()
    return np.random.default_rng(int.from_bytes(seed, "big"))


def _turned(image_HWC: Pixels, rng: np.random.Generator) -> Pixels:
    turned_HWC = np.rot90(image_HWC, int(rng.integers(4)))
    return turned_HWC[:, ::-1] if rng.integers(2) else turned_HWC
