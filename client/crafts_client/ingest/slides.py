"""Reading slides: exact scale, bounded memory, and no word of what else a file holds.

Positions are level-0 pixels throughout. A slide object belongs to one process and one thread; it
is opened where it is used and never crosses a fork.
"""

import math
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from PIL import Image

from crafts_client.ingest.errors import SlideError
from crafts_client.ingest.readers.opening import open_reader
from crafts_client.ingest.readers.seam import Pixels, Reader, Scale

__all__ = ["MAX_UPSAMPLING", "Box", "MissingScaleError", "Pixels", "Slide"]

MIN_MPP, MAX_MPP = 0.06, 20.0
"""Outside these a scale is a file's placeholder (72 dpi, for one), or a tenth of what it was before
a converter took millimetres for centimetres; an oil objective of 100x gives 0.06 to 0.1."""
MIN_MICRONS_AT_1X, MAX_MICRONS_AT_1X = 2.5, 40.0
"""Microns per pixel times magnification: a camera's pixel, with adapters and binning."""
MAX_DISAGREEMENT = 0.05
"""Between two statements in one file; more is a contradiction."""
MAX_ANISOTROPY = 0.1
MAX_UPSAMPLING = 1.02
"""A level may be this much too coarse before a finer one is read: downsamples are not exact."""
MAX_READ_PX = 2048
"""Side of the pieces that a thumbnail is read in."""
_REDUCING_GAP = 1.5
"""A thumbnail is reduced by a whole number first, down to so many times its size."""
MAX_REGION_PX = 2 * 4096**2
"""No tile needs more pixels of a level; a scale that is far off would."""

Box = tuple[float, float, float, float]


class MissingScaleError(SlideError):
    """The file does not say how large a pixel is; the table must."""


class Slide:
    """An open slide with a known scale. Holds no label, macro or description."""

    def __init__(self, path: Path, mpp: float | None) -> None:
        self._closing = ExitStack()
        self.source: Reader = open_reader(path)
        self._closing.callback(self.source.close)
        try:
            self.mpp_x, self.mpp_y = (mpp, mpp) if mpp is not None else _checked_mpp(self.source)
        except SlideError:
            self._closing.close()
            raise
        self.size_px: tuple[int, int] = self.source.levels[0][:2]
        self.scanner: str = self.source.scanner
        """Vendor and model as far as they are known; never a serial number."""
        self.reader: str = self.source.name
        """What reads it: ``openslide``, ``tiffslide``, ``wsidicom`` or ``image``."""
        self.damaged_levels: set[int] = set()
        """Coarse levels on which a piece of the thumbnail could not be decoded."""
        self._downsamples = [level.downsample for level in self.source.levels]

    @classmethod
    def open(cls, path: Path, *, mpp: float | None = None) -> Self:
        """Open a slide, or a plain image; ``mpp`` overrides what the file says.

        Args:
            path: A file, or the folder that holds one DICOM slide.
            mpp: Microns per level-0 pixel.

        Raises:
            MissingScaleError: neither the file nor the caller knows the scale.
            SlideError: the file cannot be read.
        """
        return cls(path, mpp)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._closing.close()

    def close_with(self, close: Callable[[], None]) -> None:
        """Call ``close`` when the slide is closed, for what lives as long as the slide."""
        self._closing.callback(close)

    def read(self, box: Box, size_px: tuple[int, int]) -> Pixels:
        """The level-0 box (x, y, width, height), resampled to exactly ``size_px``.

        The box may lie between pixels; the coarsest level that is fine enough is read. After an
        error the slide can be read on elsewhere.

        Raises:
            SlideError: these pixels cannot be decoded, or are far too many.
        """
        return self._read(box, size_px, self._level_for(box[2] / size_px[0], box[3] / size_px[1]))

    def _read(
        self, box: Box, size_px: tuple[int, int], number: int, reducing_gap: float | None = None
    ) -> Pixels:
        """A box of one level."""
        x, y, width, height = box
        level = self.source.levels[number]
        downsample = level.downsample
        corner = (int(x / downsample), int(y / downsample))
        start_x, start_y = self.source.start(number, corner)
        left, top = (x - start_x) / downsample, (y - start_y) / downsample
        right, bottom = left + width / downsample, top + height / downsample
        extent = (
            max(1, min(math.ceil(right - 1e-9), level.width - corner[0])),
            max(1, min(math.ceil(bottom - 1e-9), level.height - corner[1])),
        )
        if extent[0] * extent[1] > MAX_REGION_PX:
            raise SlideError(f"a region of {extent[0]} x {extent[1]} pixels is too large to read")
        region = self.source.read(number, corner, extent)
        crop = (left, top, min(right, extent[0]), min(bottom, extent[1]))
        if extent != size_px or crop != (0, 0, *extent):
            image = Image.fromarray(region)
            hamming = Image.Resampling.HAMMING
            return np.asarray(image.resize(size_px, hamming, box=crop, reducing_gap=reducing_gap))
        return region

    def thumbnail(
        self, *, max_px: int, min_mpp: float, beat: Callable[[], None] | None = None
    ) -> Pixels:
        """The whole slide, at most ``max_px`` a side and not finer than ``min_mpp``.

        Read in pieces, so that a slide without coarse levels does not fill the memory; ``beat``
        is called after each, as a sign of life. A piece that is damaged on the coarsest level that
        is fine enough is read from the next finer one.

        Raises:
            SlideError: a piece is damaged on level 0, too.
        """
        width, height = self.size_px
        scale = max(width / max_px, height / max_px, min_mpp / self.mpp_x, 1.0)
        columns, rows = max(1, round(width / scale)), max(1, round(height / scale))
        thumbnail = np.empty((rows, columns, 3), dtype=np.uint8)
        level = self._level_for(width / columns, height / rows)
        self._fill(thumbnail, (0, 0, columns, rows), level, beat)
        return thumbnail

    def _fill(
        self,
        thumbnail: Pixels,
        part: tuple[int, int, int, int],
        number: int,
        beat: Callable[[], None] | None,
    ) -> None:
        """Read a part (left, top, right, bottom) of a thumbnail from a level, or a finer one."""
        rows, columns = thumbnail.shape[:2]
        step_x, step_y = self.size_px[0] / columns, self.size_px[1] / rows
        side = max(1, int(MAX_READ_PX * self._downsamples[number] / max(step_x, step_y)))
        for top in range(part[1], part[3], side):
            for left in range(part[0], part[2], side):
                right, bottom = min(left + side, part[2]), min(top + side, part[3])
                size = (right - left, bottom - top)
                box = (left * step_x, top * step_y, size[0] * step_x, size[1] * step_y)
                try:
                    piece = self._read(box, size, number, _REDUCING_GAP)
                except SlideError:
                    if number == 0:
                        raise
                    self.damaged_levels.add(number)
                    self._fill(thumbnail, (left, top, right, bottom), number - 1, beat)
                else:
                    thumbnail[top:bottom, left:right] = piece
                if beat is not None:
                    beat()

    def _level_for(self, *wanted: float) -> int:
        """The coarsest level whose downsample is at most what is wanted."""
        most = min(wanted) * MAX_UPSAMPLING
        return max((number for number, d in enumerate(self._downsamples) if d <= most), default=0)


def _checked_mpp(source: Reader) -> tuple[float, float]:
    """Microns per level-0 pixel along x and y, if what the file says can be right.

    Of several statements those that cannot be right do not count; the others must agree.
    """
    if not source.scales:
        raise MissingScaleError("the file has no microns per pixel; give them in column mpp")
    plausible = [scale for scale in source.scales if _is_plausible(scale)]
    if not plausible:
        _, mpp_x, mpp_y = source.scales[0]
        raise MissingScaleError(
            f"the file's {mpp_x:g} x {mpp_y:g} microns per pixel cannot be right; "
            "give the true value in column mpp"
        )
    first = plausible[0]
    for other in plausible[1:]:
        if not (_agree(first.mpp_x, other.mpp_x) and _agree(first.mpp_y, other.mpp_y)):
            raise MissingScaleError(
                f"{first.source} says {first.mpp_x:g} microns per pixel, {other.source} "
                f"{other.mpp_x:g}; give the true value in column mpp"
            )
    power = source.objective_power
    if power and not MIN_MICRONS_AT_1X <= first.mpp_x * power <= MAX_MICRONS_AT_1X:
        raise MissingScaleError(
            f"{first.source} says {first.mpp_x:g} microns per pixel, which cannot be right with an "
            f"objective of {power:g}x; give the true value in column mpp"
        )
    return first.mpp_x, first.mpp_y


def _is_plausible(scale: Scale) -> bool:
    return (
        all(MIN_MPP <= mpp <= MAX_MPP for mpp in scale[1:])
        and abs(scale.mpp_x / scale.mpp_y - 1) <= MAX_ANISOTROPY
    )


def _agree(one: float, other: float) -> bool:
    return abs(one / other - 1) <= MAX_DISAGREEMENT
