"""The skeleton of a TIFF file, walked before a library is let loose on it.

Libraries follow a chain of directories for as long as it goes, and allocate what a tag claims to
hold and what a tile claims to measure; OpenSlide ends the process where there is no such room.
Here all of them are bounded.
"""

import struct
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from crafts_client.ingest.errors import SlideError
from crafts_client.ingest.readers.seam import MAX_CHUNK_PX

MAX_DIRECTORIES = 4096
MAX_TAGS = 4096
MAX_TILES = 2**24
CLASSIC_BYTES = 2**32
"""Classic TIFF ends here. Hamamatsu's goes on in a way of its own, which is not walked."""
MAX_TILE_BYTES = 2**28
_WIDTH, _LENGTH, _TILE_WIDTH, _TILE_LENGTH, _TILE_BYTE_COUNTS = 256, 257, 322, 323, 325
_TYPE_BYTES = {
    1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4,
    16: 8, 17: 8, 18: 8,
}  # fmt: skip
_WHOLE_NUMBERS = {3: "u2", 4: "u4", 16: "u8"}
_DAMAGED = "its TIFF header is damaged"


class _Layout(NamedTuple):
    """Struct formats of classic TIFF or BigTIFF, in the file's byte order."""

    num_tags: struct.Struct
    tag: struct.Struct
    offset: struct.Struct


def is_tiff(path: Path) -> bool:
    """Whether a file begins as classic TIFF or BigTIFF does."""
    try:
        with path.open("rb") as file:
            return file.read(4) in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
    except OSError:
        return False


def is_beyond_classic(path: Path) -> bool:
    """Whether a file of classic TIFF is larger than its offsets reach, as Hamamatsu's can be."""
    with path.open("rb") as file:
        return file.read(4) in (b"II*\0", b"MM\0*") and file.seek(0, 2) >= CLASSIC_BYTES


def check_tiff_header(path: Path) -> None:
    """Walk every directory once.

    Raises:
        SlideError: not TIFF, directories that go in a circle, out of the file or on and on, a tag
            that claims more than the file holds, or tiles that are too large or too many.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            layout, offset = _layout(file)
            seen: set[int] = set()
            while offset:
                if offset in seen or len(seen) >= MAX_DIRECTORIES:
                    raise SlideError(_DAMAGED + ": its directories go in a circle")
                seen.add(offset)
                offset = _check_directory(file, offset, layout, size)
            if not seen:
                raise SlideError(_DAMAGED)
    except (OSError, struct.error, OverflowError) as error:
        raise SlideError(_DAMAGED) from error


def _layout(file: BinaryIO) -> tuple[_Layout, int]:
    """How the file is laid out, and where its first directory is."""
    file.seek(0)
    head = file.read(16)
    order = {b"II": "<", b"MM": ">"}.get(head[:2])
    if order is None:
        raise SlideError("not a TIFF file")
    (version,) = struct.unpack_from(f"{order}H", head, 2)
    if version == 42:
        layout = _Layout(*(struct.Struct(order + code) for code in ("H", "HHI4x", "I")))
        return layout, layout.offset.unpack_from(head, 4)[0]
    if version == 43:
        layout = _Layout(*(struct.Struct(order + code) for code in ("Q", "HHQ8x", "Q")))
        return layout, layout.offset.unpack_from(head, 8)[0]
    raise SlideError("not a TIFF file")


def _check_directory(file: BinaryIO, offset: int, layout: _Layout, size: int) -> int:
    """Check the tags of one directory and return where the next one is."""
    if offset >= size:
        raise SlideError(_DAMAGED)
    file.seek(offset)
    (num_tags,) = layout.num_tags.unpack(file.read(layout.num_tags.size))
    if num_tags > MAX_TAGS:
        raise SlideError(_DAMAGED)
    tags = file.read(num_tags * layout.tag.size)
    (following,) = layout.offset.unpack(file.read(layout.offset.size))
    numbers: dict[int, npt.NDArray[np.uint64]] = {}
    for place in range(0, num_tags * layout.tag.size, layout.tag.size):
        code, kind, count = layout.tag.unpack_from(tags, place)
        num_bytes = count * _TYPE_BYTES.get(kind, 1)
        start = offset + layout.num_tags.size + place + layout.tag.size - layout.offset.size
        if num_bytes > layout.offset.size:
            (start,) = layout.offset.unpack_from(tags, place + layout.tag.size - layout.offset.size)
            if start + num_bytes > size:
                raise SlideError(_DAMAGED + ": a tag claims more than the file holds")
        if code in (_WIDTH, _LENGTH, _TILE_WIDTH, _TILE_LENGTH, _TILE_BYTE_COUNTS):
            if code in numbers or kind not in _WHOLE_NUMBERS or count == 0:
                raise SlideError(_DAMAGED)  # libraries may each read it in another way
            file.seek(start)
            order = layout.offset.format[:1]
            values = np.frombuffer(file.read(num_bytes), f"{order}{_WHOLE_NUMBERS[kind]}")
            numbers[code] = values.astype(np.uint64)
    _check_tiles(numbers)
    return int(following)


def _check_tiles(numbers: dict[int, npt.NDArray[np.uint64]]) -> None:
    """Tiles of a sane size, and not more of them than a slide can have."""
    if _TILE_WIDTH not in numbers or _TILE_LENGTH not in numbers:
        return
    largest = {code: int(values.max()) for code, values in numbers.items()}
    if any(len(values) > 1 for code, values in numbers.items() if code != _TILE_BYTE_COUNTS):
        raise SlideError(_DAMAGED)
    width, length = largest[_TILE_WIDTH], largest[_TILE_LENGTH]
    if not 0 < width * length <= MAX_CHUNK_PX:
        raise SlideError(_DAMAGED + f": tiles of {width} x {length} pixels cannot be right")
    num_tiles = -(-largest.get(_WIDTH, 0) // width) * -(-largest.get(_LENGTH, 0) // length)
    if num_tiles > MAX_TILES or largest.get(_TILE_BYTE_COUNTS, 0) > MAX_TILE_BYTES:
        raise SlideError(_DAMAGED + ": so many or so large tiles cannot be right")
