"""The seam between a slide and the library that reads it, and what holds for every library.

Files come from scanners, archives and sometimes from somebody who means harm: nothing that a
header says is used before it is checked, and nothing that a library says about a file gets out.
"""

import contextlib
import logging
import math
import traceback
import warnings
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from crafts_client.ingest.errors import SlideError

MAX_SIDE_PX = 4_000_000
"""A metre at 0.25 microns per pixel: no glass is longer."""
MAX_LEVELS = 64
MAX_CHUNK_PX = 2**26
"""No scanner stores more pixels in one piece; a decoder would allocate what a header claims."""
_LEVEL_TOLERANCE = 0.1
_LEVEL_TOLERANCE_PX = 2.0
_LIBRARY_LOGS = ("tifffile", "tiffslide", "pydicom", "wsidicom", "fsspec", "zarr", "PIL")
_NOWHERE = logging.NullHandler()
DAMAGED = "damaged: its pixels cannot be decoded"
WHITE = (255, 255, 255)

ReaderName = Literal["openslide", "tiffslide", "wsidicom", "image"]
Size = tuple[int, int]
Pixels = npt.NDArray[np.uint8]


class Level(NamedTuple):
    """One picture of the pyramid. ``downsample`` is level-0 pixels per pixel of it."""

    width: int
    height: int
    downsample: float


class Scale(NamedTuple):
    """One statement about the size of a level-0 pixel, in microns, unchecked."""

    source: str
    mpp_x: float
    mpp_y: float


class Reader(Protocol):
    """An open slide file. Holds no label, macro or description.

    After an error it can be read on elsewhere. It belongs to one process and one thread.
    """

    name: ReaderName
    levels: tuple[Level, ...]
    """Finest first; never empty, and checked."""
    scales: tuple[Scale, ...]
    """What the file says of the size of a level-0 pixel, unchecked, the best statement first."""
    objective_power: float | None
    """Magnification of the objective as the file has it, unchecked."""
    scanner: str
    """Vendor and model, from a closed list."""
    has_plain_tiles: bool
    """Whether a level is one TIFF page of the same size, its tiles in order."""

    def start(self, level: int, corner: Size) -> tuple[float, float]:
        """Where a region with this corner (in pixels of the level) begins, in level-0 pixels."""

    def read(self, level: int, corner: Size, extent: Size) -> Pixels:
        """RGB pixels of a region that lies on the level, shape (height, width, 3).

        They are not to be written to.

        Raises:
            SlideError: they cannot be decoded.
        """

    def close(self) -> None: ...


@contextlib.contextmanager
def foreign(sentence: str = DAMAGED) -> Iterator[None]:
    """Run a library on a file that nobody vouches for.

    A library answers damage with any kind of exception, with warnings and with log lines, and
    quotes the file in all of them. Whatever it raises becomes one sentence of ours, the rest is
    dropped.

    Raises:
        SlideError: with ``sentence``, or the one raised inside.
    """
    with warnings.catch_warnings(), _no_logs():
        warnings.simplefilter("ignore")
        try:
            yield
        except SlideError:
            raise
        except Exception as error:
            # A library's frames keep its files open for as long as the error lives.
            traceback.clear_frames(error.__traceback__)
            raise SlideError(sentence) from error


def pyramid(sizes: Sequence[Size], downsamples: Sequence[float] | None = None) -> tuple[Level, ...]:
    """Levels of one picture at several scales, finest first.

    Args:
        sizes: Width and height of each level.
        downsamples: As the file has them; else they follow from the sizes.

    Raises:
        SlideError: a size cannot be right, or the levels do not show the same picture.
    """
    if not 1 <= len(sizes) <= MAX_LEVELS:
        raise SlideError(f"{len(sizes)} levels cannot be right; its header is damaged")
    for width, height in sizes:
        if not (0 < width <= MAX_SIDE_PX and 0 < height <= MAX_SIDE_PX):
            raise SlideError(f"{width} x {height} pixels cannot be right; its header is damaged")
    whole = sizes[0]
    if downsamples is None:
        downsamples = [(whole[0] / width + whole[1] / height) / 2 for width, height in sizes]
    levels = tuple(
        Level(width, height, downsample)
        for (width, height), downsample in zip(sizes, downsamples, strict=True)
    )
    if downsamples[0] != 1 or not all(_shows(level, whole) for level in levels):
        raise SlideError("its levels are not one picture at several scales; its header is damaged")
    return levels


def _shows(level: Level, whole: Size) -> bool:
    """Whether a level is as large as its downsample says."""
    if not (math.isfinite(level.downsample) and level.downsample >= 1):
        return False
    tolerance_px = _LEVEL_TOLERANCE_PX * level.downsample
    return all(
        abs(length * level.downsample - full) <= max(_LEVEL_TOLERANCE * full, tolerance_px)
        for length, full in zip(level[:2], whole, strict=True)
    )


@contextlib.contextmanager
def _no_logs() -> Iterator[None]:
    """What the libraries' loggers and their children say goes nowhere.

    Setting a level would do, but makes every logger of the process forget what it is enabled for:
    a millisecond for each region that is read.
    """
    loggers = [logging.getLogger(name) for name in _LIBRARY_LOGS]
    before = [(logger.handlers, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.handlers, logger.propagate = [_NOWHERE], False
    try:
        yield
    finally:
        for logger, (handlers, propagate) in zip(loggers, before, strict=True):
            logger.handlers, logger.propagate = handlers, propagate
