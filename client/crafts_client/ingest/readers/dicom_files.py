"""DICOM whole-slide images: the instances of one series, one file each.

A slide is a folder that holds one series, or any file of a series; the other instances are found
beside it.
"""

from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from crafts_client.ingest.errors import SlideError
from crafts_client.ingest.readers.scanners import known_scanner
from crafts_client.ingest.readers.seam import (
    DAMAGED,
    MAX_CHUNK_PX,
    Pixels,
    ReaderName,
    Size,
    foreign,
    pyramid,
)

CACHE_BYTES = 16 * 2**20
_PREAMBLE_BYTES = 128
_WHOLE_SLIDE = "1.2.840.10008.5.1.4.1.1.77.1.6"
_REFUSED = "not a DICOM slide that can be read, or its header is damaged"
_HEADER_TAGS = ["SOPClassUID", "SeriesInstanceUID", "ImageType"]


class WsiDicomFile:
    """The levels of one series."""

    name: ReaderName = "wsidicom"
    has_plain_tiles: bool = False

    def __init__(self, path: Path) -> None:
        self.files = instances(path)
        with foreign(_REFUSED), ExitStack() as opened:
            import wsidicom

            settings = wsidicom.Settings(
                strict_tile_size_check=False,  # or a level with tiles of its own is left out
                decoded_frame_cache_size=CACHE_BYTES,
                encoded_frame_cache_size=CACHE_BYTES,
            )
            self._slide: Any = opened.enter_context(
                wsidicom.WsiDicom.open(self.files, settings=settings)
            )
            if len(self._slide.pyramids) != 1:
                raise SlideError(f"its series holds {len(self._slide.pyramids)} pictures, not one")
            self._pyramid: Any = list(self._slide.pyramids[0])
            for level in self._pyramid:
                _check_level(level)
            self.levels = pyramid([_size(level.size) for level in self._pyramid])
            self.mpp = _mpp(self._pyramid[0])
            dataset = self._pyramid[0].default_instance.dataset.as_dataset()
            self.scanner = known_scanner(
                dataset.get("Manufacturer"), dataset.get("ManufacturerModelName")
            )
            self._opened = opened.pop_all()

    def start(self, level: int, corner: Size) -> tuple[float, float]:
        downsample = self.levels[level].downsample
        return corner[0] * downsample, corner[1] * downsample

    def read(self, level: int, corner: Size, extent: Size) -> Pixels:
        with foreign():
            number = self._pyramid[level].level
            region: Pixels = self._slide.read_region(
                corner, number, extent, threads=1, as_array=True
            )
            if region.dtype != np.uint8 or region.shape != (extent[1], extent[0], 3):
                raise SlideError(DAMAGED)
            return region

    def close(self) -> None:
        with foreign():
            self._opened.close()


def is_dicom(path: Path) -> bool:
    """Whether a file has DICOM's mark."""
    try:
        with path.open("rb") as file:
            return file.read(_PREAMBLE_BYTES + 4)[_PREAMBLE_BYTES:] == b"DICM"
    except OSError:
        return False


def slide_series(folder: Path) -> dict[str, list[Path]]:
    """The files of each series in a folder that holds a slide's picture, in order of name."""
    files: dict[str, list[Path]] = defaultdict(list)
    with_picture: set[str] = set()
    try:
        paths = sorted(folder.iterdir())
    except OSError:  # a folder that may not be read has nothing for us
        return {}
    for path in paths:
        if path.is_file() and is_dicom(path) and (header := _slide_header(path)) is not None:
            series, is_picture = header
            files[series].append(path)
            if is_picture:
                with_picture.add(series)
    return {series: paths for series, paths in files.items() if series in with_picture}


def instances(path: Path) -> list[Path]:
    """The files of the slide that ``path`` stands for: a folder, or one of them.

    Raises:
        SlideError: none is a slide's, or a folder holds several slides.
    """
    if path.is_dir():
        series = list(slide_series(path).values())
        if len(series) > 1:
            raise SlideError(
                f"the folder holds {len(series)} DICOM slides; list one file of each instead"
            )
        if not series:
            raise SlideError("the folder holds no DICOM slide")
        return series[0]
    for files in slide_series(path.parent).values():
        if path in files:
            return files
    raise SlideError(_REFUSED)


def _slide_header(path: Path) -> tuple[str, bool] | None:
    """The series of a whole-slide instance, and whether it is a level; None for any other."""
    try:
        with foreign(_REFUSED):
            import pydicom

            header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=_HEADER_TAGS)
            if header.get("SOPClassUID") != _WHOLE_SLIDE or not header.get("SeriesInstanceUID"):
                return None
            return str(header.SeriesInstanceUID), "VOLUME" in (header.get("ImageType") or ())
    except SlideError:
        return None


def _check_level(level: Any) -> None:
    dataset = level.default_instance.dataset
    if dataset.samples_per_pixel != 3 or dataset.bits != 8:
        raise SlideError("not a picture of 8 bits of red, green and blue")
    width, height = _size(dataset.tile_size)
    if not 0 < width * height <= MAX_CHUNK_PX:
        raise SlideError(_REFUSED)


def _size(size: Any) -> Size:
    return int(size.width), int(size.height)


def _mpp(level: Any) -> tuple[float, float] | None:
    try:
        return float(level.mpp.width), float(level.mpp.height)
    except Exception:  # wsidicom has several for a scale that is missing
        return None
