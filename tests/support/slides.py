"""Small slides as real files, and the tables that go with them."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import tifffile

from crafts_simulations.slides import write_slide

Pixels = npt.NDArray[np.uint8]
GLASS = (244, 243, 245)
REAL_DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"


def tissue_image(side_px: int = 512, *, seed: int = 0, margin: int = 96) -> Pixels:
    """Purple dots on pink in the middle of glass: enough for every filter to say tissue."""
    rng = np.random.default_rng(seed)
    image = np.full((side_px, side_px, 3), GLASS, dtype=np.uint8)
    inside = slice(margin, side_px - margin)
    image[inside, inside] = (225, 160, 200)
    y, x = np.mgrid[-5:6, -5:6]
    dot = y**2 + x**2 < 25
    for centre_y, centre_x in rng.integers(margin + 6, side_px - margin - 6, (150, 2)):
        around = (slice(centre_y - 5, centre_y + 6), slice(centre_x - 5, centre_x + 6))
        image[around][dot] = (90, 50, 130)
    return image


def write_tissue_slide(
    path: Path, *, seed: int = 0, mpp: float = 0.5, label: str = "label"
) -> Path:
    """A 512 px slide at ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_slide(path, tissue_image(seed=seed), mpp=mpp, label=label)
    return path


def write_table(path: Path, header: str, rows: Iterable[str]) -> Path:
    """A comma separated table."""
    path.write_text("\n".join((header, *rows)) + "\n", encoding="utf-8")
    return path


def damage_tile(path: Path, number: int, *, page: int = 0) -> None:
    """Overwrite the data of one JPEG tile with noise: of level 0, or of another page."""
    with tifffile.TiffFile(path) as file:
        found = file.pages[page]
        offset, length = found.dataoffsets[number], found.databytecounts[number]
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(np.random.default_rng(0).bytes(length))
