"""Public training tiles: open tissue by a table, and drawings of the types that it does not show.

A tile comes with every statement that is known to be true of it: what it is, of which organ, and
what was measured on it or drawn into it. Captions are some of a tile's statements, so a caption
fits every tile whose statements include its own, whoever's tile it was composed for.

Shape letters: N tiles, V captions of a tile, U different captions.
"""

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from crafts_core.foundation_build.config import BuildConfig
from crafts_core.foundation_build.measured import steady_phrases
from crafts_core.foundation_build.tiles_table import (
    NoTissueError,
    TableRow,
    read_open_tiles,
)
from crafts_core.pixels import channels_first
from crafts_core.probe import Probe
from crafts_core.procedural import phenotype, random_stain, render_region
from crafts_core.progress import Progress
from crafts_core.vocabulary import CANCER_TYPES, CancerType, compose_caption, sample_attributes

Pixels = npt.NDArray[np.uint8]
Indices = npt.NDArray[np.int64]
Statements = tuple[str, ...]
STAIN = "H&E"
"""The first statement of every caption."""
DRAWN = "drawn|"


@dataclass(frozen=True, kw_only=True)
class PublicTiles:
    """Rows are tiles. ``kind_N`` says whose tissue it is and what its case is called."""

    image_NHWC: Pixels
    kind_N: npt.NDArray[np.str_]
    statements: tuple[Statements, ...]
    """What is true of each tile, the stain left out: what it is first, then what one sees."""
    caption_NV: Indices = field(repr=False)
    captions: tuple[str, ...] = field(repr=False)

    def __len__(self) -> int:
        return len(self.image_NHWC)

    @cached_property
    def fits(self) -> npt.NDArray[np.bool_]:
        """Whether all that a caption says is known of a tile, (N, U)."""
        words = sorted({word for caption in self.captions for word in _said(caption)})
        place = {word: index for index, word in enumerate(words)}
        says_UW = np.zeros((len(self.captions), len(words)), dtype=np.float32)
        for row, caption in enumerate(self.captions):
            says_UW[row, [place[word] for word in _said(caption)]] = 1.0
        known_NW = np.zeros((len(self), len(words)), dtype=np.float32)
        for row, statements in enumerate(self.statements):
            known_NW[row, [place[word] for word in statements if word in place]] = 1.0
        return np.asarray(known_NW @ says_UW.T >= says_UW.sum(axis=1))


def _said(caption: str) -> list[str]:
    return caption.split(", ")[1:]


def public_tiles(
    rows: Sequence[TableRow], config: BuildConfig, work: Path, progress: Progress
) -> PublicTiles:
    """Open tiles of the table's ``build`` rows and drawings, with composed captions.

    Cut, measured and drawn once; a finished set is read back.
    """
    path = work / "public_tiles.npz"
    if not path.exists():
        images, kinds, statements = [], [], []
        build_rows = [row for row in rows if row.split == "build"]
        if build_rows:
            part = _open_part(build_rows, config, progress)
            images, kinds, statements = [part[0]], part[1], part[2]
        if drawn_types(rows):
            drawn = _drawn_part(rows, config, progress)
            images, kinds = [*images, drawn[0]], kinds + drawn[1]
            statements = statements + drawn[2]
        unfinished = path.with_suffix(".writing.npz")
        np.savez(
            unfinished,
            images=np.concatenate(images),
            kinds=np.asarray(kinds),
            statements=np.asarray(["\n".join(each) for each in statements]),
        )
        unfinished.replace(path)
    with np.load(path) as stored:
        found = tuple(tuple(each.split("\n")) for each in stored["statements"].tolist())
        caption_NV, captions = compose(found, config)
        return PublicTiles(
            image_NHWC=stored["images"],
            kind_N=stored["kinds"],
            statements=found,
            caption_NV=caption_NV,
            captions=captions,
        )


Part = tuple[Pixels, list[str], list[Statements]]


def _open_part(rows: Sequence[TableRow], config: BuildConfig, progress: Progress) -> Part:
    progress("open tiles", 0, len(rows))
    tiles = read_open_tiles(rows, tile_px=config.tile_px, mpp=config.mpp)
    seen = steady_phrases(tiles.image_NHWC, mpp=config.mpp, seed=config.seed + 5)
    statements = [
        (*_said(rows[place].description), *phrases)
        for place, phrases in zip(tiles.row_N, seen, strict=True)
    ]
    kinds = [f"{rows[place].label}|{rows[place].case}" for place in tiles.row_N]
    return tiles.image_NHWC, kinds, statements


def _drawn_part(rows: Sequence[TableRow], config: BuildConfig, progress: Progress) -> Part:
    """Regions of every type that no open case shows, in turn."""
    types = drawn_types(rows)
    chosen = [types[index % len(types)] for index in range(config.num_regions)]
    rendered = []
    with ProcessPoolExecutor(2) as pool:
        jobs = pool.map(partial(_draw, config), range(len(chosen)), chosen, chunksize=8)
        for done, region in enumerate(jobs, start=1):
            rendered.append(region)
            progress("drawn tiles", done, len(chosen))
    count = config.region_tiles**2
    return (
        np.concatenate([tiles for tiles, _ in rendered]),
        [f"{DRAWN}{cancer.code}" for cancer in chosen for _ in range(count)],
        [tuple(_said(caption)) for _, caption in rendered for _ in range(count)],
    )


def drawn_types(rows: Sequence[TableRow]) -> tuple[CancerType, ...]:
    """The cancer types that no ``build`` row shows."""
    shown = {row.type for row in rows if row.split == "build"}
    return tuple(cancer for cancer in CANCER_TYPES if cancer.code not in shown)


def _draw(config: BuildConfig, index: int, cancer: CancerType) -> tuple[Pixels, str]:
    """Tiles of one region, shape (region_tiles^2, px, px, 3), and all that is true of them."""
    rng = np.random.default_rng([config.seed, index])
    attributes = sample_attributes(rng, cancer)
    side = config.region_tiles * config.tile_px
    region = render_region(
        rng,
        width_px=side,
        height_px=side,
        mpp=config.mpp * rng.uniform(0.9, 1.2),
        phenotype=phenotype(attributes),
        stain=random_stain(rng),
    )
    grid = region.image.reshape(
        config.region_tiles, config.tile_px, config.region_tiles, config.tile_px, 3
    )
    tiles = grid.swapaxes(1, 2).reshape(-1, config.tile_px, config.tile_px, 3)
    return tiles, compose_caption(cancer, attributes)


def compose(
    statements: Sequence[Statements], config: BuildConfig
) -> tuple[Indices, tuple[str, ...]]:
    """For each tile ``captions_per_tile`` captions: places (N, V) in the tuple of captions.

    What a tile is comes in four of five captions, every other statement in one of two, as
    hospitals know sometimes much and sometimes only a diagnosis; the first caption says all.
    """
    rng = np.random.default_rng(config.seed + 4)
    place: dict[str, int] = {}
    caption_NV = np.empty((len(statements), config.captions_per_tile), dtype=np.int64)
    for row, known in enumerate(statements):
        for view in range(config.captions_per_tile):
            chance = rng.random(len(known)) < np.where(np.arange(len(known)) == 0, 0.8, 0.5)
            keep = np.ones(len(known), dtype=bool) if view == 0 else chance
            keep[0] |= not keep.any()
            told = [STAIN, *(word for word, kept in zip(known, keep, strict=True) if kept)]
            caption_NV[row, view] = place.setdefault(", ".join(told), len(place))
    return caption_NV, tuple(place)


def probe_of(rows: Sequence[TableRow], config: BuildConfig) -> Probe:
    """Public pairs that no part was trained on: fresh drawings, and held-out cases if told so.

    Then one tile a case, and at most two in three, so that types without open cases are asked for
    too.
    """
    held_out = [row for row in rows if row.split == "held-out"] if config.open_probe else []
    first_rows = list({row.case: row for row in reversed(held_out)}.values())[::-1]
    images, captions = [], []
    for row in _spread(first_rows, 2 * config.num_probe // 3):
        try:
            tiles = read_open_tiles([row], tile_px=config.tile_px, mpp=config.mpp)
        except NoTissueError:
            continue
        image = tiles.image_NHWC[len(tiles.image_NHWC) // 2]
        said = _said(row.description)
        images.append(image)
        (seen,) = steady_phrases(image[None], mpp=config.mpp, seed=config.seed + 5)
        captions.append(", ".join([STAIN, *said, *seen]))
    types = drawn_types(rows) or CANCER_TYPES
    num_drawn = config.num_probe - len(images)
    for index in range(config.num_regions, config.num_regions + num_drawn):
        tiles_THWC, caption = _draw(config, index, types[index % len(types)])
        images.append(tiles_THWC[0])
        captions.append(caption)
    return Probe(
        tiles_NCHW=channels_first(np.stack(images)).contiguous(),
        captions=tuple(captions),
    )


def _spread(rows: Sequence[TableRow], count: int) -> list[TableRow]:
    """At most ``count`` rows, evenly over the table."""
    if len(rows) <= count:
        return list(rows)
    return [rows[place] for place in np.linspace(0, len(rows) - 1, count).astype(int)]
