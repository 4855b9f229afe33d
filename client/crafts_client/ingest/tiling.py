"""Where a slide is cut: a grid whose tiles all have exactly the wanted scale."""

import hashlib
import hmac
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import numpy.typing as npt

from crafts_client.ingest.choices import Artefact, TissueMethod
from crafts_client.ingest.errors import SlideError
from crafts_client.ingest.slides import MAX_UPSAMPLING, Box, Slide
from crafts_client.ingest.tissue import TissueMask

MAX_DRIFT_PX = 0.5
"""Over a whole slide, in level-0 pixels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TilingOptions:
    """What a tile is and which are wanted. Part of what makes two stores equal."""

    tile_px: int
    mpp: float
    min_tissue: float = 0.5
    """Smallest part of a tile that must be tissue on the thumbnail's mask, small holes filled."""
    min_coloured: float = 0.1
    """Smallest part of a tile's own pixels that must be coloured: no tile is all lumen."""
    tissue: TissueMethod = TissueMethod.OTSU
    """How tissue is told from glass, on the thumbnail and in a tile."""
    max_pen: float = 0.05
    """Largest part of a tile that may be ink; 1 looks for none."""
    max_fold: float = 0.1
    """Largest part of a tile that may be folded tissue."""
    min_sharpness: float = 30.0
    """Smallest variance of the Laplacian of the green channel, at the tile's own scale.

    On four real slides at 1 micron per pixel the least sharp tile measured 487; blurred by two of
    their pixels, tiles of three of them at most 25, of the fourth, whose JPEG is coarse, 61.
    """
    copy_stored_tiles: bool = True
    """Take a slide's own JPEG where it has just the tile that is wanted."""
    max_tiles_per_slide: int | None = None
    """None keeps every good tile."""

    def keeping(self, artefacts: Collection[Artefact]) -> Self:
        """The same without the filters for these."""
        return replace(
            self,
            max_pen=1.0 if Artefact.PEN in artefacts else self.max_pen,
            max_fold=1.0 if Artefact.FOLD in artefacts else self.max_fold,
            min_sharpness=0.0 if Artefact.BLURRED in artefacts else self.min_sharpness,
        )

    def __post_init__(self) -> None:
        if self.tile_px < 8 or not self.mpp > 0:
            raise ValueError(f"expected tile_px >= 8 and mpp > 0, got {self.tile_px}, {self.mpp}")
        if self.max_tiles_per_slide is not None and self.max_tiles_per_slide < 1:
            raise ValueError(f"expected max_tiles_per_slide >= 1, got {self.max_tiles_per_slide}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A place on the grid that has enough tissue, in level-0 pixels."""

    x: int
    y: int
    width: float
    height: float
    tissue_fraction: float

    @property
    def box(self) -> Box:
        return self.x, self.y, self.width, self.height


def grid(slide: Slide, options: TilingOptions) -> npt.NDArray[np.float64]:
    """Frames (x, y, width, height) side by side from the top left, shape (N, 4).

    Width and height are fractional, so the scale is exact (``tile_extent``); corners are rounded
    down to whole pixels, which moves a tile by less than one level-0 pixel.

    Raises:
        SlideError: the slide is coarser than the tiles should be.
    """
    width, height = tile_extent(slide, options.tile_px, options.mpp)
    coarsest = max(slide.mpp_x, slide.mpp_y)
    if coarsest > options.mpp * MAX_UPSAMPLING:
        raise SlideError(f"its {coarsest:g} microns per pixel are coarser than {options.mpp:g}")
    x = _corners(slide.size_px[0], width)
    y = _corners(slide.size_px[1], height)
    grid_y, grid_x = (axis.ravel() for axis in np.meshgrid(y, x, indexing="ij"))
    return np.stack(
        [grid_x, grid_y, np.full_like(grid_x, width), np.full_like(grid_y, height)], axis=1
    )


def tile_extent(slide: Slide, tile_px: int, mpp: float) -> tuple[float, float]:
    """Width and height of a tile in level-0 pixels: exact, or a level's own where that is as good.

    A scanner's microns per pixel have few digits: where a level has 256 pixels for 255.99999 that
    are wanted, those are taken. They are as good while all tiles of a row or column together are
    off by less than half a pixel, either way: less than what whole corners cost.
    """
    downsamples = (level.downsample for level in slide.source.levels)
    own = {tile_px * downsample for downsample in downsamples if downsample == round(downsample)}
    width, height = (
        _own_or_exact(own, tile_px * mpp / slide_mpp, length)
        for slide_mpp, length in zip((slide.mpp_x, slide.mpp_y), slide.size_px, strict=True)
    )
    return width, height


def _own_or_exact(own: Collection[float], exact: float, length: int) -> float:
    near = min(own, key=lambda extent: abs(extent - exact))
    return near if abs(exact - near) * (length / near) < MAX_DRIFT_PX else exact


def candidates(
    frame_N4: npt.NDArray[np.float64], mask: TissueMask, options: TilingOptions
) -> tuple[list[Candidate], dict[str, int]]:
    """Frames with enough tissue, no pen and no fold; how many others there were, by reason."""
    tissue_N, pen_N, fold_N = mask.fractions(frame_N4)
    has_tissue_N = tissue_N >= options.min_tissue
    is_pen_N = pen_N > options.max_pen
    is_fold_N = has_tissue_N & ~is_pen_N & (fold_N > options.max_fold)
    is_kept_N = has_tissue_N & ~is_pen_N & ~is_fold_N
    rejected = {
        "pen": int(is_pen_N.sum()),
        "fold": int(is_fold_N.sum()),
        "background": int((~has_tissue_N & ~is_pen_N).sum()),
    }
    kept = [
        Candidate(x=int(x), y=int(y), width=width, height=height, tissue_fraction=float(tissue))
        for (x, y, width, height), tissue in zip(
            frame_N4[is_kept_N].tolist(),
            tissue_N[is_kept_N],
            strict=True,
        )
    ]
    return kept, rejected


def in_drawn_order(places: list[Candidate], key: bytes) -> list[Candidate]:
    """The places in a keyed pseudo-random order: a function of this slide alone.

    Taking the first so many is a fair sample of the slide that does not depend on other slides,
    on the run, or on anything drawn at run time.
    """

    def rank(place: Candidate) -> bytes:
        return hmac.digest(key, f"{place.x},{place.y}".encode(), hashlib.sha256)

    return sorted(places, key=rank)


def _corners(length: int, step: float) -> npt.NDArray[np.float64]:
    """Whole-pixel starts of the tiles that fit; lacking a hundredth of a pixel still fits."""
    # 64 * 0.3 / 0.1 is a hair below 192.
    corners: npt.NDArray[np.float64] = np.floor(
        np.arange(int((length + 0.01) / step)) * step + 1e-6
    )
    return corners
