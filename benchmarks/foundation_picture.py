"""A picture of what a foundation draws: types of cancer beside real tiles of the open cases.

    python benchmarks/foundation_picture.py TABLE OUT.jpg [--foundation DIR]

TABLE as for ``foundation build``. For each type an open tile, of a case that was held out where
there is one, and three samples under the type's caption, drawn as ``crafts sample`` draws. Nothing
is chosen by looking: tiles are the first by the hash of their file's name, seeds are 0, 1, 2.
"""

import argparse
import contextlib
import hashlib
from dataclasses import asdict
from pathlib import Path

import numpy as np
from PIL import Image

from crafts_core.evaluation.encoder import Images
from crafts_core.foundation import embedded_path, load
from crafts_core.foundation_build.tiles_table import (
    NoTissueError,
    TableRow,
    read_open_tiles,
    read_table,
)
from crafts_core.sampler_config import SamplerConfig
from crafts_core.sampling import contact_sheet, sample_images
from crafts_core.vocabulary import cancer_type, compose_caption

TYPES = ("BRCA", "COAD", "GBM", "HNSC", "LUSC", "OV", "PAAD", "PRAD", "SARC", "STAD")
SEEDS = (0, 1, 2)


def main() -> None:
    """Write the picture, and print where each tile is from."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--foundation", type=Path, default=embedded_path())
    args = parser.parse_args()
    foundation = load(args.foundation, device="cpu")
    manifest = foundation.manifest
    table = read_table(args.table)
    real = [first_tile(table, code, manifest.tile_px, manifest.mpp) for code in TYPES]
    prompts = [compose_caption(cancer_type(code), None) for code in TYPES]
    how = asdict(SamplerConfig())
    drawn = [sample_images(foundation.generator, prompts, seed=seed, **how) for seed in SEEDS]
    tiles = np.concatenate([np.stack([tile_HWC for _, tile_HWC in real]), *drawn])
    labels = [*TYPES, *[""] * (len(SEEDS) * len(TYPES))]
    sheet: Image.Image = contact_sheet(tiles, columns=len(TYPES), labels=labels)
    sheet.save(args.out, quality=88)
    for code, (row, _) in zip(TYPES, real, strict=True):
        print(f"{code}: {row.case} ({row.split}), {row.source}, {row.licence}")


def first_tile(
    table: tuple[TableRow, ...], code: str, tile_px: int, mpp: float
) -> tuple[TableRow, Images]:
    """Of a held-out case if one shows the type; images that are smaller than a tile give none."""
    of_type = sorted(
        (row for row in table if row.type == code),
        key=lambda row: (
            row.split != "held-out",
            hashlib.sha256(row.file.name.encode()).hexdigest(),
        ),
    )
    for row in of_type:
        with contextlib.suppress(NoTissueError):
            return row, read_open_tiles([row], tile_px=tile_px, mpp=mpp).image_NHWC[0]
    raise NoTissueError(f"no image of the table gives a tile of {code}")


if __name__ == "__main__":
    main()
