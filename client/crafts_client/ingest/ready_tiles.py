"""Preparing tiles that somebody else has cut: one image file, one tile."""

import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image

from crafts_client.ingest.errors import SlideError
from crafts_client.ingest.parts import CutTile
from crafts_client.ingest.table import TableRow
from crafts_client.ingest.tissue import sharpness, tissue_fraction
from crafts_core.tiles.records import encode_tile

FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "WEBP")


@dataclass(frozen=True, slots=True, kw_only=True)
class TileJob:
    """All that a process needs to prepare one ready tile."""

    row: TableRow
    tile_px: int
    side_px: float | None
    """Side of the central square that becomes the tile, in the image's pixels; None: all of it."""


def prepare_tile(job: TileJob) -> CutTile | SlideError:
    """The image's central square, resampled; or why it cannot be used."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(job.row.path, formats=FORMATS) as image:
                opaque = _opaque(image)
    except (
        OSError,
        ValueError,
        SyntaxError,  # what Pillow raises for a broken PNG
        Image.DecompressionBombError,
        Image.DecompressionBombWarning,
    ):
        return SlideError(f"not a readable image ({', '.join(FORMATS)}), or far too large")
    whole = min(opaque.size)
    side = float(whole) if job.side_px is None else job.side_px
    if side > whole:
        return SlideError(f"{whole} pixels wide, but a tile at this resolution needs {side:.0f}")
    left, top = (opaque.width - side) / 2, (opaque.height - side) / 2
    resized = opaque.resize(
        (job.tile_px, job.tile_px),
        Image.Resampling.HAMMING,
        box=(left, top, left + side, top + side),
    )
    pixels = np.asarray(resized)
    return CutTile(
        x=round(left),
        y=round(top),
        width=round(side),
        height=round(side),
        tissue_fraction=tissue_fraction(pixels),
        sharpness=sharpness(pixels),
        jpeg=encode_tile(pixels),
    )


def _opaque(image: Image.Image) -> Image.Image:
    """RGB, with transparency over white."""
    if "A" not in image.getbands() and "transparency" not in image.info:
        return image.convert("RGB")
    layered = image.convert("RGBA")
    backdrop = Image.new("RGB", layered.size, "white")
    backdrop.paste(layered, mask=layered.getchannel("A"))
    return backdrop
