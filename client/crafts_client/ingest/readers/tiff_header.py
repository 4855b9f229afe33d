"""The skeleton of a TIFF file, walked before a library is let loose on it.

Libraries follow a chain of directories for as long as it goes, and allocate what a tag claims to
hold and what a tile claims to measure; OpenSlide ends the process where there is no such room.
Here all of them are bounded. What the tags say of a page's pixels comes along, for
``tiff_meaning``.
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
MAX_TEXT_BYTES = 2**22
"""Of a description: OME-XML says what its pixels are long before it lists a million planes."""
_WIDTH, _LENGTH, _TILE_WIDTH, _TILE_LENGTH, _TILE_BYTE_COUNTS = 256, 257, 322, 323, 325
_SUBFILE, _BITS, _COMPRESSION, _PHOTOMETRIC, _ORIENTATION, _SAMPLES, _PLANAR = (
    254, 258, 259, 262, 274, 277, 284,
)  # fmt: skip
_RESOLUTION_UNIT, _SUB_DIRECTORIES, _EXTRA_SAMPLES, _SAMPLE_FORMAT = 296, 330, 338, 339
_STRIP_OFFSETS, _STRIP_BYTE_COUNTS, _TILE_OFFSETS = 273, 279, 324
_DESCRIPTION, _PAGE_NAME, _X_RESOLUTION, _Y_RESOLUTION = 270, 285, 282, 283
_SIZES = (_WIDTH, _LENGTH, _TILE_WIDTH, _TILE_LENGTH, _TILE_BYTE_COUNTS)
_MOST_SAMPLES = 64
_PAGES_WITH_TEXT = 64
"""Of later ones neither descriptions nor data are looked at: all could claim the same megabytes."""
_JPEG = 7
_TYPE_BYTES = {
    1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4,
    16: 8, 17: 8, 18: 8,
}  # fmt: skip
_WHOLE_NUMBERS = {1: "u1", 3: "u2", 4: "u4", 16: "u8"}
_TEXT, _RATIONAL = (2, 7), 5
_DAMAGED = "its TIFF header is damaged"


class _Layout(NamedTuple):
    """Struct formats of classic TIFF or BigTIFF, in the file's byte order."""

    num_tags: struct.Struct
    tag: struct.Struct
    offset: struct.Struct


class TiffPage(NamedTuple):
    """What one directory says about its picture. A number that is absent is TIFF's default."""

    width: int
    length: int
    is_tiled: bool
    subfile: int
    bits: tuple[int, ...]
    compression: int
    photometric: int | None
    orientation: int
    samples: int
    is_planar: bool
    extra_samples: tuple[int, ...]
    sample_formats: tuple[int, ...]
    has_sub_directories: bool
    description: str
    page_name: str
    resolution: tuple[float, float] | None
    """Pixels per ``resolution_unit`` along x and y; None where a number is missing or zero."""
    resolution_unit: int
    first_piece: tuple[int, int] | None
    """Of JPEG: where the first tile or strip that is there lies, and how many bytes it has."""

    @property
    def num_px(self) -> int:
        return self.width * self.length


class _Tag(NamedTuple):
    """One entry of a directory, and where its value stands."""

    kind: int
    num: int
    start: int
    num_bytes: int


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


def read_tiff_header(path: Path) -> tuple[TiffPage, ...]:
    """Walk every directory of the chain once.

    Raises:
        SlideError: not TIFF, directories that go in a circle, out of the file or on and on, a tag
            that claims more than the file holds, or tiles that are too large or too many.
    """
    pages: list[TiffPage] = []
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            layout, offset = _layout(file)
            seen: set[int] = set()
            while offset:
                if offset in seen or len(seen) >= MAX_DIRECTORIES:
                    raise SlideError(_DAMAGED + ": its directories go in a circle")
                seen.add(offset)
                tags, offset = _read_directory(file, offset, layout, size)
                pages.append(_page(file, tags, layout, is_early=len(pages) < _PAGES_WITH_TEXT))
    except (OSError, struct.error, OverflowError) as error:
        raise SlideError(_DAMAGED) from error
    if not pages:
        raise SlideError(_DAMAGED)
    return tuple(pages)


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


def _read_directory(
    file: BinaryIO, offset: int, layout: _Layout, size: int
) -> tuple[dict[int, _Tag], int]:
    """The tags of one directory, checked, and where the next one is."""
    if offset >= size:
        raise SlideError(_DAMAGED)
    file.seek(offset)
    (num_tags,) = layout.num_tags.unpack(file.read(layout.num_tags.size))
    if num_tags > MAX_TAGS:
        raise SlideError(_DAMAGED)
    entries = file.read(num_tags * layout.tag.size)
    (following,) = layout.offset.unpack(file.read(layout.offset.size))
    tags: dict[int, _Tag] = {}
    for place in range(0, num_tags * layout.tag.size, layout.tag.size):
        code, kind, count = layout.tag.unpack_from(entries, place)
        num_bytes = count * _TYPE_BYTES.get(kind, 1)
        start = offset + layout.num_tags.size + place + layout.tag.size - layout.offset.size
        if num_bytes > layout.offset.size:
            value_place = place + layout.tag.size - layout.offset.size
            (start,) = layout.offset.unpack_from(entries, value_place)
            if start + num_bytes > size:
                raise SlideError(_DAMAGED + ": a tag claims more than the file holds")
        if code in _SIZES and (code in tags or kind not in (3, 4, 16) or count == 0):
            raise SlideError(_DAMAGED)  # libraries may each read it in another way
        tags.setdefault(code, _Tag(kind, count, start, num_bytes))
    _check_tiles({code: _numbers(file, tags[code], layout) for code in _SIZES if code in tags})
    return tags, int(following)


def _page(file: BinaryIO, tags: dict[int, _Tag], layout: _Layout, *, is_early: bool) -> TiffPage:
    """What is known of a page whose directory was checked."""

    def few(code: int, *default: int) -> tuple[int, ...]:
        tag = tags.get(code)
        if tag is None or tag.kind not in _WHOLE_NUMBERS or not 0 < tag.num <= _MOST_SAMPLES:
            return default
        return tuple(int(number) for number in _numbers(file, tag, layout))

    def one(code: int, default: int) -> int:
        return few(code, default)[0]

    samples, compression = one(_SAMPLES, 1), one(_COMPRESSION, 1)
    return TiffPage(
        width=one(_WIDTH, 0),
        length=one(_LENGTH, 0),
        is_tiled=_TILE_WIDTH in tags,
        subfile=one(_SUBFILE, 0),
        bits=few(_BITS, 1),
        compression=compression,
        photometric=one(_PHOTOMETRIC, 0) if _PHOTOMETRIC in tags else None,
        orientation=one(_ORIENTATION, 1),
        samples=samples,
        is_planar=one(_PLANAR, 1) == 2 and samples > 1,
        extra_samples=few(_EXTRA_SAMPLES),
        sample_formats=few(_SAMPLE_FORMAT, 1),
        has_sub_directories=_SUB_DIRECTORIES in tags,
        description=_text(file, tags.get(_DESCRIPTION)) if is_early else "",
        page_name=_text(file, tags.get(_PAGE_NAME)) if is_early else "",
        resolution=_resolution(file, tags, layout),
        resolution_unit=one(_RESOLUTION_UNIT, 2),
        first_piece=(
            _first_piece(file, tags, layout) if is_early and compression == _JPEG else None
        ),
    )


def _numbers(file: BinaryIO, tag: _Tag, layout: _Layout) -> npt.NDArray[np.uint64]:
    file.seek(tag.start)
    order = layout.offset.format[:1]
    values = np.frombuffer(file.read(tag.num_bytes), f"{order}{_WHOLE_NUMBERS[tag.kind]}")
    return values.astype(np.uint64)


def _text(file: BinaryIO, tag: _Tag | None) -> str:
    if tag is None or tag.kind not in _TEXT:
        return ""
    file.seek(tag.start)
    return file.read(min(tag.num_bytes, MAX_TEXT_BYTES)).rstrip(b"\0").decode("utf-8", "replace")


def _resolution(
    file: BinaryIO, tags: dict[int, _Tag], layout: _Layout
) -> tuple[float, float] | None:
    found = []
    for code in (_X_RESOLUTION, _Y_RESOLUTION):
        tag = tags.get(code)
        if tag is None or tag.kind != _RATIONAL or tag.num != 1:
            return None
        file.seek(tag.start)
        above, below = struct.unpack(f"{layout.offset.format[:1]}II", file.read(8))
        if above == 0 or below == 0:
            return None
        found.append(above / below)
    return found[0], found[1]


def _first_piece(file: BinaryIO, tags: dict[int, _Tag], layout: _Layout) -> tuple[int, int] | None:
    is_tiled = _TILE_OFFSETS in tags
    codes = (_TILE_OFFSETS, _TILE_BYTE_COUNTS) if is_tiled else (_STRIP_OFFSETS, _STRIP_BYTE_COUNTS)
    found = [tags[code] for code in codes if code in tags]
    if len(found) != 2 or any(
        tag.kind not in _WHOLE_NUMBERS or tag.num > MAX_TILES for tag in found
    ):
        return None
    offsets, counts = (_numbers(file, tag, layout) for tag in found)
    there = np.flatnonzero(counts[: len(offsets)])
    return (int(offsets[there[0]]), int(counts[there[0]])) if len(there) else None


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
