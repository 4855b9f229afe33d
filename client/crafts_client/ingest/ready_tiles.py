"""Preparing tiles that somebody else has cut: one image file, one tile."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from crafts_client.ingest.deidentify import Salt
from crafts_client.ingest.errors import Problem, SlideError
from crafts_client.ingest.pool import Beat
from crafts_client.ingest.readers.image_files import FORMATS, opened_picture
from crafts_client.ingest.shard_cut import CutTile, Shard, cut_shard
from crafts_client.ingest.source_audit import UNSEEN, audit_image
from crafts_client.ingest.table import TableRow
from crafts_client.ingest.tissue import sharpness, tissue_fraction
from crafts_core.picture_facts import opaque, opened, upright_size
from crafts_core.plan_sections import Modality
from crafts_core.tiles.conditions import (
    ConditionError,
    check_condition_file,
    encode_condition,
    read_condition,
)
from crafts_core.tiles.records import encode_tile


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupJob:
    """Ready tiles of one patient, which become one shard."""

    paths: tuple[Path, ...]
    conditions: tuple[Mapping[Modality, Path], ...]
    """What lies over each image."""
    slide_ids: tuple[str, ...]
    """Of each image: here every one is a slide of its own."""
    side_px: tuple[float | None, ...]
    """Side of the central square that becomes the tile, in the image's pixels; None: all of it."""
    tile_px: int
    store: Path
    salt: Salt
    shard: str
    key: str


def cut_group(job: GroupJob, beat: Beat) -> Shard:
    """Go on with a shard until all its images are done; why one gives no tile is its rejection."""
    with cut_shard(job.store, job.shard, job.key) as cut:
        beat(cut.next_place)
        while cut.next_place < len(job.paths):
            place = cut.next_place
            try:
                tile = prepare_tile(
                    job.paths[place], job.side_px[place], job.tile_px, job.conditions[place]
                )
            except SlideError as error:
                cut.reject(str(error))
            else:
                cut.keep(job.salt.tile_id(job.slide_ids[place], tile.x, tile.y), tile)
            beat(1)
        return cut.finish()


def audit_group(rows: Sequence[TableRow], beat: Beat) -> list[tuple[str, ...]]:
    """What each of some images, or what lies over it, carries beside its picture.

    See ``source_audit``.
    """
    found = []
    for row in rows:
        kinds = {
            kind for path in (row.path, *row.conditions.values()) for kind in audit_image(path)
        }
        # That something could not be looked at comes last.
        found.append(tuple(sorted(kinds, key=lambda kind: (kind == UNSEEN, kind))))
        beat(1)
    return found


def condition_problems(row: TableRow, beat: Beat) -> list[Problem]:
    """What the headers say against the images that lie over a tile. No pixel is read."""
    beat(1)
    try:
        with opened(row.path, FORMATS) as image:
            size = upright_size(image)
    except Exception:
        return []  # the tile itself is skipped later, by name
    problems: list[Problem] = []
    for modality, path in row.conditions.items():
        try:
            check_condition_file(path, modality, size)
        except ConditionError as error:
            problems.append((row.line, str(error)))
    return problems


def prepare_tile(
    path: Path,
    side_px: float | None,
    tile_px: int,
    conditions: Mapping[Modality, Path] | None = None,
) -> CutTile:
    """The image's central square, resampled, and the same square of what lies over it.

    Raises:
        SlideError: why it cannot be used.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with opened_picture(path) as image:
                shown = opaque(image)
    except SlideError:
        raise
    except Exception as error:  # Pillow answers damage with any kind
        raise SlideError(
            f"not a readable image ({', '.join(FORMATS)}), or far too large"
        ) from error
    whole = min(shown.size)
    side = float(whole) if side_px is None else side_px
    if side > whole:
        raise SlideError(f"{whole} pixels wide, but a tile at this resolution needs {side:.0f}")
    left, top = (shown.width - side) / 2, (shown.height - side) / 2
    box = (left, top, left + side, top + side)
    resized = shown.resize((tile_px, tile_px), Image.Resampling.HAMMING, box=box)
    pixels = np.asarray(resized)
    return CutTile(
        x=round(left),
        y=round(top),
        width=round(side),
        height=round(side),
        tissue_fraction=tissue_fraction(pixels),
        sharpness=sharpness(pixels),
        jpeg=encode_tile(pixels),
        conditions={
            modality: _condition(over, modality, tile_px, box, shown.size)
            for modality, over in (conditions or {}).items()
        },
    )


def _condition(
    path: Path,
    modality: Modality,
    tile_px: int,
    box: tuple[float, float, float, float],
    size: tuple[int, int],
) -> bytes:
    """Decoded, reduced to its condition and encoded again: nothing else of the file comes along."""
    try:
        stored_CHW = read_condition(path, modality, tile_px=tile_px, box=box, size=size)
    except ConditionError as error:
        raise SlideError(str(error)) from error
    return encode_condition(stored_CHW, modality)
