"""The segments of a JPEG stream, without decoding it."""

import re
from collections.abc import Iterator
from typing import Literal, NamedTuple

EOI, SOS, DQT, DHT, DRI, COM = 0xD9, 0xDA, 0xDB, 0xC4, 0xDD, 0xFE
APP0, APP14, APP15 = 0xE0, 0xEE, 0xEF
FRAMES = (0xC0, 0xC1, 0xC2)
"""Baseline, extended and progressive Huffman: what every decoder reads."""
_END_OF_SCAN = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")


class JpegError(ValueError):
    """The bytes are not a JPEG stream from beginning to end."""


class Segment(NamedTuple):
    """One marker with what belongs to it; a start of scan has its compressed data."""

    marker: int
    payload: bytes
    """Without marker and length."""
    scan: bytes = b""


class Frame(NamedTuple):
    """What a frame header says."""

    width: int
    height: int
    precision: int
    num_components: int


def segments(data: bytes) -> Iterator[Segment]:
    """The segments between start and end of image; what follows the end is not looked at.

    Raises:
        JpegError: a marker is missing or runs past the end.
    """
    if data[:2] != b"\xff\xd8":
        raise JpegError("no start of image")
    place = 2
    while True:
        while data[place : place + 2] == b"\xff\xff":  # fill bytes
            place += 1
        if data[place : place + 1] != b"\xff" or place + 2 > len(data):
            raise JpegError("no marker where one must be")
        marker = data[place + 1]
        if marker == EOI:
            return
        end = place + 2 + int.from_bytes(data[place + 2 : place + 4], "big")
        if end > len(data) or end < place + 4:
            raise JpegError("a segment runs past the end")
        payload, place = data[place + 4 : end], end
        if marker != SOS:
            yield Segment(marker, payload)
            continue
        following = _END_OF_SCAN.search(data, end)
        if following is None:
            raise JpegError("no end of image")
        place = following.start()
        yield Segment(marker, payload, data[end:place])


def frame(payload: bytes) -> Frame:
    """Read the payload of a frame header.

    Raises:
        JpegError: it is too short.
    """
    if len(payload) < 6:
        raise JpegError("a frame header is too short")
    return Frame(
        width=int.from_bytes(payload[3:5], "big"),
        height=int.from_bytes(payload[1:3], "big"),
        precision=payload[0],
        num_components=payload[5],
    )


def stored_colour(data: bytes) -> Literal["RGB", "YCbCr"] | None:
    """How the three components of a stream are stored, by its own marks; None if it has none.

    Marks are Adobe's and JFIF's segments, components that are called R, G and B, and colour of a
    coarser grid than brightness, which only YCbCr has. ``data`` may end anywhere in the scan.
    """
    found: Literal["RGB", "YCbCr"] | None = None
    try:
        for segment in segments(data):
            if segment.marker == APP14 and segment.payload[:5] == b"Adobe":
                return "YCbCr" if segment.payload[11:12] == b"\1" else "RGB"
            if segment.marker == APP0 and segment.payload[:4] == b"JFIF":
                found = "YCbCr"
            if segment.marker in FRAMES and found is None:
                names, grids = segment.payload[6:15:3], segment.payload[7:15:3]
                found = "RGB" if names == b"RGB" else "YCbCr" if len(set(grids)) > 1 else None
    except JpegError:
        pass
    return found
