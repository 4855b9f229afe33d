"""A table of open images: two licences, a case a row, and one row that is held out."""

from pathlib import Path

import numpy as np
from PIL import Image

COLUMNS = "file\tcase\torgan\tmpp\tlicence\tsource\tsplit"


def open_table(folder: Path, *, num_cases: int = 4, side_px: int = 64, mpp: float = 1.0) -> Path:
    """Coloured noise, each case in a stain of its own; two tiles of 32 px on each side."""
    rng = np.random.default_rng(11)
    (folder / "images").mkdir(parents=True)
    lines = [COLUMNS]
    for case in range(num_cases + 1):
        low = 40 + 20 * np.array([case % 5, 0, 2])
        grain = rng.integers(0, 110, (side_px // 8, side_px // 8, 1))
        pixels = np.kron(low + grain, np.ones((8, 8, 1))).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{case}.png")
        split = "held-out" if case == num_cases else "build"
        licence, source = (("CC0", "Archive"), ("CC BY 4.0", "Atlas"))[case % 2]
        lines.append(f"images/{case}.png\tcase-{case}\tlung\t{mpp}\t{licence}\t{source}\t{split}")
    table = folder / "open.tsv"
    table.write_text("\n".join(lines) + "\n")
    return table
