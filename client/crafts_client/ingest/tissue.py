"""Where a slide has tissue, where somebody drew on it, and how sharp a tile is.

Every answer is a function of one slide alone: nothing here is fitted on a cohort, so nothing here
needs privacy budget.

Shape letters: H and W thumbnail or tile pixels.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage

Mask = npt.NDArray[np.bool_]
Pixels = npt.NDArray[np.uint8]

SATURATION_FLOOR = 8 / 255
"""Below this a pixel is glass whatever Otsu says: on a slide without tissue it splits noise."""
SATURATION_CAP = 20 / 255
"""Above this a pixel is tissue whatever Otsu says: it splits pale fat from dense tissue."""
GLASS_FLOOR = 200
"""Empty glass is at least this bright in every channel."""
MAX_SMALL_REGION = 0.02
"""No region above this part of the slide is small, however small the slide."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TissueMask:
    """What a thumbnail says about the slide, addressed in level-0 pixels."""

    is_tissue_HW: Mask
    is_pen_HW: Mask
    scale_x: float
    """Level-0 pixels per mask pixel."""
    scale_y: float

    def fractions(
        self, frame_N4: npt.NDArray[np.float64]
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Parts of each (x, y, width, height) frame that are tissue, and that are pen."""
        tissue_N = _box_means(self.is_tissue_HW, frame_N4, self.scale_x, self.scale_y)
        pen_N = _box_means(self.is_pen_HW, frame_N4, self.scale_x, self.scale_y)
        return tissue_N, pen_N


def find_tissue(
    thumbnail: Pixels, *, mpp: float, slide_px: tuple[int, int], min_region_mm2: float = 0.05
) -> TissueMask:
    """Mask of a thumbnail of the whole slide.

    Args:
        thumbnail: RGB, shape (H, W, 3).
        mpp: Microns per thumbnail pixel.
        slide_px: Level-0 (width, height).
        min_region_mm2: Regions of tissue below this are dropped, and holes below it filled.
    """
    small_px = min_region_mm2 * 1e6 / mpp**2
    is_pen_HW = pen_mask(thumbnail)
    is_tissue_HW = fill_small_holes(tissue_mask(thumbnail), small_px) & ~is_pen_HW
    height, width = is_tissue_HW.shape
    return TissueMask(
        is_tissue_HW=drop_small_regions(
            is_tissue_HW, min(small_px, MAX_SMALL_REGION * is_tissue_HW.size)
        ),
        is_pen_HW=is_pen_HW,
        scale_x=slide_px[0] / width,
        scale_y=slide_px[1] / height,
    )


def tissue_mask(thumbnail: Pixels) -> Mask:
    """Areas more coloured than the slide's own glass."""
    light_HW3 = np.minimum(thumbnail / _glass_colour(thumbnail), 255).astype(np.float32)
    saturation_HW = ndimage.median_filter(_saturation(light_HW3), size=7)
    threshold = min(max(otsu_threshold(saturation_HW), SATURATION_FLOOR), SATURATION_CAP)
    coloured_HW: Mask = saturation_HW > threshold * 255
    return coloured_HW


def pen_mask(thumbnail: Pixels) -> Mask:
    """Marker ink: hues that hematoxylin and eosin do not have, pure red, and black."""
    pixels_HW3 = ndimage.median_filter(thumbnail, size=(3, 3, 1)).astype(np.float32)
    value_HW = pixels_HW3.max(axis=2)
    saturation_HW = _saturation(pixels_HW3) / 255
    hue_HW = _hue_degrees(pixels_HW3)
    green_HW = (hue_HW > 75) & (hue_HW < 200) & (saturation_HW > 0.15)
    blue_HW = (hue_HW >= 200) & (hue_HW < 236) & (saturation_HW > 0.35)
    red_HW = ((hue_HW > 345) | (hue_HW < 15)) & (saturation_HW > 0.6)
    ink_HW = green_HW | blue_HW | red_HW | (value_HW < 60)
    # Single pixels are pigment, folds or compression; a stroke survives the opening.
    stroke_HW = ndimage.binary_opening(ink_HW, iterations=1)
    grown: Mask = ndimage.binary_dilation(stroke_HW, iterations=2)
    return grown


def drop_small_regions(mask_HW: Mask, min_px: float) -> Mask:
    """Remove connected regions of fewer than ``min_px`` pixels."""
    labels_HW, num_regions = ndimage.label(mask_HW)
    sizes = np.bincount(labels_HW.ravel(), minlength=num_regions + 1)
    keep = sizes >= min_px
    keep[0] = False
    kept: Mask = keep[labels_HW]
    return kept


def fill_small_holes(mask_HW: Mask, max_px: float) -> Mask:
    """Count fat and small lumina as tissue; a large lumen stays glass."""
    holes_HW = ndimage.binary_fill_holes(mask_HW) & ~mask_HW
    filled_HW: Mask = mask_HW | (holes_HW & ~drop_small_regions(holes_HW, max_px))
    return filled_HW


def otsu_threshold(values: Pixels) -> float:
    """Otsu's split of uint8 values, as a fraction of 255."""
    counts = np.bincount(values.ravel(), minlength=256).astype(np.float64)
    levels = np.arange(256)
    below = np.cumsum(counts)
    above = below[-1] - below
    sum_below = np.cumsum(counts * levels)
    with np.errstate(divide="ignore", invalid="ignore"):
        gap = sum_below / below - (sum_below[-1] - sum_below) / above
        variance = below * above * gap**2
    return float(np.nanargmax(np.nan_to_num(variance, nan=-1.0))) / 255


def sharpness(tile: Pixels) -> float:
    """Variance of the Laplacian of the grey tile; near zero where nothing is in focus."""
    grey_HW = tile.astype(np.float32) @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    return float(ndimage.laplace(grey_HW)[1:-1, 1:-1].var())


def tissue_fraction(tile: Pixels) -> float:
    """Part of one tile that is coloured, judged by its own pixels."""
    return float((_saturation(tile) > SATURATION_CAP * 255).mean())


def _glass_colour(thumbnail: Pixels) -> npt.NDArray[np.float32]:
    """White as this scanner sees it, in [0, 1]; plain white where no glass is in sight."""
    darkest_channel_HW = thumbnail.min(axis=2)
    brightest = darkest_channel_HW >= np.quantile(darkest_channel_HW, 0.98)
    colour: npt.NDArray[np.float32] = np.median(thumbnail[brightest], axis=0).astype(np.float32)
    if colour.min() < GLASS_FLOOR:
        return np.ones(3, dtype=np.float32)
    return np.asarray(colour / 255, dtype=np.float32)


def _saturation(pixels: npt.NDArray[np.uint8] | npt.NDArray[np.float32]) -> Pixels:
    """(max - min) / max of the channels, as uint8."""
    # Channel by channel: ten times as fast as a reduction over an axis of three.
    red, green, blue = np.moveaxis(pixels, 2, 0)
    high_HW = np.maximum(np.maximum(red, green), blue).astype(np.float32)
    low_HW = np.minimum(np.minimum(red, green), blue).astype(np.float32)
    saturated: Pixels = np.rint(255 * (high_HW - low_HW) / np.maximum(high_HW, 1)).astype(np.uint8)
    return saturated


def _hue_degrees(pixels_HW3: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    red, green, blue = np.moveaxis(pixels_HW3, 2, 0)
    high = pixels_HW3.max(axis=2)
    span = np.maximum(high - pixels_HW3.min(axis=2), 1e-6)
    sector = np.where(
        high == red,
        (green - blue) / span % 6,
        np.where(high == green, (blue - red) / span + 2, (red - green) / span + 4),
    )
    degrees: npt.NDArray[np.float32] = (60 * sector).astype(np.float32)
    return degrees


def _box_means(
    mask_HW: Mask, frame_N4: npt.NDArray[np.float64], scale_x: float, scale_y: float
) -> npt.NDArray[np.float64]:
    """Mean of the mask in each frame, from one summed-area table; at least one pixel each."""
    height, width = mask_HW.shape
    table = np.zeros((height + 1, width + 1), dtype=np.int64)
    table[1:, 1:] = mask_HW.cumsum(axis=0, dtype=np.int64).cumsum(axis=1)
    x, y, frame_width, frame_height = frame_N4.T
    left = np.clip(np.rint(x / scale_x).astype(int), 0, width - 1)
    top = np.clip(np.rint(y / scale_y).astype(int), 0, height - 1)
    right = np.clip(np.rint((x + frame_width) / scale_x).astype(int), left + 1, width)
    bottom = np.clip(np.rint((y + frame_height) / scale_y).astype(int), top + 1, height)
    sums = table[bottom, right] - table[top, right] - table[bottom, left] + table[top, left]
    means: npt.NDArray[np.float64] = sums / ((bottom - top) * (right - left))
    return means
