"""Cutting a stretch of a slide into one shard: read, judge, keep. Runs in a process of its own."""

from dataclasses import dataclass
from pathlib import Path

from crafts_client.ingest.deidentify import Salt
from crafts_client.ingest.errors import SlideError
from crafts_client.ingest.lossless import TileCopier, tile_copier
from crafts_client.ingest.pool import Beat
from crafts_client.ingest.shard_cut import CutTile, Shard, ShardCut, cut_shard
from crafts_client.ingest.slides import Pixels, Slide
from crafts_client.ingest.survey import SlideJob, Survey, survey_slide
from crafts_client.ingest.tiling import Candidate
from crafts_client.ingest.tissue import judge
from crafts_core.tiles.records import TileStoreError, decode_tile, encode_tile

MAX_UNREADABLE = 0.2
"""A slide with more damaged places than this part is not trusted at all."""
PLACES_PER_SHARD = 2048
"""So that several processes can work on one slide, and a shard stays handy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CutJob:
    """A stretch of the places of one slide."""

    slide: SlideJob
    store: Path
    salt: Salt
    shard: str
    start: int
    stop: int
    num_places: int
    """Of the whole slide."""


def cut_jobs(slide: SlideJob, survey: Survey, store: Path, salt: Salt) -> list[CutJob]:
    """Stretches of equal length; a limited number of tiles comes from one stretch."""
    num_places = len(survey.places_N5)
    length = PLACES_PER_SHARD if slide.options.max_tiles_per_slide is None else max(num_places, 1)
    return [
        CutJob(
            slide=slide,
            store=store,
            salt=salt,
            shard=f"{slide.source.key[:32]}-{number:04d}",
            start=start,
            stop=min(start + length, num_places),
            num_places=num_places,
        )
        for number, start in enumerate(range(0, num_places, length))
    ]


def cut_stretch(job: CutJob, beat: Beat) -> Shard:
    """Go on with a shard until all its places are done.

    Raises:
        SlideError: too much of the slide is damaged.
    """
    with cut_shard(job.store, job.shard, job.slide.work_key) as cut:
        beat(cut.next_place)
        if not cut.is_finished:
            survey = survey_slide(job.slide, lambda _: None)
            places = survey.places(job.start, job.stop)
            row = job.slide.source.row
            with Slide.open(row.path, mpp=row.mpp) as slide:
                options = job.slide.options
                copier = (
                    tile_copier(row.path, slide, options.tile_px, options.mpp)
                    if options.copy_stored_tiles
                    else None
                )
                for place in places[cut.next_place :]:
                    _cut_place(slide, copier, place, job, cut)
                    beat(1)
        return cut.finish()


def _cut_place(
    slide: Slide, copier: TileCopier | None, place: Candidate, job: CutJob, cut: ShardCut
) -> None:
    options = job.slide.options
    if cut.num_tiles == options.max_tiles_per_slide:
        cut.reject("not_drawn")
        return
    try:
        pixels, jpeg = _read_place(slide, copier, place, options.tile_px)
    except SlideError:
        cut.reject("unreadable")
        check_damage(cut.num_rejected("unreadable"), job.num_places)
        return
    quality = judge(pixels, options.tissue)
    if quality.tissue_fraction < options.min_coloured:
        cut.reject("background")
    elif quality.sharpness < options.min_sharpness:
        cut.reject("blurred")
    else:
        tile = CutTile(
            x=place.x,
            y=place.y,
            width=place.width,
            height=place.height,
            tissue_fraction=place.tissue_fraction,
            sharpness=quality.sharpness,
            jpeg=jpeg if jpeg is not None else encode_tile(pixels),
            is_copy=jpeg is not None,
        )
        cut.keep(job.salt.tile_id(job.slide.source.slide_id, place.x, place.y), tile)


def _read_place(
    slide: Slide, copier: TileCopier | None, place: Candidate, tile_px: int
) -> tuple[Pixels, bytes | None]:
    """Pixels, and the file's own JPEG where it has just this tile."""
    jpeg = copier.copy(place.x, place.y) if copier is not None else None
    if jpeg is not None:
        try:
            return decode_tile(jpeg, tile_px), jpeg
        except TileStoreError:  # damaged: OpenSlide says the same, or knows better
            pass
    return slide.read(place.box, (tile_px, tile_px)), None


def check_damage(num_unreadable: int, num_places: int) -> None:
    """Refuse a slide that is damaged in too many places.

    Raises:
        SlideError: it is.
    """
    if num_unreadable > MAX_UNREADABLE * num_places:
        raise SlideError(f"damaged: {num_unreadable} of its tiles cannot be decoded")
