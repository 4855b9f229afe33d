"""The first look at a slide: what it is, where its tissue lies, which places may give a tile."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt
import simplejpeg

from crafts_client.ingest.pictures import (
    draw_overlay,
    picture_name,
    picture_paths,
    stain_densities,
    write_pictures,
)
from crafts_client.ingest.pool import Beat
from crafts_client.ingest.report import SourceFacts, Stain
from crafts_client.ingest.slides import MissingScaleError, Slide
from crafts_client.ingest.source_audit import audit_source
from crafts_client.ingest.store_update import Source
from crafts_client.ingest.table import TableRow
from crafts_client.ingest.tiling import Candidate, TilingOptions, candidates, grid, in_drawn_order
from crafts_client.ingest.tissue import Pixels, TissueMask, find_tissue
from crafts_core.tiles.records import encode_tile

_BUILD = 2
"""Goes up when the same slide gives other places or pixels: what an earlier build left half done is
then begun anew."""
THUMBNAIL_PX = 1024
THUMBNAIL_MPP = 4.0
"""Finer thumbnails of small slides only slow the filters down."""
WORTH_A_LOOK = 0.3
"""Part of the tissue: six of ten real thumbnails with marker ink have more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SlideJob:
    """All that a process needs to look at one slide."""

    source: Source
    survey: Path
    """Where the answer is kept."""
    options: TilingOptions
    pictures: Path | None

    @property
    def work_key(self) -> str:
        """Everything that decides what is kept of the slide while it is worked on."""
        return f"{self.source.key}-{_BUILD}"

    @property
    def picture(self) -> str:
        return picture_name(self.source.slide_id)

    @property
    def is_drawn(self) -> bool:
        """Whether its pictures are of this survey: an interrupted run, or a shard, drew them."""
        if self.pictures is None:
            return False
        _, overlay = picture_paths(self.pictures, self.picture)
        return overlay.exists() and overlay.stat().st_mtime_ns > self.survey.stat().st_mtime_ns


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """What the first look at one slide found."""

    places_N5: npt.NDArray[np.float64]
    """x, y, width, height and tissue fraction of each candidate, in the order of cutting."""
    rejected: dict[str, int]
    facts: SourceFacts
    frame: tuple[int, int, float, float]
    """What ``TissueMask`` needs beside its masks: their shape and scales."""
    masks: npt.NDArray[np.uint8]
    """Tissue, pen and fold, packed in bits."""
    thumbnail: npt.NDArray[np.uint8]
    """Bytes of a JPEG."""

    def places(self, start: int, stop: int) -> list[Candidate]:
        """Some of the candidates."""
        return [
            Candidate(x=int(x), y=int(y), width=width, height=height, tissue_fraction=tissue)
            for x, y, width, height, tissue in self.places_N5[start:stop].tolist()
        ]

    @classmethod
    def read(cls, path: Path, key: str) -> "Survey | None":
        """What was written for this key, or None."""
        try:
            with np.load(path, allow_pickle=False) as values:
                about: dict[str, Any] = json.loads(str(values["about"]))
                if about.pop("key") != key:
                    return None
                stain = about["facts"]["stain"]
                about["facts"]["stain"] = None if stain is None else Stain(**stain)
                arrays = {name: values[name] for name in ("places_N5", "masks", "thumbnail")}
                return cls(**about, **arrays)
        except (OSError, EOFError, ValueError, KeyError, TypeError, BadZipFile):
            return None

    def write(self, path: Path, key: str) -> None:
        """Keep it for whoever cuts and draws."""
        stain = self.facts.get("stain")
        facts = {**self.facts, "stain": None if stain is None else stain.model_dump()}
        about = {"key": key, "rejected": self.rejected, "facts": facts, "frame": self.frame}
        partial = path.with_suffix(".partial.npz")
        np.savez(
            partial,
            about=np.array(json.dumps(about)),
            places_N5=self.places_N5,
            masks=self.masks,
            thumbnail=self.thumbnail,
        )
        partial.rename(path)

    def mask(self) -> TissueMask:
        """As it was found."""
        height, width, scale_x, scale_y = self.frame
        bits = np.unpackbits(self.masks, axis=1, count=height * width).astype(np.bool_)
        tissue, pen, fold = bits.reshape(3, height, width)
        return TissueMask(
            is_tissue_HW=tissue, is_pen_HW=pen, is_fold_HW=fold, scale_x=scale_x, scale_y=scale_y
        )


def missing_scale(row: TableRow, beat: Beat) -> str | None:
    """What the table must say about a slide that does not know its scale.

    Raises:
        SlideError: it cannot be opened at all.
    """
    try:
        with Slide.open(row.path, mpp=row.mpp):
            return None
    except MissingScaleError as error:
        return str(error)
    finally:
        beat(1)


def survey_slide(job: SlideJob, beat: Beat) -> Survey:
    """Find a slide's tissue, once.

    Raises:
        SlideError: why nothing at all can come from it.
    """
    survey = Survey.read(job.survey, job.work_key)
    if survey is None:
        with Slide.open(job.source.row.path, mpp=job.source.row.mpp) as slide:
            survey = _look(slide, job, beat)
        survey.write(job.survey, job.work_key)
    beat(1)
    # The pictures stay on disk: the others need what is small.
    nothing = np.zeros(0, dtype=np.uint8)
    return replace(survey, masks=nothing, thumbnail=nothing)


def draw_slide(job: tuple[SlideJob, tuple[int, ...]], beat: Beat) -> None:
    """Draw a slide's pictures, once it is known which of its places gave a tile."""
    slide, kept = job
    survey = Survey.read(slide.survey, slide.work_key)
    if survey is not None and slide.pictures is not None:
        thumbnail: Pixels = simplejpeg.decode_jpeg(survey.thumbnail)
        is_kept_N = np.zeros(len(survey.places_N5), dtype=np.bool_)
        is_kept_N[list(kept)] = True
        overlay = draw_overlay(thumbnail, survey.mask(), survey.places_N5[:, :4], is_kept_N)
        write_pictures(slide.pictures, slide.picture, thumbnail, overlay)
    beat(1)


def _look(slide: Slide, job: SlideJob, beat: Beat) -> Survey:
    options = job.options
    frame_N4 = grid(slide, options)
    thumbnail = slide.thumbnail(max_px=THUMBNAIL_PX, min_mpp=THUMBNAIL_MPP, beat=lambda: beat(0))
    thumbnail_mpp = slide.mpp_x * slide.size_px[0] / thumbnail.shape[1]
    mask = find_tissue(
        thumbnail,
        mpp=thumbnail_mpp,
        slide_px=slide.size_px,
        method=options.tissue,
        seeks_ink=options.max_pen < 1,
    )
    places, rejected = candidates(frame_N4, mask, options)
    if options.max_tiles_per_slide is not None:
        places = in_drawn_order(places, bytes.fromhex(job.source.slide_id))
    place_N5 = [(p.x, p.y, p.width, p.height, p.tissue_fraction) for p in places]
    facts = SourceFacts(
        scanner=slide.scanner,
        reader=slide.reader,
        mpp=slide.mpp_x,
        size_px=slide.size_px,
        identifiers=audit_source(job.source.row.path, slide),
        damaged_levels=len(slide.damaged_levels),
        stain=stain_densities(thumbnail, mask.is_tissue_HW),
        picture=None if job.pictures is None else job.picture,
        warnings=_warnings(mask),
    )
    masks = [mask.is_tissue_HW, mask.is_pen_HW, mask.is_fold_HW]
    return Survey(
        places_N5=np.array(place_N5, dtype=np.float64).reshape(-1, 5),
        rejected=rejected,
        facts=facts,
        frame=(*mask.is_tissue_HW.shape, mask.scale_x, mask.scale_y),
        masks=np.packbits([flat.ravel() for flat in masks], axis=1),
        thumbnail=np.frombuffer(
            encode_tile(thumbnail) if job.pictures is not None else b"", dtype=np.uint8
        ),
    )


def _warnings(mask: TissueMask) -> tuple[str, ...]:
    """What a person should look at before such tiles train."""
    if mask.is_stained_like_ink:
        return ("nearly all of it has the colours of marker ink: taken for a stain, and kept",)
    if mask.ink_coloured > WORTH_A_LOOK:
        return (
            f"{mask.ink_coloured:.0%} of its tissue was taken for marker ink; if that is a stain, "
            "ingest it with --keep pen",
        )
    return ()
