"""What a page shows of images: generated ones, and real ones only where somebody says so.

Pictures of real tissue are patients'. At a site they stay there; of a folder, whoever has it
decides. What a folder that is measured holds is anybody's: its images may be a patient's, too.

Letters: N images shown, M real tiles.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.spatial.distance import cdist

from crafts_core.evaluation.bench import Bench, is_store
from crafts_core.evaluation.encoder import Images
from crafts_core.evaluation.memorisation import SAMPLING
from crafts_core.evaluation.real_tiles import RealTiles, middle
from crafts_core.evaluation.show import Pictured, Show
from crafts_core.generator import Generator
from crafts_core.generator_record import read_origin
from crafts_core.provenance import Provenance
from crafts_core.sampling import sample_images

NUM_SHOWN = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Pictures:
    """Images in the order of the page."""

    generated_NHWC: Images
    captions: Sequence[str]
    said: Sequence[Provenance]
    """What each that was drawn here says of itself; none of a folder's images."""
    real_NHWC: Images | None
    """Random real tiles, or the nearest to each image; None where none are shown."""
    show: Pictured
    nearest_among: str = ""
    """Which tiles the nearest were looked for among, in words."""
    may_be_patients: bool
    """Whether any may show real tissue: all but what a generator drew here from public prompts."""


def pictures_of(bench: Bench, subject: Path, show: Show) -> Pictures:
    """Some images of a subject of the bench, and the real ones that are asked for.

    A generator draws captions of the public prompt bank: those of held-out tiles are their
    patients'.
    """
    if show == "auto":
        is_folder = subject in bench.folders and not is_store(bench.real)
        show = "real" if is_folder else "generated"
    config = bench.evaluator.config
    rng = np.random.default_rng(config.seed)
    if subject in bench.folders:
        chosen = _some(bench.folders[subject], rng)
        images_NHWC, captions = chosen.images_NHWC, list(chosen.captions)
        said: list[Provenance] = []
    else:
        bank = [prompt.text for prompt in bench.foundation.prompt_bank]
        captions = [bank[place] for place in rng.permutation(len(bank))[:NUM_SHOWN].tolist()]
        drawn_NHWC = sample_images(
            Generator.from_directory(subject, device=bench.foundation.device),
            captions,
            **config.model_dump(include=SAMPLING),
        )
        images_NHWC = middle(drawn_NHWC, bench.held_out.side_px)
        drawn = Provenance(
            origin=read_origin(subject),
            seed=config.seed,
            scheduler=config.scheduler,
            num_inference_steps=config.num_inference_steps,
            guidance_scale=config.guidance_scale,
        )
        said = [drawn.of_image(text, index=place) for place, text in enumerate(captions)]
    real_NHWC, among = None, ""
    if show == "real":
        real_NHWC = _some(bench.held_out, rng).images_NHWC
    elif show == "nearest":
        tiles = bench.held_out if bench.training is None else bench.training
        among = "the real images" if bench.training is None else "the tiles that were trained on"
        real_NHWC = _nearest(bench, images_NHWC, tiles)
    return Pictures(
        generated_NHWC=images_NHWC,
        captions=captions,
        said=said,
        real_NHWC=real_NHWC,
        show=show,
        nearest_among=among,
        may_be_patients=real_NHWC is not None or subject in bench.folders,
    )


def _some(tiles: RealTiles, rng: np.random.Generator) -> RealTiles:
    return tiles.take(rng.permutation(len(tiles))[:NUM_SHOWN])


def _nearest(bench: Bench, images_NHWC: Images, tiles: RealTiles) -> Images:
    """The nearest tile to each image, in the features that distances are measured in."""
    evaluator = bench.evaluator
    image_ND, tile_MD = (
        evaluator.reference.scale(evaluator.embed(each))
        for each in (images_NHWC, tiles.images_NHWC)
    )
    nearest: Images = tiles.images_NHWC[cdist(image_ND, tile_MD).argmin(axis=1)]
    return nearest
