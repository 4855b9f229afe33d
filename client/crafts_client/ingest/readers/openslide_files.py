"""Slides that OpenSlide reads: the first choice for everything but DICOM."""

import ctypes
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import openslide
from openslide import lowlevel
from PIL import Image, ImageColor

from crafts_client.ingest.errors import SlideError
from crafts_client.ingest.readers.scales import number, objective_power, tiff_scales
from crafts_client.ingest.readers.scanners import known_scanner
from crafts_client.ingest.readers.seam import (
    DAMAGED,
    Level,
    Pixels,
    ReaderName,
    Scale,
    Size,
    foreign,
    pyramid,
)
from crafts_client.ingest.readers.stored_tiles import StoredTiles
from crafts_client.ingest.readers.tiff_header import TiffPage

CACHE_BYTES = 32 * 2**20
_OPAQUE = 0xFF000000
_SCANNER_FIELDS = (
    "openslide.vendor",
    "tiff.Make",
    "tiff.Model",
    "aperio.ScannerType",
    "leica.device-model",
    "philips.DICOM_MANUFACTURERS_MODEL_NAME",
    "ventana.ScannerModel",
)
_NO_VENDOR = "generic-tiff"
PLAIN_TIFF_VENDORS = ("aperio", _NO_VENDOR)
"""Others store tiles that overlap, in an order of their own, or in parts."""


class OpenSlideFile:
    """One open handle of OpenSlide, replaced when a damaged place has spoilt it.

    Where the file is a TIFF of plain JPEG tiles they are decoded here, without OpenSlide.
    """

    name: ReaderName = "openslide"

    def __init__(self, path: Path, pages: Sequence[TiffPage] = ()) -> None:
        """Open; ``pages`` are those of a TIFF, as ``read_tiff_header`` gives them."""
        self._path = path
        self._stored_tiles: StoredTiles | None = None
        self._handle = _open_handle(path)
        try:
            with foreign():
                sizes, downsamples = self._handle.level_dimensions, self._handle.level_downsamples
                properties = self._handle.properties
                background = properties.get("openslide.background-color", "FFFFFF")
                self._background = ImageColor.getrgb(f"#{background}")[:3]
                self.scanner = known_scanner(*(properties.get(key) for key in _SCANNER_FIELDS))
                vendor = properties.get("openslide.vendor")
                self.has_plain_tiles = vendor in PLAIN_TIFF_VENDORS
                self.scales = _scale(properties) if vendor != _NO_VENDOR else tiff_scales(pages)
                self.objective_power = number(
                    properties.get("openslide.objective-power")
                ) or objective_power(pages)
            self.levels: tuple[Level, ...] = pyramid(sizes, downsamples)
        except SlideError:
            self._handle.close()
            raise

    @staticmethod
    def vendor(path: Path) -> str | None:
        """Whose format a file has; None if OpenSlide does not read it."""
        with foreign():
            found: str | None = openslide.OpenSlide.detect_format(path)
            return found

    def start(self, level: int, corner: Size) -> tuple[float, float]:
        downsample = self.levels[level].downsample
        x, y = corner[0] * downsample, corner[1] * downsample
        tiles = self._tiles()
        if tiles is not None and tiles.levels[level] is not None:
            return x, y
        # OpenSlide takes whole level-0 pixels. Starting on a whole pixel of the level, as nearly
        # as that allows, keeps it from interpolating a second time.
        return float(int(x)), float(int(y))

    def read(self, level: int, corner: Size, extent: Size) -> Pixels:
        tiles = self._tiles()
        pixels = tiles.read(level, corner, extent) if tiles is not None else None
        return pixels if pixels is not None else self._read_region(level, corner, extent)

    def _tiles(self) -> StoredTiles | None:
        """Looked for at the first read: who only wants the header needs none."""
        if self._stored_tiles is None and self.has_plain_tiles:
            self._stored_tiles = StoredTiles.open(self._path, self.levels)
        return self._stored_tiles

    def _read_region(self, level: int, corner: Size, extent: Size) -> Pixels:
        # The start of plain tiles can lie between level-0 pixels: where one of them is left to
        # OpenSlide, it is out of place by less than one of these.
        x, y = self.start(level, corner)
        width, height = extent
        argb_HW = np.empty((height, width), dtype=np.uint32)
        target = argb_HW.ctypes.data_as(ctypes.POINTER(ctypes.c_uint32))
        try:
            # The public read_region makes RGBA of what is here, which costs a tenth of the read.
            lowlevel._read_region(self._handle._osr, target, int(x), int(y), level, width, height)
        except openslide.OpenSlideError as error:
            # OpenSlide refuses a handle for good after one bad tile; the rest may be fine.
            self._handle.close()
            self._handle = _open_handle(self._path)
            raise SlideError(DAMAGED) from error
        if argb_HW.min() < _OPAQUE:
            argb_HW = _over(argb_HW, self._background)
        return np.asarray(Image.frombuffer("RGB", extent, argb_HW, "raw", "BGRX", 0, 1))

    def associated_images(self) -> tuple[str, ...]:
        """Names of the pictures beside the slide: label, macro, thumbnail."""
        with foreign():
            return tuple(self._handle.associated_images)

    def property_names(self) -> tuple[str, ...]:
        """Names of the file's fields; a name can be as private as a value."""
        with foreign():
            return tuple(name for name, value in self._handle.properties.items() if value.strip())

    def close(self) -> None:
        self._handle.close()
        if self._stored_tiles is not None:
            self._stored_tiles.close()


def _over(argb_HW: npt.NDArray[np.uint32], background: tuple[int, ...]) -> npt.NDArray[np.uint32]:
    """Premultiplied pixels over the slide's own background: scanners leave areas out."""
    bgra_HW4 = argb_HW.view(np.uint8).reshape(*argb_HW.shape, 4)
    clear_HW1 = 255 - bgra_HW4[..., 3:].astype(np.uint16)
    backdrop = np.array([*background[::-1], 255], dtype=np.uint16)
    shown_HW4 = bgra_HW4 + (clear_HW1 * backdrop + 127) // 255
    return shown_HW4.clip(max=255).astype(np.uint8).view(np.uint32)[..., 0]


def _open_handle(path: Path) -> openslide.OpenSlide:
    with foreign("not a slide that OpenSlide can read, or its header is damaged"):
        handle = openslide.OpenSlide(path)
        handle.set_cache(openslide.OpenSlideCache(CACHE_BYTES))
        return handle


def _scale(properties: "openslide._PropertyMap") -> tuple[Scale, ...]:
    mpp_x, mpp_y = (number(properties.get(f"openslide.mpp-{axis}")) for axis in "xy")
    return () if mpp_x is None or mpp_y is None else (Scale("the file", mpp_x, mpp_y),)
