"""The table of open tiles that a public foundation is built from, and the tiles cut by it.

One line an image, tab or comma separated, with a header. ``file`` is relative to the table.

======== ==========================================================================================
file     an H&E image, any size; it is brought to the foundation's scale and cut
case     the patient, or what is known that comes nearest: never on both sides of a split
organ    plain words; may be empty
type     TCGA code of one of the 30 types, ``normal``, or empty
caption  what the source says it shows
mpp      microns per pixel of the image
licence  under which the image may be used; goes into the card
source   whom the card credits
split    ``build`` (default) or ``held-out``: nothing is trained on the latter; the probe is of them
======== ==========================================================================================
"""

import csv
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from crafts_core.fields import describe_first_error
from crafts_core.foundation_manifest import FoundationError
from crafts_core.picture_facts import bits_per_sample, opaque, opened
from crafts_core.table_lines import table_reader, whole_lines
from crafts_core.vocabulary import CANCER_TYPES, cancer_type

Pixels = npt.NDArray[np.uint8]
Words = Annotated[str, Field(max_length=300)]
Name = Annotated[str, Field(min_length=1, max_length=300)]

_FORMATS = ("PNG", "JPEG", "TIFF", "WEBP", "BMP", "JPEG2000")
_SMALLEST = 0.875
"""An image that is a little too small is enlarged to one tile; a smaller one has none."""
_MOST_PIXELS = 400_000_000
"""Of an image that is enlarged: more is a wrong scale, and may be more than there is memory."""
_CODES = frozenset(cancer.code for cancer in CANCER_TYPES)


class NoTissueError(FoundationError):
    """Images were read and none gives a tile."""


class TableRow(BaseModel):
    """One image of the table."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    file: Path
    case: Name
    organ: Words = ""
    type: Words = ""
    caption: Words = ""
    mpp: Annotated[float, Field(ge=0.05, le=20)]
    licence: Name
    source: Words = ""
    split: Literal["build", "held-out"] = "build"

    @field_validator("type")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in _CODES | {"", "normal"}:
            raise ValueError(f"expected a TCGA code, normal or nothing, got {value!r}")
        return value

    @property
    def label(self) -> str:
        """What a judge may be asked for: the type where there is one, else the organ."""
        return self.type if self.type in _CODES else self.organ

    @property
    def description(self) -> str:
        """The caption in the system's grammar: what it is and where, as hospitals write it.

        Where it is, the table knows better than the type: a sarcoma may lie in the liver.
        """
        what, where = self.caption, self.organ
        if self.type in _CODES:
            cancer = cancer_type(self.type)
            what, where = cancer.name, self.organ or cancer.organ
        elif self.type == "normal" and what in ("", "normal", self.organ):
            what = f"normal {self.organ}"
        return ", ".join(dict.fromkeys(part for part in ("H&E", what, where) if part))


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenTiles:
    """Tiles of one size and scale. ``row_N`` says which row of the table each came from."""

    image_NHWC: Pixels
    row_N: npt.NDArray[np.int64]
    rows: tuple[TableRow, ...]

    def cases(self) -> npt.NDArray[np.str_]:
        """The case of each tile."""
        return np.asarray([row.case for row in self.rows])[self.row_N]


def read_table(path: Path) -> tuple[TableRow, ...]:
    """Every line of the table, checked.

    Raises:
        FoundationError: it cannot be read; names the first wrong line and how many there are.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise FoundationError(f"cannot read the table of tiles {path}: {error}") from error
    header = text.partition("\n")[0]
    delimiter = "\t" if "\t" in header else ","
    rows, wrong = [], []
    try:
        for number, line in whole_lines(table_reader(text, delimiter)):
            try:
                rows.append(_row(line, path.parent))
            except ValidationError as error:
                wrong.append(f"line {number}: {describe_first_error(error)}")
    except csv.Error as error:
        raise FoundationError(f"{path}: {error}") from error
    if wrong:
        raise FoundationError(f"{path}: {wrong[0]}; {len(wrong)} lines are wrong")
    if not rows:
        raise FoundationError(f"{path} lists no tile")
    _check_splits(rows, path)
    return tuple(rows)


def _row(line: dict[str, str], folder: Path) -> TableRow:
    values = {
        key: value.strip() if key == "file" else " ".join(value.split())
        for key, value in line.items()
        if value.strip()
    }
    row = TableRow.model_validate(values)
    return row.model_copy(update={"file": folder / row.file})


def _check_splits(rows: Sequence[TableRow], path: Path) -> None:
    """A case on both sides would make every figure about held-out cases worthless."""
    for what, names in (
        ("case", [row.case.casefold() for row in rows]),
        ("image", [os.path.realpath(row.file) for row in rows]),
    ):
        held_out = {name for name, row in zip(names, rows, strict=True) if row.split != "build"}
        for name, row in zip(names, rows, strict=True):
            if row.split == "build" and name in held_out:
                told = row.case if what == "case" else row.file.name
                raise FoundationError(f"{path}: {what} {told!r} is in build and in held-out")


def cut_tiles(rows: Sequence[TableRow], *, tile_px: int, mpp: float) -> Iterator[list[Pixels]]:
    """For each row its tiles (tile_px, tile_px, 3) at ``mpp``, side by side and centred.

    Raises:
        FoundationError: an image cannot be read.
    """
    for row in rows:
        try:
            with opened(row.file, _FORMATS) as file:
                if bits_per_sample(file) > 8:  # Pillow would make them all black or white
                    raise FoundationError(f"{row.file}: expected 8 bits a sample, got more")
                image = opaque(file)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise FoundationError(f"cannot read {row.file}: {error}") from error
        scale = row.mpp / mpp
        if scale > 1 and image.width * image.height * scale**2 > _MOST_PIXELS:
            raise FoundationError(
                f"{row.file}: {image.width} x {image.height} px at {row.mpp:g} microns per pixel "
                f"would become {scale:.3g} times as large; is its mpp right?"
            )
        yield _cut(image, scale, tile_px)


def _cut(image: Image.Image, scale: float, tile_px: int) -> list[Pixels]:
    width, height = (round(side * scale) for side in image.size)
    if min(width, height) < _SMALLEST * tile_px:
        return []
    width, height = max(width, tile_px), max(height, tile_px)
    pixels = np.asarray(image.resize((width, height), Image.Resampling.LANCZOS))
    columns, lines = width // tile_px, height // tile_px
    left, top = (width - columns * tile_px) // 2, (height - lines * tile_px) // 2
    inner = pixels[top : top + lines * tile_px, left : left + columns * tile_px]
    grid = inner.reshape(lines, tile_px, columns, tile_px, 3).swapaxes(1, 2)
    return list(np.ascontiguousarray(grid.reshape(-1, tile_px, tile_px, 3)))


def read_open_tiles(
    rows: Sequence[TableRow],
    *,
    tile_px: int,
    mpp: float,
    min_tissue: float = 0.25,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> OpenTiles:
    """All tiles of the rows that show tissue on at least ``min_tissue`` of their area."""
    images, places = [], []
    for place, tiles in enumerate(cut_tiles(rows, tile_px=tile_px, mpp=mpp)):
        progress(place + 1, len(rows))
        for tile in tiles:
            if tissue_fraction(tile) >= min_tissue:
                images.append(tile)
                places.append(place)
    if not images:
        raise NoTissueError("no image of the table gives a tile with tissue on it")
    return OpenTiles(
        image_NHWC=np.stack(images), row_N=np.asarray(places, dtype=np.int64), rows=tuple(rows)
    )


def tissue_fraction(tile_HWC: Pixels) -> float:
    """Share of pixels that are neither white nor grey."""
    spread = np.ptp(tile_HWC.astype(np.int16), axis=2)
    return float(((spread > 12) & (tile_HWC.mean(axis=2) < 235)).mean())
