"""Reading slides: the one place that knows OpenSlide.

Positions are level-0 pixels throughout. A slide object belongs to one process and one thread; it
is opened where it is used and never crosses a fork.
"""

import math
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt
import openslide
from PIL import Image, ImageColor

from crafts_client.ingest.errors import SlideError

MIN_MPP, MAX_MPP = 0.05, 20.0
"""Outside these a scale is a file's placeholder (72 dpi, for one), not a microscope's."""
MAX_ANISOTROPY = 0.1
MAX_UPSAMPLING = 1.02
"""A level may be this much too coarse before a finer one is read: downsamples are not exact."""
MAX_READ_PX = 4096
CACHE_BYTES = 32 * 2**20

Pixels = npt.NDArray[np.uint8]
Box = tuple[float, float, float, float]


class MissingScaleError(SlideError):
    """The file does not say how large a pixel is; the table must."""


def find_slides(folder: Path) -> list[Path]:
    """Every file below a folder that OpenSlide takes for a slide, in order of their names."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return [path for path in files if openslide.OpenSlide.detect_format(path) is not None]


class Slide:
    """An open slide with a known scale. Holds no label, macro or description."""

    def __init__(self, path: Path, mpp: float | None) -> None:
        self._path = path
        self._handle = _open_handle(path)
        try:
            self.size_px: tuple[int, int] = self._handle.dimensions
            self.mpp_x, self.mpp_y = (mpp, mpp) if mpp is not None else _read_mpp(self._handle)
            background = self._handle.properties.get("openslide.background-color", "FFFFFF")
            self._background = ImageColor.getrgb(f"#{background}")
        except (SlideError, ValueError, openslide.OpenSlideError) as error:
            self._handle.close()
            raise _as_slide_error(error) from error

    @classmethod
    def open(cls, path: Path, *, mpp: float | None = None) -> Self:
        """Open a slide; ``mpp`` overrides what the file says.

        Raises:
            MissingScaleError: neither the file nor the caller knows the scale.
            SlideError: OpenSlide cannot read the file.
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
        self._handle.close()

    def read(self, box: Box, size_px: tuple[int, int]) -> Pixels:
        """The level-0 box (x, y, width, height), resampled to exactly ``size_px``.

        The box may lie between pixels; the coarsest level that is fine enough is read. After an
        error the slide can be read on elsewhere.

        Raises:
            SlideError: these pixels cannot be decoded.
        """
        x, y, width, height = box
        level = self._level_for(min(width / size_px[0], height / size_px[1]))
        downsample = self._handle.level_downsamples[level]
        # Starting on a whole level pixel keeps OpenSlide from interpolating a second time.
        level_x, level_y = int(x / downsample), int(y / downsample)
        corner = (int(level_x * downsample), int(level_y * downsample))
        left, top = (x - corner[0]) / downsample, (y - corner[1]) / downsample
        right, bottom = left + width / downsample, top + height / downsample
        level_width, level_height = self._handle.level_dimensions[level]
        extent = (
            max(1, min(math.ceil(right - 1e-9), level_width - level_x)),
            max(1, min(math.ceil(bottom - 1e-9), level_height - level_y)),
        )
        try:
            region = self._handle.read_region(corner, level, extent)
        except openslide.OpenSlideError as error:
            # OpenSlide refuses a handle for good after one bad tile; the rest may be fine.
            self._handle.close()
            self._handle = _open_handle(self._path)
            raise _as_slide_error(error) from error
        crop = (left, top, min(right, extent[0]), min(bottom, extent[1]))
        resized = self._opaque(region).resize(size_px, Image.Resampling.HAMMING, box=crop)
        return np.asarray(resized)

    def thumbnail(self, *, max_px: int, min_mpp: float) -> Pixels:
        """The whole slide, at most ``max_px`` a side and not finer than ``min_mpp``.

        Read in pieces, so that a slide without coarse levels does not fill the memory.
        """
        width, height = self.size_px
        scale = max(width / max_px, height / max_px, min_mpp / self.mpp_x, 1.0)
        columns, rows = max(1, round(width / scale)), max(1, round(height / scale))
        step_x, step_y = width / columns, height / rows
        downsample = self._handle.level_downsamples[self._level_for(min(step_x, step_y))]
        piece = max(1, int(MAX_READ_PX * downsample / max(step_x, step_y)))
        thumbnail = np.empty((rows, columns, 3), dtype=np.uint8)
        for top in range(0, rows, piece):
            for left in range(0, columns, piece):
                size = (min(piece, columns - left), min(piece, rows - top))
                box = (left * step_x, top * step_y, size[0] * step_x, size[1] * step_y)
                thumbnail[top : top + size[1], left : left + size[0]] = self.read(box, size)
        return thumbnail

    def _level_for(self, wanted: float) -> int:
        """The coarsest level whose downsample is at most what is wanted."""
        downsamples = self._handle.level_downsamples
        fine = [level for level, d in enumerate(downsamples) if d <= wanted * MAX_UPSAMPLING]
        return max(fine, default=0)

    def _opaque(self, region: Image.Image) -> Image.Image:
        """RGB over the slide's own background: scanners leave areas out."""
        if region.getchannel("A").getextrema() == (255, 255):
            return region.convert("RGB")
        backdrop = Image.new("RGB", region.size, self._background)
        backdrop.paste(region, mask=region.getchannel("A"))
        return backdrop


def _open_handle(path: Path) -> openslide.OpenSlide:
    try:
        handle = openslide.OpenSlide(path)
        handle.set_cache(openslide.OpenSlideCache(CACHE_BYTES))
    except (openslide.OpenSlideError, OSError) as error:
        raise _as_slide_error(error) from error
    return handle


def _read_mpp(handle: openslide.OpenSlide) -> tuple[float, float]:
    """Microns per level-0 pixel along x and y, as the file has them."""
    try:
        mpp_x = float(handle.properties[openslide.PROPERTY_NAME_MPP_X])
        mpp_y = float(handle.properties[openslide.PROPERTY_NAME_MPP_Y])
    except (KeyError, ValueError) as error:
        raise MissingScaleError(
            "the file has no microns per pixel; give them in column mpp"
        ) from error
    plausible = all(math.isfinite(mpp) and MIN_MPP <= mpp <= MAX_MPP for mpp in (mpp_x, mpp_y))
    if not plausible or abs(mpp_x / mpp_y - 1) > MAX_ANISOTROPY:
        raise MissingScaleError(
            f"the file's {mpp_x:g} x {mpp_y:g} microns per pixel cannot be right; "
            "give the true value in column mpp"
        )
    return mpp_x, mpp_y


def _as_slide_error(error: Exception) -> SlideError:
    """Ours as it is; a library's as one sentence without the path it may hold."""
    if isinstance(error, SlideError):
        return error
    if isinstance(error, openslide.OpenSlideUnsupportedFormatError):
        return SlideError("not a slide that OpenSlide can read, or its header is damaged")
    return SlideError("damaged: its pixels cannot be decoded")
