"""What public foundations draw of tissue that they have not seen, beside what a sceptic would try.

    python benchmarks/foundation_table.py --foundation earlier=DIR --foundation embedded=DIR \
        --tiles open-tissue.tsv --encoder embedded --encoder imagenet > open.md

``--tiles`` is a table as ``crafts-server foundation build`` takes it, or the folder of LC25000
(tiles, ``labels.tsv``; a source group is a patient, one in four is held out). Held-out rows are
measured on; the others teach the judges and the colour maps. Tiles and images of every foundation
are cut to the middle square that all have, at one scale, so that one ruler sees them all.
"""

import argparse
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from crafts_core.command_line import say
from crafts_core.evaluation.baselines import (
    ArmImages,
    recolour,
    recolour_by_caption,
    reconstruct,
)
from crafts_core.evaluation.encoder import Images, load_encoder
from crafts_core.evaluation.evaluate import EvaluationConfig, Evaluator
from crafts_core.evaluation.real_tiles import RealTiles, middle
from crafts_core.evaluation.table import COLUMNS, cell, gate_text
from crafts_core.foundation import Foundation, load
from crafts_core.foundation_build.tiles_table import TableRow, read_open_tiles, read_table
from crafts_core.sampling import sample_images
from crafts_core.vocabulary import label_caption

LC25000_MPP = 0.58
"""Nominal: the files do not say it; 224 px then hold one tile of 128 px at 1 micron a pixel."""


@dataclass(frozen=True, kw_only=True)
class Sides:
    """Real tiles of both sides of a split, cut to what all foundations draw."""

    training: RealTiles
    held_out: RealTiles
    whole_NHWC: Images
    """The held-out tiles uncut."""


def table_rows(path: Path) -> tuple[TableRow, ...]:
    """Rows of a table, or of LC25000 split by the hash of a source group."""
    return read_table(path) if path.is_file() else tuple(_lc25000(path))


def _lc25000(folder: Path) -> Iterator[TableRow]:
    header, *lines = (folder / "labels.tsv").read_text().splitlines()
    for line in lines:
        values = dict(zip(header.split("\t"), line.split("\t"), strict=True))
        group = values["source_tile_group"]
        is_held_out = hashlib.sha256(group.encode()).digest()[0] % 4 == 0
        yield TableRow(
            file=folder / values["file"],
            case=group,
            caption=label_caption(values["class"]).removeprefix("H&E, "),
            mpp=LC25000_MPP,
            licence="see its README",
            split="held-out" if is_held_out else "build",
        )


def sides_of(
    rows: Sequence[TableRow], *, tile_px: int, mpp: float, side_px: int, most: int
) -> Sides:
    """Tiles of both sides, each of the class that its caption names."""
    training, held_out = (
        _side([row for row in rows if row.split == split], tile_px, mpp, most)
        for split in ("build", "held-out")
    )
    cut_tiles = held_out.in_the_middle(side_px)
    # The evaluator orders tiles, and numbers patients, by what it sees: so do all rows.
    ordered = cut_tiles.in_order_of_content()
    place = {tile.tobytes(): row for row, tile in enumerate(cut_tiles.images_NHWC)}
    return Sides(
        training=training.in_the_middle(side_px),
        held_out=ordered,
        whole_NHWC=held_out.images_NHWC[[place[tile.tobytes()] for tile in ordered.images_NHWC]],
    )


def _side(rows: Sequence[TableRow], tile_px: int, mpp: float, most: int) -> RealTiles:
    tiles = read_open_tiles(rows, tile_px=tile_px, mpp=mpp)
    said = [rows[place].description for place in tiles.row_N]
    found = RealTiles(
        images_NHWC=tiles.image_NHWC, patients=tiles.cases(), captions=said, labels=said
    )
    chosen = np.random.default_rng(0).permutation(len(found))[:most]
    return found.take(np.sort(chosen))


def arms_of(
    foundation: Foundation, sides: Sides, config: EvaluationConfig, side_px: int
) -> Iterator[tuple[str, ArmImages]]:
    """What a foundation keeps of real tiles and draws from their captions, and that recoloured."""
    held_out, training = sides.held_out, sides.training
    rng = np.random.default_rng(config.seed)
    drawn_from = held_out.take(rng.choice(len(held_out), config.num_images))
    kept = np.sort(rng.permutation(len(held_out))[: config.num_images])
    real_NHWC = middle(sides.whole_NHWC[kept], foundation.manifest.tile_px)
    back_NHWC = middle(reconstruct(foundation.generator, real_NHWC), side_px)
    yield (
        "real tiles through its VAE",
        ArmImages.of("reconstruction", held_out.take(kept), back_NHWC),
    )
    images_NHWC = sample_images(
        foundation.generator,
        list(drawn_from.captions),
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        seed=config.seed,
        batch_size=config.batch_size,
    )
    images_NHWC = middle(images_NHWC, side_px)
    yield "as it is", ArmImages.of("foundation", drawn_from, images_NHWC)
    mapped_NHWC = recolour(images_NHWC, training)
    yield "recoloured", ArmImages.of("recoloured", drawn_from, mapped_NHWC)
    mapped_NHWC = recolour_by_caption(images_NHWC, drawn_from.captions, training)
    yield "recoloured by caption", ArmImages.of("recoloured_by_caption", drawn_from, mapped_NHWC)


def table_of(
    spec: str,
    foundation: Foundation,
    sides: Sides,
    arms: dict[str, ArmImages],
    config: EvaluationConfig,
) -> Iterator[str]:
    """Lines of the table by one encoder."""
    encoder = load_encoder(spec)
    evaluator = Evaluator(foundation, sides.held_out, config, encoder, training=sides.training)
    panel = evaluator.panel()
    found = dict(zip(arms, evaluator.arms(list(arms.values()), panel), strict=True))
    yield f"Encoder {encoder.name} ({encoder.hash[:12]}).\n"
    yield "| | " + " | ".join(heading for heading, _ in COLUMNS) + " |"
    yield "|---" * (len(COLUMNS) + 1) + "|"
    for name, row in found.items():
        yield f"| {name} | " + " | ".join(cell(row, field) for _, field in COLUMNS) + " |"
    yield ""
    if panel.classes:
        yield f"Judges know {len(panel.classes)} classes; chance is {1 / len(panel.classes):.2f}: "
        yield ", ".join(each.removeprefix("H&E, ") for each in panel.classes) + "."
    if panel.gate is not None:
        yield gate_text(panel.gate)
    yield from panel.reasons
    yield ""


def main() -> None:
    """Print one table an encoder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--foundation", action="append", required=True, metavar="NAME=DIR")
    parser.add_argument("--tiles", type=Path, required=True)
    parser.add_argument("--encoder", action="append", required=True)
    parser.add_argument("--images", type=int, default=240)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--most-tiles", type=int, default=1500, help="of each side")
    arguments = parser.parse_args()
    foundations = {
        name: load(Path(path))
        for name, _, path in (each.partition("=") for each in arguments.foundation)
    }
    config = EvaluationConfig(
        num_images=arguments.images,
        num_inference_steps=arguments.steps,
        guidance_scale=arguments.guidance,
    )
    by_size = sorted(foundations.values(), key=lambda each: each.manifest.tile_px)
    side_px, largest = by_size[0].manifest.tile_px, by_size[-1]
    sides = sides_of(
        table_rows(arguments.tiles),
        tile_px=largest.manifest.tile_px,
        mpp=largest.manifest.mpp,
        side_px=side_px,
        most=arguments.most_tiles,
    )
    kinds = ArmImages.of("real", sides.held_out, sides.held_out.images_NHWC)
    arms = {"real tiles of other patients": kinds}
    for name, foundation in foundations.items():
        say(f"drawing with {name}", err=True)
        for what, arm in arms_of(foundation, sides, config, side_px):
            arms[f"{name}: {what}"] = arm
    print(
        f"{config.num_images} images each, {config.num_inference_steps} steps, "
        f"guidance {config.guidance_scale:g}, "
        f"{side_px} px; {len(sides.held_out)} held-out tiles of "
        f"{len(set(sides.held_out.patients))} cases; {len(sides.training)} tiles of "
        f"{len(set(sides.training.patients))} others teach judges and maps.\n"
    )
    for spec in arguments.encoder:
        say(f"looking with {spec}", err=True)
        print("\n".join(table_of(spec, largest, sides, arms, config)))


if __name__ == "__main__":
    main()
