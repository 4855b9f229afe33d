"""The first look at a slide: what it is, where its tissue lies, which places may give a tile."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from crafts_client.ingest.pool import Beat
from crafts_client.ingest.slides import MissingScaleError, Slide
from crafts_client.ingest.store_update import Source
from crafts_client.ingest.table import TableRow
from crafts_client.ingest.tiling import Candidate, TilingOptions, candidates, grid, in_drawn_order
from crafts_client.ingest.tissue import find_tissue

THUMBNAIL_PX = 1024
THUMBNAIL_MPP = 4.0
"""Finer thumbnails of small slides only slow the filters down."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SlideJob:
    """All that a process needs to look at one slide."""

    source: Source
    survey: Path
    """Where the answer is kept."""
    options: TilingOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """What the first look at one slide found."""

    places_N5: npt.NDArray[np.float64]
    """x, y, width, height and tissue fraction of each candidate, in the order of cutting."""
    rejected: dict[str, int]

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
                if about["key"] != key:
                    return None
                return cls(places_N5=values["places"], rejected=about["rejected"])
        except (OSError, ValueError, KeyError, BadZipFile):
            return None

    def write(self, path: Path, key: str) -> None:
        """Keep it for whoever cuts."""
        partial = path.with_suffix(".partial.npz")
        about = json.dumps({"key": key, "rejected": self.rejected})
        np.savez(partial, places=self.places_N5, about=np.array(about))
        partial.rename(path)


def missing_scale(row: TableRow, beat: Beat) -> str | None:
    """What the table must say about a slide that does not know its scale.

    Raises:
        SlideError: it cannot be opened at all.
    """
    try:
        with Slide.open(row.path, mpp=row.mpp):
            return None
    except MissingScaleError as error:
        return f"line {row.line}: {row.name}: {error}"
    finally:
        beat(1)


def survey_slide(job: SlideJob, beat: Beat) -> Survey:
    """Find a slide's tissue, once.

    Raises:
        SlideError: why nothing at all can come from it.
    """
    survey = Survey.read(job.survey, job.source.key)
    if survey is None:
        with Slide.open(job.source.row.path, mpp=job.source.row.mpp) as slide:
            survey = _look(slide, job)
        survey.write(job.survey, job.source.key)
    beat(1)
    return survey


def _look(slide: Slide, job: SlideJob) -> Survey:
    options = job.options
    frame_N4 = grid(slide, options)
    thumbnail = slide.thumbnail(max_px=THUMBNAIL_PX, min_mpp=THUMBNAIL_MPP)
    thumbnail_mpp = slide.mpp_x * slide.size_px[0] / thumbnail.shape[1]
    mask = find_tissue(thumbnail, mpp=thumbnail_mpp, slide_px=slide.size_px)
    places, rejected = candidates(frame_N4, mask, options)
    if options.max_tiles_per_slide is not None:
        places = in_drawn_order(places, bytes.fromhex(job.source.slide_id))
    place_N5 = [(p.x, p.y, p.width, p.height, p.tissue_fraction) for p in places]
    return Survey(places_N5=np.array(place_N5, dtype=np.float64).reshape(-1, 5), rejected=rejected)
