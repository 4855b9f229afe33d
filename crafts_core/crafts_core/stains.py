"""Stain as optical density (Beer-Lambert): from pixels and back, taken apart, mixed anew.

Shape letters: C colours, S stains. Leading dimensions are free.
"""

from typing import TypeVar

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]
Vector = npt.NDArray[np.float64]
Precision = TypeVar("Precision", np.float32, np.float64)

STAIN_SC = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
"""Colour of hematoxylin, eosin and the rest (DAB) in optical density, as Ruifrok and Johnston
(2001) published it."""
UNIT_STAIN_SC: npt.NDArray[np.float64] = STAIN_SC / np.linalg.norm(STAIN_SC, axis=1, keepdims=True)


def optical_density(pixels: Pixels, dtype: type[Precision]) -> npt.NDArray[Precision]:
    """Density of each colour of pixels, of the same shape; white is nearly 0."""
    density: npt.NDArray[Precision] = -np.log((pixels.astype(dtype) + 1) / 256)
    return density


def from_density(density: npt.NDArray[np.floating]) -> Pixels:
    """The uint8 pixels of these densities, clipped to what a pixel can be."""
    pixels: Pixels = np.clip(np.rint(256 * np.exp(-density) - 1), 0, 255).astype(np.uint8)
    return pixels


def stained_otherwise(pixels: Pixels, *, scale_S: Vector, shift_S: Vector) -> Pixels:
    """Each stain's density times ``scale_S`` plus ``shift_S``."""
    amount = optical_density(pixels, np.float64) @ np.linalg.inv(UNIT_STAIN_SC)
    return from_density((amount * scale_S + shift_S) @ UNIT_STAIN_SC)


def stain_amounts(levels: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """Decadic density of each stain in pixels 0 to 255, as stains are told to people."""
    density = -np.log10(np.maximum(levels, 1) / 255)
    amounts: npt.NDArray[np.float64] = density @ np.linalg.inv(UNIT_STAIN_SC)
    return amounts
