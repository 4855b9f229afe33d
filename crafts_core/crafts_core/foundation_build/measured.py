"""What can be measured on a tile of real tissue, in words.

A source tells the diagnosis of a slide, but a tile of it may show nothing but its stroma.
Nuclei take up hematoxylin, which absorbs red; eosin hardly does. So the density of the red channel,
against a threshold of the tile's own, finds nuclei. The bounds between words are tertiles of the
embedded foundation's open tiles. A word must not tell the laboratory: only those are said that stay
true when the tile is stained otherwise.

Shape letters: N tiles, H W C pixels and channels.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage

from crafts_core.foundation_build.views import other_stains
from crafts_core.otsu import otsu_bin
from crafts_core.pixels import to_pixels, to_uint8

Mask = npt.NDArray[np.bool_]

_SMALLEST_UM2 = 8.0
"""Specks below are not nuclei."""
FEW, MANY = 0.18, 0.30
"""Share of the tissue that nuclei cover."""
SMALL_UM2, LARGE_UM2 = 22.0, 29.0
"""Median area of a nucleus."""
OPEN = 0.2
"""Share of the tile that lets light through: lumina, air, fat, clefts."""
_OTHER_STAINS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Measurements of one tile."""

    nuclear_share: float
    nuclear_area_um2: float
    open_share: float

    def phrases(self) -> tuple[str, ...]:
        """The words for what stands out; the middle of a scale is not worth a word."""
        found = []
        if self.nuclear_share < FEW:
            found.append("few nuclei")
        elif self.nuclear_share > MANY:
            found.append("crowded nuclei")
        if 0 < self.nuclear_area_um2 < SMALL_UM2:
            found.append("small nuclei")
        elif self.nuclear_area_um2 > LARGE_UM2:
            found.append("large nuclei")
        if self.open_share > OPEN:
            found.append("open spaces")
        return tuple(found)


def steady_phrases(
    tile_NHWC: npt.NDArray[np.uint8], *, mpp: float, seed: int
) -> list[tuple[str, ...]]:
    """For each tile the words that are true of it and of ``_OTHER_STAINS`` other looks of it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return [_steady(tile_HWC, mpp) for tile_HWC in tile_NHWC]


def _steady(tile_HWC: npt.NDArray[np.uint8], mpp: float) -> tuple[str, ...]:
    looks_BHWC = to_uint8(other_stains(to_pixels(np.stack([tile_HWC] * _OTHER_STAINS))))
    elsewhere = [set(measure(look_HWC, mpp=mpp).phrases()) for look_HWC in looks_BHWC]
    said = measure(tile_HWC, mpp=mpp).phrases()
    return tuple(word for word in said if all(word in words for words in elsewhere))


def measure(tile_HWC: npt.NDArray[np.uint8], *, mpp: float) -> Measured:
    """Nuclei and open spaces of a uint8 RGB tile."""
    density_HWC = -np.log((tile_HWC.astype(np.float32) + 1.0) / 256.0)
    grey_HW = density_HWC.mean(axis=2)
    is_open = grey_HW < max(0.06, 0.2 * float(np.percentile(grey_HW, 80)))
    nuclei = _nuclei(density_HWC[..., 0], is_open)
    areas_um2 = _areas_um2(nuclei, mpp)
    tissue = max(1, int((~is_open).sum()))
    return Measured(
        nuclear_share=float(nuclei.sum() / tissue),
        nuclear_area_um2=float(np.median(areas_um2)) if len(areas_um2) else 0.0,
        open_share=float(is_open.mean()),
    )


def _nuclei(red_HW: npt.NDArray[np.float32], is_open: Mask) -> Mask:
    smooth_HW = ndimage.gaussian_filter(red_HW, 0.7)
    inside = smooth_HW[~is_open]
    if inside.size < 100:
        return np.zeros(red_HW.shape, dtype=bool)
    return np.asarray((smooth_HW > max(_otsu(inside), 0.25)) & ~is_open)


def _areas_um2(mask: Mask, mpp: float) -> npt.NDArray[np.float64]:
    labels, _ = ndimage.label(mask)
    areas_um2 = np.bincount(labels.ravel())[1:].astype(np.float64) * mpp**2
    return np.asarray(areas_um2[areas_um2 >= _SMALLEST_UM2])


def _otsu(values: npt.NDArray[np.float32]) -> float:
    counts, edges = np.histogram(values, bins=128)
    centres = (edges[:-1] + edges[1:]) / 2
    return float(centres[otsu_bin(counts, centres)])
