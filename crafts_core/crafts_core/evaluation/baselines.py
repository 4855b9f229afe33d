"""What stands beside every generator that is measured.

============  ====================================================================
real          held-out tiles, one half of the patients against the other: the floor
reconstruction  held-out tiles through the VAE: nobody with this VAE can be better
foundation    the public starting point
recoloured    its images under the best affine colour map: 12 numbers fitted on
              training tiles, and no training. What beats only the foundation may
              have learnt to stain
generator     what was trained
============  ====================================================================

Letters: N images, H W pixels, C colours.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from crafts_core.evaluation.colour import ColourMap, ColourMoments
from crafts_core.evaluation.encoder import Images
from crafts_core.evaluation.real_tiles import RealTiles
from crafts_core.generator import Generator

ArmName = Literal["real", "reconstruction", "foundation", "recoloured", "generator"]
_BATCH = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmImages:
    """The images of one row of a comparison, with what each should show."""

    name: ArmName
    images_NHWC: Images
    captions: Sequence[str]
    classes: Sequence[str]
    groups: npt.NDArray[np.str_]
    """What is resampled together: a real tile's patient, a generated image alone."""


def of_real(name: ArmName, tiles: RealTiles, images_NHWC: Images) -> ArmImages:
    """Real tiles, or what was made of each of them."""
    return ArmImages(
        name=name,
        images_NHWC=images_NHWC,
        captions=tiles.captions,
        classes=tiles.classes,
        groups=tiles.patients,
    )


def of_prompts(name: ArmName, prompts: RealTiles, images_NHWC: Images) -> ArmImages:
    """Images that were drawn from the captions of ``prompts``, one each."""
    return ArmImages(
        name=name,
        images_NHWC=images_NHWC,
        captions=prompts.captions,
        classes=prompts.classes,
        groups=np.asarray([f"image-{place:08d}" for place in range(len(images_NHWC))]),
    )


def comparison(
    *,
    foundation: Generator,
    generator: Generator,
    draw: Callable[[Generator, str], Images],
    prompts: RealTiles,
    held_out: RealTiles,
    mirrored: RealTiles,
    training: RealTiles | None,
) -> list[ArmImages]:
    """Every row of a comparison, real tiles first.

    Args:
        foundation: Where training started.
        generator: Where it ended.
        draw: Images of one of them from ``prompts``, with what it is called meanwhile.
        prompts: Held-out tiles whose captions are drawn from.
        held_out: Real tiles of patients that nobody trained on.
        mirrored: Those of them that go through the VAE.
        training: Real tiles of patients that were trained on; without them no colours are mapped.
    """
    before_NHWC = draw(foundation, "foundation")
    arms = [
        of_real("real", held_out, held_out.images_NHWC),
        of_real("reconstruction", mirrored, reconstruct(foundation, mirrored.images_NHWC)),
        of_prompts("foundation", prompts, before_NHWC),
    ]
    if training is not None:
        recoloured_NHWC = recolour(before_NHWC, training)
        arms.append(of_prompts("recoloured", prompts, recoloured_NHWC))
    return [*arms, of_prompts("generator", prompts, draw(generator, "generator"))]


def recolour(images_NHWC: Images, training: RealTiles) -> Images:
    """Images under the affine map that carries their colours onto those of training tiles."""
    target = ColourMoments.of(training.images_NHWC)
    return ColourMap.between(ColourMoments.of(images_NHWC), target)(images_NHWC)


def reconstruct(generator: Generator, images_NHWC: Images) -> Images:
    """Each tile through the VAE and back."""
    found = []
    for start in range(0, len(images_NHWC), _BATCH):
        pixels_BHWC = torch.from_numpy(images_NHWC[start : start + _BATCH])
        latents_BCHW = generator.encode_images(pixels_BHWC.permute(0, 3, 1, 2) / 127.5 - 1.0)
        decoded_BCHW = generator.decode_latents(latents_BCHW)
        back_BCHW = ((decoded_BCHW + 1.0) * 127.5).round().to(torch.uint8)
        found.append(back_BCHW.permute(0, 2, 3, 1).cpu().numpy())
    return np.concatenate(found)
