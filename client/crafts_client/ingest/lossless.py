"""Tiles copied as they are stored: no pixel is decoded, so none is lost to a second JPEG.

Only the picture comes along. Of the source's JPEG stream a copy has the tables, the frame header
and the scans; comments and application segments, where names may stand, are left behind, and one
marker that says how colour is stored is put in.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from crafts_client.ingest.errors import SlideError
from crafts_client.ingest.readers import jpeg_stream
from crafts_client.ingest.readers.jpeg_stream import JpegError, Segment
from crafts_client.ingest.readers.seam import Level, foreign
from crafts_client.ingest.readers.tiff_header import check_tiff_header
from crafts_client.ingest.slides import Slide
from crafts_client.ingest.tiling import tile_extent

_JPEG = 7
_RGB, _YCBCR = 2, 6
_MAX_BYTES_PER_PX = 6
_MAX_HEADER_BYTES = 2**16
_MAX_PAGES = 64
_KEPT = (jpeg_stream.DQT, jpeg_stream.DHT, jpeg_stream.DRI, jpeg_stream.SOS)
_DROPPED = (jpeg_stream.COM, *range(jpeg_stream.APP0, jpeg_stream.APP15 + 1))


class TileCopier:
    """Copies the tiles of one level of one open slide, for as long as the slide is open."""

    def __init__(self, file: BinaryIO, page: "_Page", step: int) -> None:
        self._file = file
        self._page = page
        self._step = step
        self._file_bytes = file.seek(0, 2)

    def copy(self, x: int, y: int) -> bytes | None:
        """The tile with this level-0 corner as a JPEG file of its own.

        None where the grid of the file has no whole tile there, or where what is stored is not
        beyond doubt: the caller then reads the pixels.
        """
        column, column_rest = divmod(x, self._step)
        row, row_rest = divmod(y, self._step)
        page = self._page
        if column_rest or row_rest or not (0 <= column < page.columns and 0 <= row < page.rows):
            return None
        number = row * page.stride + column
        offset, num_bytes = page.offsets[number], page.num_bytes[number]
        most = _MAX_BYTES_PER_PX * page.tile_px**2 + _MAX_HEADER_BYTES
        if not (0 < num_bytes <= most and 0 < offset <= self._file_bytes - num_bytes):
            return None
        try:
            self._file.seek(offset)
            return _standalone(page, self._file.read(num_bytes))
        except (OSError, JpegError):
            return None


class _Page(NamedTuple):
    """Where the tiles of a level are."""

    tile_px: int
    columns: int
    """Whole tiles in a row; one cut off by the edge is not a tile."""
    rows: int
    stride: int
    offsets: tuple[int, ...]
    num_bytes: tuple[int, ...]
    tables: tuple[Segment, ...]
    is_rgb: bool


def tile_copier(path: Path, slide: Slide, tile_px: int, mpp: float) -> TileCopier | None:
    """A copier, if one level of the slide is stored as just the tiles that are wanted.

    Args:
        path: The file that ``slide`` was opened from.
        slide: The copier works until this is closed.
        tile_px: Side of a tile.
        mpp: Microns per pixel of a tile.
    """
    level = _level_at(slide, tile_px, mpp)
    if level is None or not slide.source.has_plain_tiles:
        return None
    try:
        check_tiff_header(path)
        with foreign():
            page = _find_page(path, level, tile_px)
            file = path.open("rb") if page is not None else None
    except SlideError:
        return None
    if page is None or file is None:
        return None
    slide.close_with(file.close)
    return TileCopier(file, page, round(level.downsample) * tile_px)


def _level_at(slide: Slide, tile_px: int, mpp: float) -> Level | None:
    """The level whose tiles are those of the grid, if level-0 pixels go into its pixels evenly."""
    extent = tile_extent(slide, tile_px, mpp)
    for level in slide.source.levels:
        is_whole = all(
            length % size == 0 and length // size == level.downsample
            for length, size in zip(slide.size_px, level[:2], strict=True)
        )
        if is_whole and extent == (tile_px * level.downsample, tile_px * level.downsample):
            return level
    return None


def _find_page(path: Path, level: Level, tile_px: int) -> _Page | None:
    """The one page of the level's size, if its tiles are JPEG of the wanted size."""
    import tifffile

    with tifffile.TiffFile(path) as file:
        pages: list[Any] = [
            page
            for page in file.pages[:_MAX_PAGES]
            if (page.imagewidth, page.imagelength) == (level.width, level.height)
        ]
        if len(pages) != 1 or not _is_copyable(pages[0], tile_px):
            return None
        page = pages[0]
        stride, rows = -(-level.width // tile_px), -(-level.height // tile_px)
        offsets, num_bytes = tuple(page.dataoffsets), tuple(page.databytecounts)
        if not len(offsets) == len(num_bytes) == stride * rows:
            return None
        return _Page(
            tile_px=tile_px,
            columns=level.width // tile_px,
            rows=level.height // tile_px,
            stride=stride,
            offsets=offsets,
            num_bytes=num_bytes,
            tables=tuple(_tables(page)),
            is_rgb=page.photometric == _RGB,
        )


def _is_copyable(page: Any, tile_px: int) -> bool:
    return bool(
        page.is_tiled
        and (page.tilewidth, page.tilelength) == (tile_px, tile_px)
        and page.compression == _JPEG
        and page.photometric in (_RGB, _YCBCR)
        and page.samplesperpixel == 3
        and page.planarconfig == 1
        and page.fillorder == 1
        and page.imagedepth == 1
    )


def _tables(page: Any) -> Iterator[Segment]:
    """The tables that the page's tiles share."""
    if page.jpegtables is not None:
        for segment in jpeg_stream.segments(bytes(page.jpegtables)):
            if segment.marker in (jpeg_stream.DQT, jpeg_stream.DHT):
                yield segment


def _standalone(page: _Page, data: bytes) -> bytes | None:
    """The tile's own stream with the shared tables, without anything that is not picture."""
    parts = [b"\xff\xd8", _adobe(is_rgb=page.is_rgb), *map(_written, page.tables)]
    num_frames = num_scans = 0
    for segment in jpeg_stream.segments(data):
        if segment.marker in jpeg_stream.FRAMES:
            frame = jpeg_stream.frame(segment.payload)
            if frame != (page.tile_px, page.tile_px, 8, 3):
                return None
            num_frames += 1
        elif segment.marker in _DROPPED:
            continue
        elif segment.marker not in _KEPT:
            return None
        num_scans += segment.marker == jpeg_stream.SOS
        parts.append(_written(segment))
    return b"".join([*parts, b"\xff\xd9"]) if num_frames == 1 and num_scans else None


def _written(segment: Segment) -> bytes:
    length = (len(segment.payload) + 2).to_bytes(2, "big")
    return bytes((0xFF, segment.marker)) + length + segment.payload + segment.scan


def _adobe(*, is_rgb: bool) -> bytes:
    """The marker that tells a decoder how colour is stored. TIFF says it in a tag of its own."""
    payload = b"Adobe\0\x64\0\0\0\0" + bytes([0 if is_rgb else 1])
    return _written(Segment(jpeg_stream.APP14, payload))
