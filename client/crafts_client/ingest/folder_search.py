"""What a folder holds that can be ingested, and what looks like it and cannot."""

import os
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from crafts_client.ingest.errors import SlideError
from crafts_client.ingest.housekeeping import is_housekeeping, is_unfinished
from crafts_client.ingest.pool import Beat, Pool
from crafts_client.ingest.readers.dicom_instances import is_dicom, slide_series
from crafts_client.ingest.readers.opening import open_reader
from crafts_client.ingest.readers.tiff_header import is_tiff
from crafts_core.progress import Progress, silent

SLIDE_ENDINGS = frozenset({
    ".svs", ".tif", ".tiff", ".ndpi", ".vms", ".vmu", ".scn", ".mrxs", ".svslide", ".bif", ".czi",
    ".dcm", ".btf", ".isyntax", ".vsi", ".qptiff",
})  # fmt: skip
IMAGE_ENDINGS = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp"})
Answer = Literal["slide", "image", "other"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundSlides:
    """What was found below a folder, in the order of the names."""

    paths: tuple[Path, ...]
    """Slides, and plain images if they were asked for."""
    left_out: tuple[tuple[Path, str], ...]
    """Files that look like slides and folders that may hold some, and why nothing comes of them."""
    num_images: int
    """Plain images that were not asked for."""
    num_housekeeping: int
    """Hidden files, recycle bins and index folders of file servers: not looked into."""


def find_slides(
    folder: Path,
    *,
    images: bool = False,
    num_processes: int = 0,
    progress: Progress = silent,
) -> FoundSlides:
    """Every slide below a folder that can be opened.

    A DICOM slide is found as the folder that holds it, or, where one folder holds several, as
    the first file of each. Links to folders are not followed.

    Args:
        folder: Where to look.
        images: Take plain images, too.
        num_processes: Where files are opened; 0 is this process, which a damaged file may end.
        progress: Called with the step, what is done of it and what there is.
    """
    left_out: list[tuple[Path, str]] = []
    slides, files, num_housekeeping = _walk(folder, left_out)
    num_images = num_done = 0
    with Pool(num_processes) as pool:
        for place, answer in pool.run(_look, files):
            num_done += 1
            progress("looking at files", num_done, len(files))
            path = files[place]
            if isinstance(answer, SlideError):
                if _looks_like_a_slide(path, images=images):
                    left_out.append((path, str(answer)))
            elif answer == "slide" or (answer == "image" and images):
                slides.append(path)
            elif answer == "image":
                num_images += 1
    return FoundSlides(
        paths=tuple(sorted(slides)),
        left_out=tuple(sorted(left_out)),
        num_images=num_images,
        num_housekeeping=num_housekeeping,
    )


def _walk(folder: Path, left_out: list[tuple[Path, str]]) -> tuple[list[Path], list[Path], int]:
    """DICOM slides, files that are not DICOM, and how much is housekeeping.

    What cannot be entered, and copies that are not finished, are left out.
    """

    def refused(error: OSError) -> None:
        left_out.append((Path(error.filename), f"cannot be entered: {error.strerror}"))

    slides: list[Path] = []
    files: list[Path] = []
    num_housekeeping = 0
    for place, folders, entries in os.walk(folder, onerror=refused):
        directory = Path(place)
        num_housekeeping += sum(map(is_housekeeping, (*folders, *entries)))
        folders[:] = [name for name in folders if not is_housekeeping(name)]
        left_out += [
            (directory / name, "a link to a folder, which is not followed")
            for name in folders
            if (directory / name).is_symlink()
        ]
        names = [name for name in entries if not is_housekeeping(name)]
        left_out += [
            (directory / name, "an unfinished copy") for name in names if is_unfinished(name)
        ]
        names = [name for name in names if not is_unfinished(name)]
        series = list(slide_series(directory).values())
        slides += [directory] if len(series) == 1 else [paths[0] for paths in series]
        dicom = [directory / name for name in names if is_dicom(directory / name)]
        if spare := len(set(dicom) - {path for paths in series for path in paths}):
            left_out.append((directory, f"{spare} DICOM files in it are no part of a slide"))
        files += [path for name in names if (path := directory / name) not in set(dicom)]
    return slides, sorted(files), num_housekeeping


def _look(path: Path, beat: Beat) -> Answer:
    """What a file is.

    Raises:
        SlideError: it is neither slide nor image, or cannot be opened.
    """
    beat(1)
    try:
        if not path.is_file():
            if path.is_symlink():
                raise SlideError("a link to nothing")
            return "other"
        with path.open("rb"):
            pass
    except OSError as error:
        raise SlideError(f"cannot be read: {error.strerror}") from error
    with closing(open_reader(path)) as reader:
        return "image" if reader.name == "image" else "slide"


def _looks_like_a_slide(path: Path, *, images: bool) -> bool:
    ending = path.suffix.lower()
    return ending in SLIDE_ENDINGS or (images and ending in IMAGE_ENDINGS) or is_tiff(path)
