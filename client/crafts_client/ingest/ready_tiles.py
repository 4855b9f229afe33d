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


def prepare_tile(job: TileJob) -> CutTile | SlideError:
    """The whole image, cropped to its central square and resampled; or why it cannot be used."""
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
    side = min(opaque.size)
    left, top = (opaque.width - side) / 2, (opaque.height - side) / 2
    resized = opaque.resize(
        (job.tile_px, job.tile_px),
        Image.Resampling.HAMMING,
        box=(left, top, left + side, top + side),
    )
    pixels = np.asarray(resized)
    return CutTile(
        x=0,
        y=0,
        width=side,
        height=side,
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
