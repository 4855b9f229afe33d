"""Where a slide has tissue, folds and ink, and how sharp and how full a tile is.

Every answer is a function of one slide alone: nothing here is fitted on a cohort, so nothing here
needs privacy budget.

Shape letters: H and W thumbnail or tile pixels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy import ndimage

from crafts_client.ingest.choices import TissueMethod
from crafts_core.otsu import otsu_bin

Mask = npt.NDArray[np.bool_]
Pixels = npt.NDArray[np.uint8]
Number = TypeVar("Number", np.uint8, np.float32)
Channels = Sequence[npt.NDArray[np.uint8]] | Sequence[npt.NDArray[np.float32]]

SATURATION_FLOOR = 8 / 255
"""Below this a pixel is glass whatever Otsu says: on a slide without tissue it splits noise."""
SATURATION_CAP = 20 / 255
"""Above this a pixel is tissue whatever Otsu says: it splits pale fat from dense tissue."""
GLASS_FLOOR = 200
"""Empty glass is at least this bright in every channel."""
DARKNESS_FLOOR = 22 / 255
"""As for saturation; the shade of a coverslip measured 18 on a real slide."""
DARKNESS_CAP = 30 / 255
MAX_SMALL_REGION = 0.02
"""No region above this part of the slide is small, however small the slide."""
MIN_FOLD_PX = 12
"""Smaller dark spots of a thumbnail are nuclei or pigment."""
FOLD_DEVIATIONS = 3.0
"""A fold is this many robust deviations beyond the median of the slide's own tissue."""
FOLD_FLOOR = 0.15
"""No fold is below this saturation minus brightness, however even the tissue."""
_THIN_INK, _INK = 1, 2
_ROWS_AT_A_TIME = 128
INK_HALO_PX = 12
"""How far beside a stroke its thinner ink is looked for."""
MOST_INK = 0.85
"""Where more of the tissue than this has the colours of ink, ink may not be what it is."""
MIN_STAIN_TEXTURE = 4.5
"""Above this mean distance of green from its median over 3 px, on a thumbnail, it is a stain.

Strokes beside or over tissue measured 0.07 to 4.8 on ten real thumbnails, and 0.1 to 2.7 where they
were most of the tissue; three real slides, recoloured green, blue or inverted, 6.4 to 10.4.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class TissueMask:
    """What a thumbnail says about the slide, addressed in level-0 pixels."""

    is_tissue_HW: Mask
    is_pen_HW: Mask
    is_fold_HW: Mask
    scale_x: float
    """Level-0 pixels per mask pixel."""
    scale_y: float
    ink_coloured: float = 0.0
    """Part of the tissue that has the colours of ink."""
    is_stained_like_ink: bool = False
    """Whether nearly all has, and the texture of tissue: then it is a stain, and no ink is said."""

    def fractions(self, frame_N4: npt.NDArray[np.float64]) -> "Fractions":
        """What each (x, y, width, height) frame consists of."""

        def part(mask_HW: Mask) -> npt.NDArray[np.float64]:
            return _box_means(mask_HW, frame_N4, self.scale_x, self.scale_y)

        return Fractions(
            tissue_N=part(self.is_tissue_HW),
            pen_N=part(self.is_pen_HW),
            fold_N=part(self.is_fold_HW),
        )


class Fractions(NamedTuple):
    """Parts of N frames, each in [0, 1]; folds are tissue, too, ink is not."""

    tissue_N: npt.NDArray[np.float64]
    pen_N: npt.NDArray[np.float64]
    fold_N: npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """What one tile's own pixels say."""

    sharpness: float
    tissue_fraction: float


def find_tissue(
    thumbnail: Pixels,
    *,
    mpp: float,
    slide_px: tuple[int, int],
    method: TissueMethod = TissueMethod.OTSU,
    min_region_mm2: float = 0.05,
    seeks_ink: bool = True,
) -> TissueMask:
    """Mask of a thumbnail of the whole slide.

    Args:
        thumbnail: RGB, shape (H, W, 3).
        mpp: Microns per thumbnail pixel.
        slide_px: Level-0 (width, height).
        method: How tissue is told from glass.
        min_region_mm2: Regions of tissue below this are dropped, and holes below it filled.
        seeks_ink: Whether the colours of marker ink are taken for ink.
    """
    small_px = min_region_mm2 * 1e6 / mpp**2
    smooth_HW3 = smoothed(thumbnail)
    is_tissue_HW = fill_small_holes(tissue_mask(thumbnail, method), small_px)
    is_pen_HW = pen_mask(smooth_HW3) if seeks_ink else np.zeros_like(is_tissue_HW)
    inked_HW = is_pen_HW & is_tissue_HW
    ink_coloured = float(inked_HW.sum() / max(is_tissue_HW.sum(), 1))
    is_stain = ink_coloured > MOST_INK and _texture(thumbnail, smooth_HW3, inked_HW) > (
        MIN_STAIN_TEXTURE
    )
    if is_stain:
        is_pen_HW = np.zeros_like(is_tissue_HW)
    is_tissue_HW &= ~is_pen_HW
    height, width = is_tissue_HW.shape
    is_tissue_HW = drop_small_regions(
        is_tissue_HW, min(small_px, MAX_SMALL_REGION * is_tissue_HW.size)
    )
    return TissueMask(
        is_tissue_HW=is_tissue_HW,
        is_pen_HW=is_pen_HW,
        is_fold_HW=fold_mask(smooth_HW3, is_tissue_HW),
        scale_x=slide_px[0] / width,
        scale_y=slide_px[1] / height,
        ink_coloured=ink_coloured,
        is_stained_like_ink=is_stain,
    )


def tissue_mask(thumbnail: Pixels, method: TissueMethod = TissueMethod.OTSU) -> Mask:
    """Areas more coloured, or darker, than the slide's own glass."""
    if method is TissueMethod.ALL:
        return np.ones(thumbnail.shape[:2], dtype=np.bool_)
    # What each of the 256 values of a channel is in the light of the glass.
    light_C256 = np.minimum(
        np.arange(256, dtype=np.float32) / _glass_colour(thumbnail)[:, np.newaxis], 255
    )

    def lit(rows_HW3: Pixels) -> Channels:
        channels = zip(light_C256, _channels(rows_HW3), strict=True)
        return [light_256[channel_HW] for light_256, channel_HW in channels]

    if method is TissueMethod.LUMINANCE:
        darkness_HW = _by_rows(lambda rows: np.rint(255 - _brightness(lit(rows))), thumbnail)
        return _above_otsu(darkness_HW.astype(np.uint8), DARKNESS_FLOOR, DARKNESS_CAP)
    saturation_HW = _by_rows(lambda rows: _saturation(lit(rows)), thumbnail)
    if method is TissueMethod.FIXED:
        return _above_otsu(saturation_HW, SATURATION_FLOOR, SATURATION_FLOOR)
    return _above_otsu(saturation_HW, SATURATION_FLOOR, SATURATION_CAP)


def pen_mask(smooth_HW3: Pixels) -> Mask:
    """Marker ink: hues that hematoxylin and eosin do not have, pure red, and black.

    Beside a stroke of such ink, thinner ink of the same kinds belongs to it; alone it could be
    tissue.
    """
    strength_HW = _by_rows(_ink_strength, smooth_HW3)
    # Single pixels are pigment, folds or compression; a stroke survives the opening.
    stroke_HW = ndimage.binary_opening(strength_HW == _INK, iterations=1)
    if not stroke_HW.any():
        return np.zeros_like(stroke_HW)
    thin_HW = stroke_HW | (strength_HW >= _THIN_INK)
    halo_HW = ndimage.binary_dilation(stroke_HW, iterations=INK_HALO_PX, mask=thin_HW)
    grown: Mask = ndimage.binary_dilation(halo_HW, iterations=2)
    return grown


def _ink_strength(smooth_HW3: Pixels) -> Pixels:
    """What each pixel is by its colour alone: nothing, perhaps thin ink, or ink."""
    channels = _channels(smooth_HW3)
    value_HW = np.maximum(np.maximum(*channels[:2]), channels[2])
    saturation_HW = _saturation(channels) / np.float32(255)
    hue_HW = _hue_degrees(channels)
    green_HW, blue_HW = (hue_HW > 75) & (hue_HW < 200), (hue_HW >= 200) & (hue_HW < 236)
    red_HW = (hue_HW > 345) | (hue_HW < 15)

    def ink(green: float, blue: float, red: float, black: float) -> Mask:
        cold_HW = green_HW & (saturation_HW > green) | blue_HW & (saturation_HW > blue)
        inked_HW: Mask = cold_HW | red_HW & (saturation_HW > red) | (value_HW < black)
        return inked_HW

    thin_HW = ink(0.08, 0.2, 0.35, 100)
    return np.where(ink(0.15, 0.35, 0.6, 60), _INK, np.where(thin_HW, _THIN_INK, 0)).astype(
        np.uint8
    )


def fold_mask(smooth_HW3: Pixels, is_tissue_HW: Mask) -> Mask:
    """Folded tissue: light passes it twice, so it is darker and more saturated than the rest.

    Saturation minus brightness after Bautista and Yagi (2009), against the median and the median
    absolute deviation of this slide's own tissue.
    """
    if not is_tissue_HW.any():
        return np.zeros_like(is_tissue_HW)
    density_HW = _by_rows(_fold_density, smooth_HW3)
    of_tissue = density_HW[is_tissue_HW]
    median = np.median(of_tissue)
    deviation = 1.4826 * np.median(np.abs(of_tissue - median))
    threshold = max(median + FOLD_DEVIATIONS * deviation, FOLD_FLOOR)
    folded_HW = drop_small_regions(is_tissue_HW & (density_HW > threshold), MIN_FOLD_PX)
    grown: Mask = ndimage.binary_dilation(folded_HW)
    return grown


def _fold_density(smooth_HW3: Pixels) -> npt.NDArray[np.float32]:
    channels = _channels(smooth_HW3)
    return (_saturation(channels).astype(np.float32) - _brightness(channels)) / np.float32(255)


def smoothed(pixels: Pixels) -> Pixels:
    """Median over 3 x 3 pixels, channel by channel: what is smaller than half of that goes."""
    if pixels.ndim == 3:
        return np.stack([smoothed(channel_HW) for channel_HW in _channels(pixels)], axis=2)
    padded = np.pad(pixels, 1, mode="edge")
    # Each column of three in order; the median of nine is the median of the largest of the low,
    # the median of the middle and the smallest of the high ones. Twenty times as fast as Pillow's.
    above, here, below = padded[:-2], padded[1:-1], padded[2:]
    low, high = np.minimum(above, here), np.maximum(above, here)
    middle, high = np.minimum(high, below), np.maximum(high, below)
    low, middle = np.minimum(low, middle), np.maximum(low, middle)
    return _median_of_3(
        np.maximum(np.maximum(low[:, :-2], low[:, 1:-1]), low[:, 2:]),
        _median_of_3(middle[:, :-2], middle[:, 1:-1], middle[:, 2:]),
        np.minimum(np.minimum(high[:, :-2], high[:, 1:-1]), high[:, 2:]),
    )


def _median_of_3(a: Pixels, b: Pixels, c: Pixels) -> Pixels:
    return np.maximum(np.minimum(a, b), np.minimum(np.maximum(a, b), c))


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
    return otsu_bin(np.bincount(values.ravel(), minlength=256), np.arange(256)) / 255


def judge(tile: Pixels, method: TissueMethod = TissueMethod.OTSU) -> Quality:
    """Both scores of one RGB tile, cheap beside decoding it."""
    return Quality(sharpness=sharpness(tile), tissue_fraction=tissue_fraction(tile, method))


def sharpness(tile: Pixels) -> float:
    """Variance of the Laplacian of the green channel; near zero where nothing is in focus.

    Green is where both stains absorb. Some 64 rows are enough for a variance.
    """
    green_HW = tile[..., 1].astype(np.int16)
    height, step = len(green_HW), _step(tile)
    above_HW, middle_HW, below_HW = (
        green_HW[start : height - 2 + start : step] for start in range(3)
    )
    laplacian_HW = above_HW[:, 1:-1] + below_HW[:, 1:-1]
    laplacian_HW += middle_HW[:, :-2] + middle_HW[:, 2:]
    laplacian_HW -= middle_HW[:, 1:-1] << 2
    mean = int(laplacian_HW.sum(dtype=np.int64)) / laplacian_HW.size
    values = laplacian_HW.astype(np.float32).ravel()
    return max(float(np.dot(values, values)) / values.size - mean**2, 0.0)


def tissue_fraction(tile: Pixels, method: TissueMethod = TissueMethod.OTSU) -> float:
    """Part of one tile that is coloured, or dark, by some 64 x 64 of its own pixels."""
    if method is TissueMethod.ALL:
        return 1.0
    step = _step(tile)
    red, green, blue = (tile[::step, ::step, channel] for channel in range(3))
    if method is TissueMethod.LUMINANCE:
        sum_HW = np.add(red, green, dtype=np.uint16) + blue
        is_tissue_HW: Mask = sum_HW < 3 * 255 * (1 - DARKNESS_CAP)
    else:
        least = SATURATION_FLOOR if method is TissueMethod.FIXED else SATURATION_CAP
        high_HW = np.maximum(np.maximum(red, green), blue)
        low_HW = np.minimum(np.minimum(red, green), blue)
        # (high - low) / high > least, in whole numbers.
        span_HW = np.multiply(high_HW - low_HW, 255, dtype=np.uint16)
        is_tissue_HW = span_HW > np.multiply(high_HW, round(255 * least), dtype=np.uint16)
    return float(np.count_nonzero(is_tissue_HW)) / is_tissue_HW.size


def _texture(thumbnail: Pixels, smooth_HW3: Pixels, mask_HW: Mask) -> float:
    """How much green differs from its surroundings: ink is even, tissue is not."""
    green_N, smooth_N = (pixels[..., 1][mask_HW].astype(np.int16) for pixels in
                         (thumbnail, smooth_HW3))  # fmt: skip
    return float(np.abs(green_N - smooth_N).mean()) if green_N.size else 0.0


def _step(tile: Pixels) -> int:
    """Every how manieth row of a tile is looked at."""
    return max(2, len(tile) // 64)


def _above_otsu(values_HW: Pixels, floor: float, cap: float) -> Mask:
    """Where the smoothed values lie above Otsu's split of them, kept within bounds.

    Smoothed at half the size, where a median over 3 pixels is what one over 6 would be, in a
    twentieth of the time.
    """
    height, width = values_HW.shape
    half = Image.fromarray(values_HW).reduce(2)
    smooth_HW = smoothed(np.asarray(half))
    above_HW = smooth_HW > min(max(otsu_threshold(smooth_HW), floor), cap) * 255
    whole = Image.fromarray(above_HW.astype(np.uint8)).resize(
        (width, height), Image.Resampling.NEAREST
    )
    return np.asarray(whole).astype(np.bool_)


def _glass_colour(thumbnail: Pixels) -> npt.NDArray[np.float32]:
    """White as this scanner sees it, in [0, 1]; plain white where no glass is in sight."""
    red_HW, green_HW, blue_HW = _channels(thumbnail)
    darkest_channel_HW = np.minimum(np.minimum(red_HW, green_HW), blue_HW)
    brightest = darkest_channel_HW >= np.quantile(darkest_channel_HW, 0.98)
    colour: npt.NDArray[np.float32] = np.median(thumbnail[brightest], axis=0).astype(np.float32)
    if colour.min() < GLASS_FLOOR:
        return np.ones(3, dtype=np.float32)
    return np.asarray(colour / 255, dtype=np.float32)


def _by_rows(
    function: Callable[[Pixels], npt.NDArray[Number]], pixels_HW3: Pixels
) -> npt.NDArray[Number]:
    """A function of single pixels on a few rows at a time, which keeps its arrays small."""
    parts = np.array_split(pixels_HW3, max(1, len(pixels_HW3) // _ROWS_AT_A_TIME))
    return np.concatenate([function(part) for part in parts])


def _channels(pixels_HW3: Pixels) -> list[Pixels]:
    """Red, green and blue, each in one piece: ten times as fast as an axis of three."""
    return [np.ascontiguousarray(pixels_HW3[..., channel]) for channel in range(3)]


def _saturation(channels: Channels) -> Pixels:
    """(max - min) / max of the channels, as uint8."""
    red, green, blue = channels
    high_HW = np.maximum(np.maximum(red, green), blue).astype(np.float32)
    low_HW = np.minimum(np.minimum(red, green), blue).astype(np.float32)
    saturated: Pixels = np.rint(255 * (high_HW - low_HW) / np.maximum(high_HW, 1)).astype(np.uint8)
    return saturated


def _brightness(channels: Channels) -> npt.NDArray[np.float32]:
    """Mean of the channels."""
    red, green, blue = channels
    total_HW = red.astype(np.float32) + green + blue
    return np.asarray(total_HW / 3, dtype=np.float32)


def _hue_degrees(channels: Sequence[Pixels]) -> npt.NDArray[np.float32]:
    red, green, blue = (channel.astype(np.float32) for channel in channels)
    high = np.maximum(np.maximum(red, green), blue)
    span = np.maximum(high - np.minimum(np.minimum(red, green), blue), 1e-6)
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
    if not mask_HW.any():
        return np.zeros(len(frame_N4))
    height, width = mask_HW.shape
    table = np.zeros((height + 1, width + 1), dtype=np.int32)
    np.cumsum(mask_HW, axis=1, dtype=np.int32, out=table[1:, 1:])
    np.cumsum(table, axis=0, out=table)
    x, y, frame_width, frame_height = frame_N4.T
    left = np.clip(np.rint(x / scale_x).astype(int), 0, width - 1)
    top = np.clip(np.rint(y / scale_y).astype(int), 0, height - 1)
    right = np.clip(np.rint((x + frame_width) / scale_x).astype(int), left + 1, width)
    bottom = np.clip(np.rint((y + frame_height) / scale_y).astype(int), top + 1, height)
    sums = table[bottom, right] - table[top, right] - table[bottom, left] + table[top, left]
    means: npt.NDArray[np.float64] = sums / ((bottom - top) * (right - left))
    return means
