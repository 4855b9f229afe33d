"""TIFF slides that OpenSlide does not know and tiffslide reads, which is slower.

tiffslide decodes through tifffile and zarr. An image decoder there allocates what the compressed
data claims, not what the TIFF header says, so each piece is looked at before it is decoded.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from crafts_client.ingest.errors import SlideError
from crafts_client.ingest.readers import jpeg_stream
from crafts_client.ingest.readers.scales import number, tiff_scales
from crafts_client.ingest.readers.scanners import known_scanner
from crafts_client.ingest.readers.seam import (
    DAMAGED,
    MAX_CHUNK_PX,
    WHITE,
    Pixels,
    ReaderName,
    Scale,
    Size,
    foreign,
    pyramid,
)
from crafts_client.ingest.readers.tiff_header import TiffPage, read_tiff_header

_REFUSED = "not a TIFF slide that can be read, or its header is damaged"
_BOUNDED_CODECS = (1, 5, 8, 32773, 32946, 50013)
"""None, LZW, deflate, packbits: tifffile gives them as much room as the tile needs."""
_JPEG, _JPEG_2000 = (7,), (33003, 33004, 33005, 34712)
_HEAD_BYTES = 2**16
"""The size of a compressed picture stands in its first bytes."""


class _Piece(NamedTuple):
    """One tile or strip of a level, and where it lies there."""

    number: int
    box: tuple[int, int, int, int]


class TiffSlideFile:
    """A pyramid or tiled TIFF of 8-bit colour."""

    name: ReaderName = "tiffslide"

    def __init__(self, path: Path, pages: Sequence[TiffPage]) -> None:
        with foreign(_REFUSED), ExitStack() as opened:
            import tiffslide

            # A path would be parsed as an address, which a name with :: in it is not.
            self._file = opened.enter_context(path.open("rb"))
            self._slide: Any = tiffslide.TiffSlide(self._file)
            opened.callback(self._slide.close)
            levels = _main_series(self._slide).levels
            _check_own_pages(self._slide.ts_tifffile, levels)
            self._pages: list[Any] = [_page(level) for level in levels]
            self.levels = pyramid([(page.imagewidth, page.imagelength) for page in self._pages])
            if self._slide.level_dimensions != tuple(level[:2] for level in self.levels):
                raise SlideError(_REFUSED)
            properties = self._slide.properties
            is_vendors = properties.get("tiffslide.vendor") not in (None, "generic-tiff")
            self.scales = _scale(properties) if is_vendors else tiff_scales(pages)
            self.objective_power = number(properties.get("tiffslide.objective-power"))
            self.scanner = known_scanner(
                self._slide.properties.get("tiffslide.vendor"),
                *(_text(self._pages[0], tag) for tag in ("Make", "Model")),
            )
            self.has_plain_tiles = _main_series(self._slide).kind != "bif"
            self._checked: set[tuple[int, int]] = set()
            self._opened = opened.pop_all()

    @staticmethod
    def reads(path: Path) -> bool:
        """Whether a TIFF is a slide rather than a plain image: tiled, or with levels."""
        try:
            read_tiff_header(path)
            with foreign(_REFUSED):
                import tifffile

                with tifffile.TiffFile(path) as file:
                    levels = file.series[0].levels
                    return bool(levels[0].keyframe.is_tiled) or len(levels) > 1
        except SlideError:
            return False

    def start(self, level: int, corner: Size) -> tuple[float, float]:
        downsample = self.levels[level].downsample
        return corner[0] * downsample, corner[1] * downsample

    def read(self, level: int, corner: Size, extent: Size) -> Pixels:
        with foreign():
            (left, top), (width, height) = corner, extent
            pieces = _pieces(self._pages[level], (left, top, left + width, top + height))
            absent = [piece for piece in pieces if self._is_absent(level, piece)]
            region = self._slide.zarr_group[str(level)][top : top + height, left : left + width]
            if region.shape[:2] != (height, width):
                raise SlideError(DAMAGED)
            pixels = np.array(region)
            for piece in absent:
                x0, y0, x1, y1 = piece.box
                pixels[max(y0 - top, 0) : y1 - top, max(x0 - left, 0) : x1 - left] = WHITE
            return pixels

    def close(self) -> None:
        with foreign():
            self._opened.close()

    def _is_absent(self, level: int, piece: _Piece) -> bool:
        """Whether the scanner left this piece out; a piece of the wrong size is refused."""
        page = self._pages[level]
        offset, num_bytes = page.dataoffsets[piece.number], page.databytecounts[piece.number]
        if num_bytes == 0:
            return True
        if (level, piece.number) not in self._checked:
            self._file.seek(offset)
            _check_piece(page, self._file.read(min(num_bytes, _HEAD_BYTES)))
            self._checked.add((level, piece.number))
        return False


def _check_own_pages(file: Any, levels: Sequence[Any]) -> None:
    """OME-XML may name other files, which may be another patient's slide under its own name."""
    if any(page is None or page.parent is not file for level in levels for page in level.pages):
        raise SlideError("its OME-XML says that pixels of it lie in other files; list those")


def _main_series(slide: Any) -> Any:
    return slide.ts_tifffile.series[slide.properties["tiffslide.series-index"]]


def _page(level: Any) -> Any:
    """The page of a level, when it is one page of 8-bit colour in pieces of a sane size."""
    page = level.keyframe
    if len(level.pages) != 1 or level.axes != "YXS" or str(page.dtype) != "uint8":
        raise SlideError("not a picture of 8 bits of red, green and blue")
    is_coded = page.photometric == 6 and page.compression in _JPEG  # only JPEG is turned into RGB
    if not (page.photometric == 2 or is_coded) or page.samplesperpixel != 3:
        raise SlideError("not a picture of 8 bits of red, green and blue")
    if page.compression not in (*_BOUNDED_CODECS, *_JPEG, *_JPEG_2000):
        raise SlideError(f"its compression, TIFF number {int(page.compression)}, is not read here")
    if not 0 < page.chunks[0] * page.chunks[1] <= MAX_CHUNK_PX:
        raise SlideError(_REFUSED)
    return page


def _pieces(page: Any, box: tuple[int, int, int, int]) -> list[_Piece]:
    """The tiles or strips that a box of the level touches."""
    height, width = page.chunks[:2]
    left, top, right, bottom = box
    columns = -(-page.imagewidth // width)
    return [
        _Piece(row * columns + column, (column * width, row * height,
                                        (column + 1) * width, (row + 1) * height))
        for row in range(top // height, -(-bottom // height))
        for column in range(left // width, -(-right // width))
    ]  # fmt: skip


def _check_piece(page: Any, head: bytes) -> None:
    """Refuse a compressed picture that is larger than its tile."""
    if page.compression in _JPEG:
        width, height = _jpeg_size(head)
    elif page.compression in _JPEG_2000:
        width, height = _jpeg_2000_size(head)
    else:
        return
    if width > page.chunks[1] or height > page.chunks[0]:
        raise SlideError(DAMAGED)


def _jpeg_size(head: bytes) -> Size:
    for segment in jpeg_stream.segments(head):
        if 0xC0 <= segment.marker <= 0xCF and segment.marker not in (0xC4, 0xC8, 0xCC):
            return jpeg_stream.frame(segment.payload)[:2]
    raise SlideError(DAMAGED)


def _jpeg_2000_size(head: bytes) -> Size:
    """Width and height in the SIZ segment, which begins every codestream."""
    place = head.find(b"\xff\x4f\xff\x51")
    if place < 0 or len(head) < place + 24:
        raise SlideError(DAMAGED)
    x1, y1, x0, y0 = (
        int.from_bytes(head[place + 8 + 4 * word : place + 12 + 4 * word], "big")
        for word in range(4)
    )
    return x1 - x0, y1 - y0


def _scale(properties: Any) -> tuple[Scale, ...]:
    mpp_x, mpp_y = (number(properties.get(f"tiffslide.mpp-{axis}")) for axis in "xy")
    return () if mpp_x is None or mpp_y is None else (Scale("the file", mpp_x, mpp_y),)


def _text(page: Any, tag: str) -> str:
    found = page.tags.get(tag)
    return str(found.value) if found is not None else ""
