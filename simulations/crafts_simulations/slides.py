"""Writing slides that readers take for a scanner's: pyramidal tiled JPEG, with label and macro.

What comes out is what a hospital's ingest has to cope with: OpenSlide calls it ``aperio``, the
description and the label page carry a name that must not get further.
"""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tifffile
from PIL import Image, ImageDraw

from crafts_core.durable import sync

Pixels = npt.NDArray[np.uint8]

TILE_PX = 256
THUMBNAIL_PX = 256
LEVEL_FACTOR = 4
MIN_LEVEL_PX = 128
JPEG_QUALITY = 90
_REDUCED, _MACRO = 1, 9
"""TIFF subfile types by which readers know label and macro."""


def write_slide(
    path: Path, image_HWC: Pixels, *, mpp: float, label: str, quality: int = JPEG_QUALITY
) -> None:
    """Write one slide atomically. The same input gives the same bytes.

    Args:
        path: A ``.svs`` file.
        image_HWC: Level 0, RGB.
        mpp: Microns per level-0 pixel.
        label: Printed on the label page and put into the description, as scanners do.
        quality: JPEG quality of every page but the label.
    """
    jpeg: dict[str, Any] = {
        "photometric": "rgb",  # tifffile turns it into YCbCr itself
        "compression": "jpeg",
        "compressionargs": {"level": quality},
        "metadata": None,
        "software": False,
    }
    tiled = jpeg | {"tile": (TILE_PX, TILE_PX)}
    height, width = image_HWC.shape[:2]
    partial = path.with_name(f".{path.name}.partial")
    with tifffile.TiffWriter(partial, bigtiff=False) as writer:
        writer.write(image_HWC, description=_description(width, height, mpp, label), **tiled)
        thumbnail = _shrunk(image_HWC, max_px=THUMBNAIL_PX)
        rows, columns = thumbnail.shape[:2]
        # The thumbnail is the one page that must come second and must not be tiled.
        writer.write(
            thumbnail,
            description=f"Aperio Image Library v11\r\n{width}x{height} -> {columns}x{rows} ",
            rowsperstrip=rows,
            **jpeg,
        )
        for level in _pyramid(image_HWC):
            writer.write(level, description=_description(width, height, mpp, label), **tiled)
        writer.write(
            _label_page(label),
            description="Aperio Image Library v11\r\nlabel 200x200",
            subfiletype=_REDUCED,
            photometric="rgb",
            compression="lzw",
            rowsperstrip=200,
            metadata=None,
            software=False,
        )
        macro = _macro_page(image_HWC)
        writer.write(
            macro,
            description="Aperio Image Library v11\r\nmacro 400x160",
            subfiletype=_MACRO,
            rowsperstrip=macro.shape[0],
            **jpeg,
        )
    sync(partial)
    partial.rename(path)


def _description(width: int, height: int, mpp: float, label: str) -> str:
    return (
        f"Aperio Image Library v11.2.1 \r\n{width}x{height} (256x256) JPEG/RGB Q=90"
        f"|AppMag = {round(10 / mpp)}|MPP = {mpp:.4f}|Filename = {label}|User = simulation"
    )


def _pyramid(image_HWC: Pixels) -> list[Pixels]:
    """Box-reduced levels below level 0, while they are still worth a page."""
    levels = []
    level = Image.fromarray(image_HWC)
    while min(level.size) >= MIN_LEVEL_PX * LEVEL_FACTOR:
        level = level.resize(
            (level.width // LEVEL_FACTOR, level.height // LEVEL_FACTOR), Image.Resampling.BOX
        )
        levels.append(np.asarray(level))
    return levels


def _shrunk(image_HWC: Pixels, *, max_px: int) -> Pixels:
    image = Image.fromarray(image_HWC)
    image.thumbnail((max_px, max_px), Image.Resampling.BOX)
    return np.asarray(image)


def _label_page(label: str) -> Pixels:
    page = Image.new("RGB", (200, 200), "white")
    ImageDraw.Draw(page).text((10, 90), label, fill="black")
    return np.asarray(page)


def _macro_page(image_HWC: Pixels) -> Pixels:
    """The glass as the scanner's overview camera sees it: label left, tissue right."""
    page = Image.new("RGB", (400, 160), (238, 238, 240))
    page.paste((250, 250, 235), (0, 0, 120, 160))
    tissue = Image.fromarray(_shrunk(image_HWC, max_px=140))
    page.paste(tissue, (200, 10))
    return np.asarray(page)
