"""Any folder of images as tiles at one scale: with a table, or as it lies.

A table (``.jsonl``, ``.csv`` or ``.tsv``; the one in the folder, or ``metadata.*`` anywhere below)
names ``file`` or ``file_name``, relative to itself, and where they are known ``caption``,
``label``, ``patient`` and ``mpp``. Without one, every image counts: its label is its folder, and a
PNG of ours says its caption. Where nobody says whose an image is, it is its own patient, together
with those that have the same pixels.
"""

import csv
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from crafts_core.errors import CraftsError
from crafts_core.evaluation.encoder import SMALLEST_PX, Images
from crafts_core.evaluation.real_tiles import RealTiles, pixel_digest
from crafts_core.picture_facts import bits_per_sample, opaque, opened
from crafts_core.progress import Progress
from crafts_core.provenance import ProvenanceError, read_provenance
from crafts_core.table_lines import table_reader, whole_lines

PATIENT = ("patient", "case", "source_tile_group")
LABEL = ("label", "cancer_type", "class", "organ")
_FILE, _CAPTION = ("file", "file_name"), ("caption", "prompt", "text")
_JSON, _TAB = ".jsonl", ".tsv"
_TABLES = (_JSON, ".csv", _TAB)
_FORMATS = ("PNG", "JPEG", "TIFF", "WEBP", "BMP")
_IMAGES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp", ".bmp")
_MOST_PIXELS = 100_000_000
"""Of an image that is enlarged: more is a wrong scale, and may be more than there is memory."""

Row = Mapping[str, str]


class ImageSetError(CraftsError):
    """A folder from which no set of images can be read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How images of a folder are brought to one scale and size."""

    told_mpp: float | None
    """Of images that do not say theirs."""
    at_mpp: float
    largest_px: int
    """A square of this side, or a smaller one that all images fill, in whole ``unit_px``."""
    unit_px: int
    foundation_hash: str
    """Images that a generator of this foundation drew, and that do not say theirs, have
    ``at_mpp``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Listed:
    """An image before its pixels are read."""

    path: Path
    patient: str
    caption: str
    label: str
    mpp: float


def is_image_folder(folder: Path) -> bool:
    """Whether there is anything that ``read_images`` could read."""
    return bool(_tables(folder)) or any(_files(folder))


def read_images(
    folder: Path,
    scale: Scale,
    *,
    most: int,
    seed: int,
    progress: Progress | None = None,
) -> RealTiles:
    """The images of a folder, or of a table, or a random choice of ``most`` of them.

    Raises:
        ImageSetError: there are none, or one is not what a table says, cannot be read, has no
            scale or is too small.
    """
    is_table = folder.is_file()
    tables = [folder] if is_table else _tables(folder)
    root = folder.parent if is_table else folder
    listed = list(_listed(root, tables, scale) if tables else _as_they_lie(folder, scale))
    if not listed:
        raise ImageSetError(f"{folder} holds no images")
    rows = np.sort(np.random.default_rng(seed).permutation(len(listed))[:most])
    chosen = [listed[row] for row in rows.tolist()]
    squares = []
    for done, each in enumerate(chosen):
        squares.append(_square(each, scale))
        if progress is not None:
            progress(f"images of {folder.name}", done + 1, len(chosen))
    side_px = min(len(square) for square in squares) // scale.unit_px * scale.unit_px
    if side_px < SMALLEST_PX:
        small = min(zip(chosen, squares, strict=True), key=lambda pair: len(pair[1]))[0]
        raise ImageSetError(
            f"{small.path}: expected at least {SMALLEST_PX} px at {scale.at_mpp:g} microns per "
            f"pixel, got {side_px}"
        )
    images_NHWC = np.stack([_middle(square, side_px) for square in squares])
    patients = [
        each.patient or pixel_digest(image).hex()
        for each, image in zip(chosen, images_NHWC, strict=True)
    ]
    return RealTiles(
        images_NHWC=images_NHWC,
        patients=np.asarray(patients),
        captions=[each.caption for each in chosen],
        labels=[each.label for each in chosen],
        says_patients=any(each.patient for each in chosen),
    )


def table_rows(table: Path) -> list[Row]:
    """The rows of a table, by its header, or the objects of a ``.jsonl``.

    Raises:
        ImageSetError: it is no such table.
    """
    try:
        text = table.read_text(encoding="utf-8-sig")
        if kind_of_table(table) == _JSON:  # values may hold what splitlines() takes for line ends
            return [_cells(json.loads(line)) for line in text.split("\n") if line.strip()]
        delimiter = "\t" if kind_of_table(table) == _TAB else ","
        return [_cells(row) for _, row in whole_lines(table_reader(text, delimiter))]
    except (ValueError, RecursionError, csv.Error) as error:
        raise ImageSetError(f"{table} is no UTF-8 table: {error}") from error


def kind_of_table(path: Path) -> str:
    """The suffix of a table, in small letters; empty for what is none."""
    return suffix if (suffix := path.suffix.lower()) in _TABLES else ""


def named_image(folder: Path, table: Path, name: str) -> Path:
    """The file that a table names, relative to itself.

    Raises:
        ImageSetError: it is elsewhere than in the folder that is measured.
    """
    path = table.parent / name
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        raise ImageSetError(f"{table}: {name} leads outside {folder}; copy the image there")
    return path


def scaled_image(path: Path, scale: float) -> Image.Image:
    """An RGB image, ``scale`` times as large.

    Raises:
        ImageSetError: it cannot be read, or has more than eight bits.
    """
    try:
        with opened(path, _FORMATS) as image:
            if bits_per_sample(image) > 8:
                raise ImageSetError(f"{path}: expected 8 bits a sample, got more")
            rgb = opaque(image)
            width, height = (max(1, round(side * scale)) for side in rgb.size)
            if scale > 1 and width * height > _MOST_PIXELS:
                raise ImageSetError(
                    f"{path}: {rgb.width} x {rgb.height} px would become {width} x {height}; is "
                    "its scale (microns per pixel) right?"
                )
            return rgb.resize((width, height), Image.Resampling.LANCZOS)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ImageSetError(f"{path} cannot be read ({error})") from error


def middle_square(image: Image.Image, side_px: int) -> Images:
    """The square of that side in the middle of an image."""
    left, top = ((side - side_px) // 2 for side in image.size)
    return np.asarray(image.crop((left, top, left + side_px, top + side_px)))


def _tables(folder: Path) -> list[Path]:
    here = sorted(each for each in folder.iterdir() if kind_of_table(each))
    if len(here) > 1:
        names = ", ".join(each.name for each in here)
        raise ImageSetError(f"{folder}: expected at most one table, got {names}")
    return here or sorted(each for each in folder.rglob("metadata.*") if kind_of_table(each))


def _files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        is_hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.suffix.lower() in _IMAGES and not is_hidden:
            yield path


def _listed(folder: Path, tables: Sequence[Path], scale: Scale) -> Iterator[_Listed]:
    """Rows of tables; a column that some rows fill must be filled in all, but for the label."""
    rows = [(table, row) for table in tables for row in table_rows(table)]
    says_patient, says_caption = (
        any(_first(row, names) for _, row in rows) for names in (PATIENT, _CAPTION)
    )
    whose: dict[str, str] = {}
    for table, row in rows:
        name = _first(row, _FILE)
        if not name:
            raise ImageSetError(f"{table}: a row has no {' or '.join(_FILE)}")
        patient, caption = _first(row, PATIENT), _first(row, _CAPTION)
        for said, what, is_asked in (
            (patient, "patient", says_patient),
            (caption, "caption", says_caption),
        ):
            if is_asked and not said:
                raise ImageSetError(f"{table}: {name} has no {what}, and other images have")
        path = named_image(folder, table, name)
        if (other := whose.setdefault(os.path.realpath(path), patient)) != patient:
            raise ImageSetError(f"{table}: {name} is listed for {other} and for {patient}")
        yield _Listed(
            path=path,
            patient=patient,
            caption=caption,
            label=_first(row, LABEL),
            mpp=_mpp(row.get("mpp") or scale.told_mpp, path),
        )


def _as_they_lie(folder: Path, scale: Scale) -> Iterator[_Listed]:
    for path in _files(folder):
        caption, told = "", scale.told_mpp
        try:
            provenance = read_provenance(path)
        except ProvenanceError:
            pass  # anybody's image
        else:
            if provenance.kind != "image":
                continue
            caption = provenance.prompts[0] if provenance.prompts else ""
            if provenance.origin.mpp is not None:
                told = provenance.origin.mpp
            elif provenance.origin.foundation_hash == scale.foundation_hash:
                told = scale.at_mpp
        label = "" if path.parent == folder else path.parent.name
        yield _Listed(path=path, patient="", caption=caption, label=label, mpp=_mpp(told, path))


def _mpp(told: str | float | None, path: Path) -> float:
    if told is None:
        raise ImageSetError(f"nobody says the scale of {path}; give --mpp (microns per pixel)")
    try:
        mpp = float(told)
    except ValueError:
        mpp = 0.0
    if not 0.01 <= mpp <= 1000:
        raise ImageSetError(f"{path}: expected microns per pixel from 0.01 to 1000, got {told}")
    return mpp


def _square(each: _Listed, scale: Scale) -> Images:
    """The middle of an image, at the scale, no larger than it has to be."""
    image = scaled_image(each.path, each.mpp / scale.at_mpp)
    return middle_square(image, min(*image.size, scale.largest_px))


def _middle(square_HWC: Images, side_px: int) -> Images:
    start = (len(square_HWC) - side_px) // 2
    return square_HWC[start : start + side_px, start : start + side_px]


def _first(row: Row, names: tuple[str, ...]) -> str:
    return next((row[name] for name in names if row.get(name)), "")


def _cells(row: Any) -> Row:
    if not isinstance(row, dict):
        raise ValueError("a row is no object")
    return {str(key).strip(): str(value).strip() for key, value in row.items() if value is not None}
