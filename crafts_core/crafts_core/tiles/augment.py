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

Pixels = npt.NDArray[np.uint8]

STAIN_SC = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
"""Colour of hematoxylin, eosin and the rest (DAB) in optical density, as published."""
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


def stained_otherwise(
    image_HWC: Pixels, *, scale_S: npt.NDArray[np.float64], shift_S: npt.NDArray[np.float64]
) -> Pixels:
    """Each stain's density times ``scale_S`` plus ``shift_S``."""
    stain_SC = STAIN_SC / np.linalg.norm(STAIN_SC, axis=1, keepdims=True)
    density_HWC = -np.log((image_HWC.astype(np.float64) + 1) / 256)
    amount_HWS = density_HWC @ np.linalg.inv(stain_SC)
    changed_HWC = (amount_HWS * scale_S + shift_S) @ stain_SC
    pixels_HWC: Pixels = np.clip(np.rint(256 * np.exp(-changed_HWC) - 1), 0, 255).astype(np.uint8)
    return pixels_HWC
