"""Plain images: a photograph through a microscope, or a region that somebody cut out."""

from pathlib import Path

import numpy as np
from PIL import Image

from crafts_client.ingest.errors import SlideError
from crafts_client.ingest.readers.scanners import UNKNOWN
from crafts_client.ingest.readers.seam import (
    DAMAGED,
    WHITE,
    Level,
    Pixels,
    ReaderName,
    Size,
    foreign,
    pyramid,
)

FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "WEBP")
MAX_IMAGE_PX = 100_000_000
"""A plain image is decoded whole: 300 MB at most."""
MODES_OF_8_BITS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
_REFUSED = (
    "damaged, or neither a slide that OpenSlide, tiffslide or wsidicom can read nor an image "
    f"({', '.join(FORMATS)})"
)


class ImageFile:
    """One picture without a scale, decoded at the first look at it."""

    name: ReaderName = "image"
    mpp: tuple[float, float] | None = None
    scanner: str = UNKNOWN
    has_plain_tiles: bool = False

    def __init__(self, path: Path) -> None:
        self._path = path
        self._pixels: Image.Image | None = None
        with foreign(_REFUSED), Image.open(path, formats=FORMATS) as image:
            size, mode = image.size, image.mode
        self.levels: tuple[Level, ...] = pyramid([size])
        if size[0] * size[1] > MAX_IMAGE_PX:
            raise SlideError(f"{size[0]} x {size[1]} pixels are too many for a plain image")
        if mode not in MODES_OF_8_BITS:
            raise SlideError(f"{mode} pixels; expected 8 bits of red, green and blue")
        self._is_damaged = False

    @staticmethod
    def reads(path: Path) -> bool:
        try:
            with foreign(_REFUSED), Image.open(path, formats=FORMATS):
                return True
        except SlideError:
            return False

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
            with foreign(), Image.open(self._path, formats=FORMATS) as image:
                if image.size != self.levels[0][:2]:
                    raise SlideError("it changed while it was read")
                self._pixels = _opaque(image)
            self._is_damaged = False
        return self._pixels


def _opaque(image: Image.Image) -> Image.Image:
    """RGB, with transparency over white."""
    if "A" not in image.getbands() and "transparency" not in image.info:
        return image.convert("RGB")
    layered = image.convert("RGBA")
    backdrop = Image.new("RGB", layered.size, WHITE)
    backdrop.paste(layered, mask=layered.getchannel("A"))
    return backdrop
