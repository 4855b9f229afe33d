"""What one tile is, and how its pixels become bytes.

Shape letters: N tiles, H and W pixels.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import simplejpeg

from crafts_core.errors import CraftsError

JPEG_QUALITY = 96
"""The least at which libjpeg-turbo takes its accurate transform; 95 loses twice as much."""

ROW_SCHEMA = pa.schema(
    [
        ("tile_id", pa.string()),
        ("patient", pa.string()),
        ("case", pa.string()),
        ("slide", pa.string()),
        ("x", pa.int64()),
        ("y", pa.int64()),
        ("level0_width", pa.float64()),
        ("level0_height", pa.float64()),
        ("mpp", pa.float64()),
        ("shard", pa.string()),
        ("offset", pa.int64()),
        ("length", pa.int32()),
        ("nuclei_offset", pa.int64()),
        ("nuclei_length", pa.int32()),
        ("fluorescence_offset", pa.int64()),
        ("fluorescence_length", pa.int32()),
        ("caption", pa.string()),
        ("label", pa.string()),
        ("tissue_fraction", pa.float32()),
        ("sharpness", pa.float32()),
    ]
)
"""One row per tile, with its caption; ``shard`` is the shard's name. A tile's conditions lie in the
same shard; length 0 says that there is none."""
INDEX_SCHEMA = pa.schema(
    [
        pa.field("caption_id", pa.int32()) if field.name == "caption" else field
        for field in ROW_SCHEMA
    ]
)
"""The same with the caption's place among the distinct captions; rows of one patient follow each
other."""


class TileStoreError(CraftsError):
    """A tile store or its cache is missing, unfinished, damaged or made for something else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TileRecord:
    """One tile without its pixels. Every id is a pseudonym; nothing here names a slide.

    ``x`` and ``y`` are the top left corner in the slide's level-0 pixels, ``level0_width`` and
    ``level0_height`` the exact (fractional) extent there.
    """

    tile_id: str
    patient: str
    case: str
    slide: str
    x: int
    y: int
    level0_width: float
    level0_height: float
    mpp: float | None
    caption: str
    label: str
    tissue_fraction: float
    sharpness: float


def encode_tile(image_HWC: npt.NDArray[np.uint8]) -> bytes:
    """JPEG bytes at quality 96 with full-resolution colour: small tiles cannot spare any."""
    jpeg: bytes = simplejpeg.encode_jpeg(
        np.ascontiguousarray(image_HWC), quality=JPEG_QUALITY, colorsubsampling="444"
    )
    return jpeg


def decode_tile(jpeg: bytes, tile_px: int) -> npt.NDArray[np.uint8]:
    """The (tile_px, tile_px, 3) pixels of one tile.

    Raises:
        TileStoreError: the bytes are not a JPEG of that size.
    """
    try:
        # The header first: a forged size would be allocated.
        height, width, *_ = simplejpeg.decode_jpeg_header(jpeg)
    except ValueError as error:
        raise TileStoreError(f"a stored tile is not a readable JPEG: {error}") from error
    if (height, width) != (tile_px, tile_px):
        raise TileStoreError(
            f"a stored tile has {height}x{width} pixels, expected {tile_px}x{tile_px}"
        )
    try:
        pixels_HWC: npt.NDArray[np.uint8] = simplejpeg.decode_jpeg(jpeg)
    except ValueError as error:
        raise TileStoreError(f"a stored tile is not a readable JPEG: {error}") from error
    return pixels_HWC
