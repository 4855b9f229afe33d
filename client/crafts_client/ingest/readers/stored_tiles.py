"""The JPEG tiles of a TIFF slide as they are stored: where they lie, and their pixels.

OpenSlide takes four times as long to decode them as libjpeg-turbo called for one tile does; the
pixels are the same to the bit. Only what is beyond doubt is read here. For everything else (a tile
that the scanner left out, that is damaged, of another size) the answer is None, and the caller
asks the library that knows the format.

Only the picture comes along. Of a tile's stream what is passed on are the tables, the frame header
and the scans; comments and application segments, where names may stand, are left behind, and one
marker that says how colour is stored is put in.
"""

import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
import numpy.typing as npt
import simplejpeg

from crafts_client.ingest.errors import SlideError
from crafts_client.ingest.readers import jpeg_stream
from crafts_client.ingest.readers.jpeg_stream import JpegError, Segment
from crafts_client.ingest.readers.seam import Level, Pixels, Size, foreign
from crafts_client.ingest.readers.tiff_header import read_tiff_header

CACHE_BYTES = 32 * 2**20
MAX_TILE_PX = 2**20
"""Tiles of more pixels are left to the library: here a tile is decoded whole."""
_JPEG = 7
_RGB, _YCBCR = 2, 6
_COMPONENTS = 3
_MAX_BYTES_PER_PX = 6
_MAX_HEADER_BYTES = 2**16
_MAX_PAGES = 64
_KEPT = (jpeg_stream.DQT, jpeg_stream.DHT, jpeg_stream.DRI, jpeg_stream.SOS)
_DROPPED = (jpeg_stream.COM, *range(jpeg_stream.APP0, jpeg_stream.APP15 + 1))
_START, _END = b"\xff\xd8", b"\xff\xd9"


class StoredLevel:
    """The tiles of one level in an open file. Columns and rows count those the edge cuts off."""

    def __init__(self, file: BinaryIO, file_bytes: int, page: Any) -> None:
        """Take from a page of ``tifffile`` what is needed.

        Raises:
            SlideError: it is not made of JPEG tiles of 8-bit colour, in order.
            JpegError: its shared tables are damaged.
        """
        if not _is_plain(page):
            raise SlideError("its tiles are not plain JPEG")
        self.tile_px: Size = (page.tilewidth, page.tilelength)
        self.columns = -(-page.imagewidth // page.tilewidth)
        self.rows = -(-page.imagelength // page.tilelength)
        # Arrays: a large slide has hundreds of thousands, and Python's numbers take four times
        # the memory.
        self._offsets: npt.NDArray[np.uint64] = np.array(page.dataoffsets, dtype=np.uint64)
        self._num_bytes: npt.NDArray[np.uint64] = np.array(page.databytecounts, dtype=np.uint64)
        if not len(self._offsets) == len(self._num_bytes) == self.columns * self.rows:
            raise SlideError("its tiles are not all listed")
        tables = b"".join(map(_written, _tables(page)))
        self._head = _START + _adobe(is_rgb=page.photometric == _RGB) + tables
        self._max_bytes = _MAX_BYTES_PER_PX * page.tilewidth * page.tilelength + _MAX_HEADER_BYTES
        self._file, self._file_bytes = file, file_bytes

    def jpeg(self, column: int, row: int) -> bytes | None:
        """A tile as a JPEG file of its own, exactly of the tile's size; None in doubt."""
        if not (0 <= column < self.columns and 0 <= row < self.rows):
            return None
        number = row * self.columns + column
        offset, num_bytes = int(self._offsets[number]), int(self._num_bytes[number])
        if not 0 < num_bytes <= self._max_bytes or not 0 < offset <= self._file_bytes - num_bytes:
            return None
        try:
            return self._standalone(os.pread(self._file.fileno(), num_bytes, offset))
        except (OSError, JpegError):
            return None

    def _standalone(self, data: bytes) -> bytes | None:
        """The tile's own stream with the shared tables, without anything that is not picture."""
        parts = [self._head]
        num_frames = num_scans = 0
        for segment in jpeg_stream.segments(data):
            if segment.marker in jpeg_stream.FRAMES:
                if jpeg_stream.frame(segment.payload) != (*self.tile_px, 8, _COMPONENTS):
                    return None
                num_frames += 1
            elif segment.marker in _DROPPED:
                continue
            elif segment.marker not in _KEPT:
                return None
            num_scans += segment.marker == jpeg_stream.SOS
            parts.append(_written(segment))
        # A progressive one may have thousands, each a pass over the tile: how long a stored tile
        # takes to decode must not tell whose it is.
        is_one = num_frames == 1 and 1 <= num_scans <= _COMPONENTS
        return b"".join([*parts, _END]) if is_one else None


class StoredTiles:
    """Pixels of the levels of one file, and a cache of tiles that were taken in part."""

    def __init__(self, file: BinaryIO, levels: tuple[StoredLevel | None, ...]) -> None:
        self._file = file
        self.levels = levels
        """None for a level that is not made of plain JPEG tiles."""
        self._cache: OrderedDict[tuple[int, int, int], Pixels] = OrderedDict()
        self._cache_bytes = 0

    @classmethod
    def open(cls, path: Path, levels: Sequence[Level]) -> Self:
        """Find the tiles of these levels; a file that is not what it should be has none."""
        file = path.open("rb")
        try:
            return cls(file, _find(path, file, levels))
        except SlideError:
            return cls(file, (None,) * len(levels))

    def read(self, number: int, corner: Size, extent: Size) -> Pixels | None:
        """RGB pixels of a region that lies on a level, shape (height, width, 3); None in doubt.

        They may be shared with the cache: not to be written to.
        """
        level = self.levels[number]
        if level is None:
            return None
        (left, top), (tile_width, tile_height) = corner, level.tile_px
        right, bottom = left + extent[0], top + extent[1]
        if left % tile_width == 0 and top % tile_height == 0 and extent == level.tile_px:
            return _decoded(level, left // tile_width, top // tile_height)
        region = np.empty((extent[1], extent[0], 3), dtype=np.uint8)
        for row in range(top // tile_height, -(-bottom // tile_height)):
            y = row * tile_height
            y0, y1 = max(top, y), min(bottom, y + tile_height)
            for column in range(left // tile_width, -(-right // tile_width)):
                x = column * tile_width
                x0, x1 = max(left, x), min(right, x + tile_width)
                if (x1 - x0, y1 - y0) == level.tile_px:  # no neighbour will want it
                    tile = _decoded(level, column, row)
                else:
                    tile = self._cached(number, level, column, row)
                if tile is None:
                    return None
                region[y0 - top : y1 - top, x0 - left : x1 - left] = tile[
                    y0 - y : y1 - y, x0 - x : x1 - x
                ]
        return region

    def close(self) -> None:
        """Let go of the file and of the cache."""
        self._file.close()
        self._cache.clear()

    def _cached(self, number: int, level: StoredLevel, column: int, row: int) -> Pixels | None:
        key = (number, column, row)
        tile = self._cache.get(key)
        if tile is not None:
            self._cache.move_to_end(key)
            return tile
        tile = _decoded(level, column, row)
        if tile is not None:
            self._cache[key] = tile
            self._cache_bytes += tile.nbytes
            while self._cache_bytes > CACHE_BYTES:
                self._cache_bytes -= self._cache.popitem(last=False)[1].nbytes
        return tile


def _decoded(level: StoredLevel, column: int, row: int) -> Pixels | None:
    jpeg = level.jpeg(column, row)
    if jpeg is None:
        return None
    try:
        tile: Pixels = simplejpeg.decode_jpeg(jpeg)
    except ValueError:  # damaged; also where libjpeg would go on with a warning
        return None
    return tile


def _find(path: Path, file: BinaryIO, levels: Sequence[Level]) -> tuple[StoredLevel | None, ...]:
    """The one page of each level's size, if it is plain."""
    read_tiff_header(path)
    with foreign():
        import tifffile

        file_bytes = os.fstat(file.fileno()).st_size
        with tifffile.TiffFile(path) as tiff:
            pages = list(tiff.pages[:_MAX_PAGES])
            return tuple(_stored_level(file, file_bytes, pages, level) for level in levels)


def _stored_level(
    file: BinaryIO, file_bytes: int, pages: Sequence[Any], level: Level
) -> StoredLevel | None:
    fitting = [page for page in pages if (page.imagewidth, page.imagelength) == level[:2]]
    if len(fitting) != 1:
        return None
    try:
        return StoredLevel(file, file_bytes, fitting[0])
    except (SlideError, JpegError):
        return None


def _is_plain(page: Any) -> bool:
    return bool(
        page.is_tiled
        and 0 < page.tilewidth * page.tilelength <= MAX_TILE_PX
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


def _written(segment: Segment) -> bytes:
    length = (len(segment.payload) + 2).to_bytes(2, "big")
    return bytes((0xFF, segment.marker)) + length + segment.payload + segment.scan


def _adobe(*, is_rgb: bool) -> bytes:
    """The marker that tells a decoder how colour is stored. TIFF says it in a tag of its own."""
    payload = b"Adobe\0\x64\0\0\0\0" + bytes([0 if is_rgb else 1])
    return _written(Segment(jpeg_stream.APP14, payload))
