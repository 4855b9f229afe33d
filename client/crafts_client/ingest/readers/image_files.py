"""Plain images: a photograph through a microscope, a region that somebody cut out, a ready tile."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from crafts_client.ingest.errors import SlideError
from crafts_client.ingest.readers.scales import tiff_scales
from crafts_client.ingest.readers.scanners import UNKNOWN
from crafts_client.ingest.readers.seam import (
    DAMAGED,
    Level,
    Pixels,
    ReaderName,
    Size,
    foreign,
    pyramid,
)
from crafts_client.ingest.readers.tiff_header import TiffPage, is_tiff, read_tiff_header
from crafts_client.ingest.readers.tiff_meaning import check_bits, check_picture, check_stored_colour
from crafts_core.picture_facts import bits_per_sample, opaque, opened, upright_size

FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "WEBP")
MAX_IMAGE_PX = 100_000_000
"""A plain image is decoded whole: 300 MB at most."""
MODES_OF_8_BITS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
_REFUSED = (
    "damaged, or neither a slide that OpenSlide, tiffslide or wsidicom can read nor an image "
    f"({', '.join(FORMATS)})"
)
_POINTER_BYTES = 1000
_POINTERS = (b"/annex/objects/", b"version https://git-lfs.github.com/")


@contextmanager
def opened_picture(path: Path) -> Iterator[Image.Image]:
    """An image file whose pixels Pillow gives as the file means them.

    Raises:
        SlideError: it is none, or not of 8-bit colour. Damage that shows later is Pillow's own.
    """
    if is_tiff(path):
        pages = read_tiff_header(path)
        check_picture(pages)
        check_bits(pages[0])
        check_stored_colour(path, pages[0])
    with opened(path, FORMATS) as image:
        if image.mode not in MODES_OF_8_BITS:  # Pillow would make it all white
            raise SlideError(f"{image.mode} pixels; expected 8 bits of red, green and blue")
        if bits_per_sample(image) > 8:  # Pillow would take the upper eight
            raise SlideError(
                f"{bits_per_sample(image)} bits a sample; expected 8 bits of red, green and blue: "
                "write them so, from the range that the camera filled"
            )
        yield image


class ImageFile:
    """One picture, decoded at the first look at it. Only TIFF can say how large its pixels are."""

    name: ReaderName = "image"
    objective_power: float | None = None
    scanner: str = UNKNOWN
    has_plain_tiles: bool = False

    def __init__(self, path: Path, pages: Sequence[TiffPage] = ()) -> None:
        self._path = path
        self._pixels: Image.Image | None = None
        self.scales = tiff_scales(pages)
        with foreign(_refused(path)), opened_picture(path) as image:
            size = upright_size(image)
        self.levels: tuple[Level, ...] = pyramid([size])
        if size[0] * size[1] > MAX_IMAGE_PX:
            raise SlideError(f"{size[0]} x {size[1]} pixels are too many for a plain image")
        self._is_damaged = False

    def start(self, level: int, corner: Size) -> tuple[float, float]:  # noqa: ARG002
        return float(corner[0]), float(corner[1])

    def read(self, level: int, corner: Size, extent: Size) -> Pixels:  # noqa: ARG002
        left, top = corner
        return np.asarray(self._decoded().crop((left, top, left + extent[0], top + extent[1])))

    def close(self) -> None:
        self._pixels = None

    def _decoded(self) -> Image.Image:
        if self._is_damaged:  # or every tile would decode it again, in vain
            raise SlideError(DAMAGED)
        if self._pixels is None:
            self._is_damaged = True
            with foreign(), opened_picture(self._path) as image:
                shown = opaque(image)
            if shown.size != self.levels[0][:2]:
                raise SlideError("its size changed, or its last bytes say that it is turned")
            self._pixels = shown
            self._is_damaged = False
        return self._pixels


def _refused(path: Path) -> str:
    """Why nothing can open a file, in words that say what to do where that is known."""
    with path.open("rb") as file:
        head = file.read(_POINTER_BYTES)
    if any(mark in head for mark in _POINTERS):
        return "a pointer to the file, not the file; fetch it: git annex get, or git lfs pull"
    if len(head) < _POINTER_BYTES and _is_path_beside(path, head):
        return "a link that was copied as text; make it a link again, or copy what it leads to"
    return _REFUSED


def _is_path_beside(path: Path, text: bytes) -> bool:
    try:
        return b"/" in text and (path.parent / text.decode()).is_file()
    except (OSError, ValueError):
        return False
