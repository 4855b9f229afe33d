"""The skeleton of a TIFF file, walked before a library is let loose on it.

Libraries follow a chain of directories for as long as it goes, and allocate what a tag claims to
hold. Here both are bounded by the file itself.
"""

import struct
from pathlib import Path
from typing import BinaryIO, NamedTuple

from crafts_client.ingest.errors import SlideError

MAX_DIRECTORIES = 4096
MAX_TAGS = 4096
_TYPE_BYTES = {
    1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4,
    16: 8, 17: 8, 18: 8,
}  # fmt: skip
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


def check_tiff_header(path: Path) -> None:
    """Walk every directory once.

    Raises:
        SlideError: not TIFF, directories that go in a circle, out of the file or on and on, or a
            tag that claims more than the file holds.
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
    inline_bytes = layout.offset.size
    for place in range(0, num_tags * layout.tag.size, layout.tag.size):
        _, kind, count = layout.tag.unpack_from(tags, place)
        num_bytes = count * _TYPE_BYTES.get(kind, 1)
        if num_bytes > inline_bytes:
            (start,) = layout.offset.unpack_from(tags, place + layout.tag.size - inline_bytes)
            if start + num_bytes > size:
                raise SlideError(_DAMAGED + ": a tag claims more than the file holds")
    following: int = layout.offset.unpack(file.read(layout.offset.size))[0]
    return following
