"""The files of a DICOM slide: one for each level, found beside each other.

A slide is a folder that holds one series, or any file of a series; the other instances are found
beside it, and, where it is a link, beside what it leads to. A level that is missing or cannot be
read is no reason to take the next coarser one for the slide.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from crafts_client.ingest.errors import SlideError
from crafts_client.ingest.housekeeping import is_housekeeping, is_unfinished
from crafts_client.ingest.readers.seam import foreign

NOT_DICOM = "not a DICOM slide that can be read, or its header is damaged"
_PREAMBLE_BYTES = 128
_WHOLE_SLIDE = "1.2.840.10008.5.1.4.1.1.77.1.6"
_HEADER_TAGS = [
    "SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "ImageType", "SamplesPerPixel",
    "PhotometricInterpretation", "BitsAllocated", "BitsStored", "TotalPixelMatrixColumns",
]  # fmt: skip
_MAX_LINKS = 32
_NAMED_LINKS = 3
_COLOURS = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_RCT", "YBR_ICT")


class _Header(NamedTuple):
    """What one instance says of itself."""

    series: str
    instance: str
    is_level: bool
    is_resampled: bool
    width: int
    pixels: str
    """Empty where they are 8 bits of colour."""


def is_dicom(path: Path) -> bool:
    """Whether a file has DICOM's mark."""
    try:
        with path.open("rb") as file:
            return file.read(_PREAMBLE_BYTES + 4)[_PREAMBLE_BYTES:] == b"DICM"
    except OSError:
        return False


def slide_series(folder: Path) -> dict[str, list[Path]]:
    """The files of each series in a folder that holds a slide's picture, in order of name."""
    found = _instances_in(folder)
    with_picture = {header.series for _, header in found if header.is_level}
    files: dict[str, list[Path]] = defaultdict(list)
    for path, header in found:
        if header.series in with_picture:
            files[header.series].append(path)
    return dict(files)


def instances(path: Path) -> tuple[list[Path], int]:
    """The files of the slide that ``path`` stands for (a folder, or one of them), and its width.

    Raises:
        SlideError: none is a slide's, a folder holds several slides, or a part of it is not there.
    """
    if path.is_dir():
        found = _instances_in(path)
        series = {header.series for _, header in found if header.is_level}
        if len(series) > 1:
            raise SlideError(
                f"the folder holds {len(series)} DICOM slides; list one file of each instead"
            )
        if not series:
            _check_present([path])
            raise SlideError("the folder holds no DICOM slide")
        own, folders = series.pop(), [path]
    else:
        header = _header(path)
        if header is None:
            raise SlideError(NOT_DICOM)
        own, folders = header.series, list(_folders_of(path))
        found = [pair for folder in folders for pair in _instances_in(folder)]
    _check_present(folders)
    files = {header.instance: (file, header) for file, header in reversed(found)
             if header.series == own}  # fmt: skip
    headers = [header for _, header in files.values() if header.is_level]
    _check_headers(headers)
    return sorted(file for file, _ in files.values()), max(header.width for header in headers)


def _folders_of(file: Path) -> Iterator[Path]:
    """Where a file lies and, if it is a link, where those lie that it leads to."""
    for _ in range(_MAX_LINKS):
        yield file.parent
        if not file.is_symlink():
            return
        file = file.parent / file.readlink()


def _instances_in(folder: Path) -> list[tuple[Path, _Header]]:
    """The whole-slide instances in a folder, in order of name."""
    try:
        paths = sorted(folder.iterdir())
    except OSError:  # a folder that may not be read has nothing for us
        return []
    read = [(path, _header(path)) for path in paths if _is_somebodys(path) and path.is_file()]
    return [(path, header) for path, header in read if header is not None]


def _is_somebodys(path: Path) -> bool:
    return not (is_housekeeping(path.name) or is_unfinished(path.name))


def _check_present(folders: Iterable[Path]) -> None:
    """Refuse a folder that is not all there: the finest level may be what is missing."""
    names = [entry for folder in folders for entry in folder.iterdir()]
    names = [entry for entry in names if not is_housekeeping(entry.name)]
    dangling = [entry.name for entry in names if entry.is_symlink() and not entry.exists()]
    if dangling:
        told = ", ".join(sorted(dangling)[:_NAMED_LINKS])
        raise SlideError(
            f"{len(dangling)} links in its folder lead to nothing ({told}); fetch what they lead "
            "to (git annex get, dvc pull), or remove them"
        )
    if unfinished := [entry.name for entry in names if is_unfinished(entry.name)]:
        raise SlideError(f"{min(unfinished)} in its folder is an unfinished copy; copy it again")


def _check_headers(levels: Sequence[_Header]) -> None:
    """Refuse a slide whose finest level is not there, or of which one cannot be read."""
    if not levels:
        raise SlideError(NOT_DICOM)
    if odd := [header.pixels for header in levels if header.pixels]:
        raise SlideError(f"not a picture of 8 bits of red, green and blue, but of {odd[0]}")
    if max(levels, key=lambda header: header.width).is_resampled:
        raise SlideError(
            "its finest level is a reduced copy (RESAMPLED): the file of full resolution is not "
            "beside it"
        )


def _header(path: Path) -> _Header | None:
    """What a whole-slide instance says of itself; None for any other file."""
    try:
        found = path.stat()
    except OSError:
        return None
    return _header_of(path, found.st_ino, found.st_size, found.st_mtime_ns)


@lru_cache(maxsize=2**16)
def _header_of(path: Path, *_is_the_same: int) -> _Header | None:
    """Read once: in a folder of many slides each asks what belongs to it."""
    if not is_dicom(path):
        return None
    try:
        with foreign(NOT_DICOM):
            import pydicom

            read = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=_HEADER_TAGS)
            if read.get("SOPClassUID") != _WHOLE_SLIDE or not read.get("SeriesInstanceUID"):
                return None
            kind = read.get("ImageType") or ()
            return _Header(
                series=str(read.SeriesInstanceUID),
                instance=str(read.get("SOPInstanceUID")),
                is_level="VOLUME" in kind,
                is_resampled="RESAMPLED" in kind,
                width=int(read.get("TotalPixelMatrixColumns") or 0),
                pixels=_odd_pixels(read),
            )
    except SlideError:
        return None


def _odd_pixels(header: Any) -> str:
    samples, photometric = header.get("SamplesPerPixel"), header.get("PhotometricInterpretation")
    bits = {header.get("BitsAllocated", 8), header.get("BitsStored", 8)}
    if samples == 3 and bits == {8} and photometric in _COLOURS:
        return ""
    return f"{max(bits)} bits, {samples} samples, {photometric}"
