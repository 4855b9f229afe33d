"""Public training tiles: procedural regions under broadly random stains, cut into tiles."""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from crafts_core.foundation_build.config import BuildConfig
from crafts_core.procedural import phenotype, random_stain, render_region
from crafts_core.vocabulary import (
    CANCER_TYPES,
    NORMAL_ORGANS,
    compose_caption,
    sample_attributes,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PublicTiles:
    """Rows are tiles; ``caption_N`` and ``region_N`` index captions and regions."""

    image_NHWC: npt.NDArray[np.uint8]
    caption_N: npt.NDArray[np.int64]
    captions: tuple[str, ...]
    region_N: npt.NDArray[np.int64]


def render_public_tiles(
    config: BuildConfig, work: Path, progress: Callable[[str, int, int], None]
) -> PublicTiles:
    """Render every region once, on two processes; a finished rendering is read back."""
    path = work / "public_tiles.npz"
    if not path.exists():
        with ProcessPoolExecutor(2) as pool:
            rendered = []
            jobs = pool.map(_render_one, range(config.num_regions), _repeat(config), chunksize=8)
            for done, region in enumerate(jobs, start=1):
                rendered.append(region)
                progress("public tiles", done, config.num_regions)
        images = np.concatenate([tiles for tiles, _ in rendered])
        region_N = np.repeat(np.arange(len(rendered)), config.region_tiles**2)
        captions, caption_R = np.unique([caption for _, caption in rendered], return_inverse=True)
        np.savez(
            path, images=images, region=region_N, caption=caption_R[region_N], captions=captions
        )
    with np.load(path) as stored:
        return PublicTiles(
            image_NHWC=stored["images"],
            caption_N=stored["caption"],
            captions=tuple(str(caption) for caption in stored["captions"]),
            region_N=stored["region"],
        )


def _repeat(config: BuildConfig) -> list[BuildConfig]:
    return [config] * config.num_regions


def _render_one(index: int, config: BuildConfig) -> tuple[npt.NDArray[np.uint8], str]:
    """Tiles of one region, shape (region_tiles^2, px, px, 3), and the caption they share."""
    rng = np.random.default_rng([config.seed, index])
    if rng.random() < config.normal_fraction:
        cancer, organ = None, str(rng.choice(NORMAL_ORGANS))
    else:
        cancer, organ = CANCER_TYPES[index % len(CANCER_TYPES)], None
    attributes = sample_attributes(rng, cancer, organ=organ)
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
    told = attributes if rng.random() > config.bare_fraction else None
    return tiles, compose_caption(cancer, told, organ=organ)
