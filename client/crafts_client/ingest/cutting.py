"""Cutting one slide: mask, grid, read, judge. Runs in a process of its own."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from crafts_client.ingest.errors import SlideError
from crafts_client.ingest.parts import CutTile, read_part_counts, write_part
from crafts_client.ingest.report import SourceOutcome
from crafts_client.ingest.slides import Slide
from crafts_client.ingest.table import TableRow
from crafts_client.ingest.tiling import (
    Candidate,
    TilingOptions,
    candidates,
    grid,
    in_drawn_order,
)
from crafts_client.ingest.tissue import Pixels, find_tissue, sharpness, tissue_fraction
from crafts_core.tiles.records import encode_tile

THUMBNAIL_PX = 1024
THUMBNAIL_MPP = 4.0
"""Finer thumbnails of small slides only slow the filters down."""
MAX_UNREADABLE = 0.2
"""A slide with more damaged places than this part is not trusted at all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SlideJob:
    """All that a process needs to cut one slide."""

    row: TableRow
    slide_id: str
    part: Path
    options: TilingOptions


def cut_slide(job: SlideJob) -> SourceOutcome:
    """Commit the part of one slide, unless it is there, and say what became of the slide."""
    try:
        if not job.part.exists():
            with Slide.open(job.row.path, mpp=job.row.mpp) as slide:
                tiles, rejected = _cut(slide, bytes.fromhex(job.slide_id), job.options)
            write_part(job.part, tiles, rejected)
    except SlideError as error:
        return SourceOutcome.of(job.row, num_tiles=0, rejected={}, skipped=str(error))
    num_tiles, rejected = read_part_counts(job.part)
    skipped = None if num_tiles else "no place on it has enough clean tissue"
    return SourceOutcome.of(job.row, num_tiles=num_tiles, rejected=rejected, skipped=skipped)


def _cut(slide: Slide, key: bytes, options: TilingOptions) -> tuple[list[CutTile], dict[str, int]]:
    frame_N4 = grid(slide, options)
    thumbnail = slide.thumbnail(max_px=THUMBNAIL_PX, min_mpp=THUMBNAIL_MPP)
    thumbnail_mpp = slide.mpp_x * slide.size_px[0] / thumbnail.shape[1]
    mask = find_tissue(thumbnail, mpp=thumbnail_mpp, slide_px=slide.size_px)
    places, unwanted = candidates(frame_N4, mask, options)
    rejected = Counter(unwanted)
    limit = options.max_tiles_per_slide
    if limit is not None:
        places = in_drawn_order(places, key)
    tiles: list[CutTile] = []
    for number, place in enumerate(places):
        if len(tiles) == limit:
            rejected["not_drawn"] = len(places) - number
            break
        try:
            pixels = slide.read(place.box, (options.tile_px, options.tile_px))
        except SlideError:
            rejected["unreadable"] += 1
            continue
        sharp = sharpness(pixels)
        if tissue_fraction(pixels) < options.min_coloured:
            rejected["background"] += 1
        elif sharp < options.min_sharpness:
            rejected["blurred"] += 1
        else:
            tiles.append(_cut_tile(place, pixels, sharp))
    if rejected["unreadable"] > MAX_UNREADABLE * len(places):
        raise SlideError(f"damaged: {rejected['unreadable']} of its tiles cannot be decoded")
    return sorted(tiles, key=lambda tile: (tile.y, tile.x)), dict(rejected)


def _cut_tile(place: Candidate, pixels: Pixels, sharp: float) -> CutTile:
    return CutTile(
        x=place.x,
        y=place.y,
        width=place.width,
        height=place.height,
        tissue_fraction=place.tissue_fraction,
        sharpness=sharp,
        jpeg=encode_tile(pixels),
    )
