"""What stands beside every generator that is measured.

============  ====================================================================
real          held-out tiles, one half of the patients against the other: the floor
reconstruction  held-out tiles through the VAE: nobody with this VAE can be better
foundation    the public starting point
recoloured    its images under the best affine colour map: 12 numbers fitted on
              training tiles, and no training. What beats only the foundation may
              have learnt to stain
recoloured_by_caption  the same with a map for each caption: what has also learnt
              which tissue takes which stain must beat this
retrieved     private retrieval: the public tiles that a study picked by what sites told,
              in the colours told. Nobody trained; private training must add to them
public_steps  the generator after training on those tiles alone, before any site's step
generator     what was trained
images        a folder of anybody's images, instead of a generator and of the VAE
============  ====================================================================

Letters: N images, H W pixels, C colours.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
import numpy.typing as npt

from crafts_core.evaluation.colour import ColourMoments, in_colours_of
from crafts_core.evaluation.encoder import Images
from crafts_core.evaluation.real_tiles import RealTiles, middle
from crafts_core.generator import Generator
from crafts_core.pixels import to_pixels, to_uint8
from crafts_core.vocabulary import caption_class

ArmName = Literal[
    "real",
    "reconstruction",
    "foundation",
    "recoloured",
    "recoloured_by_caption",
    "retrieved",
    "public_steps",
    "generator",
    "images",
]
_BATCH = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmImages:
    """The images of one row of a comparison, with what each should show."""

    name: ArmName
    images_NHWC: Images
    captions: Sequence[str]
    classes: Sequence[str]
    patients: npt.NDArray[np.str_]
    """Whose tile each is, or whose caption it was drawn from."""
    are_others: bool = False
    """Whether these are no held-out patients: an image's own, or those of elsewhere."""

    @classmethod
    def of(cls, name: ArmName, tiles: RealTiles, images_NHWC: Images) -> Self:
        """Real tiles, or one image for each: made of it, or drawn from its caption."""
        return cls(
            name=name,
            images_NHWC=images_NHWC,
            captions=tiles.captions,
            classes=tiles.classes,
            patients=tiles.patients,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PublicPart:
    """What a study had of its public pool before any site trained."""

    picked: RealTiles
    """In the federation's colours, under its captions."""
    generator: Generator
    """Trained on them."""


def comparison(
    *,
    foundation: Generator,
    generator: Generator,
    draw: Callable[[Generator, str], Images],
    prompts: RealTiles,
    held_out: RealTiles,
    mirrored: RealTiles,
    training: RealTiles | None,
    public: PublicPart | None = None,
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
        public: What the study did with a public pool, if it had one.
    """
    drawn_NHWC = draw(foundation, "foundation")
    return [
        ArmImages.of("real", held_out, held_out.images_NHWC),
        ArmImages.of("reconstruction", mirrored, reconstruct(foundation, mirrored.images_NHWC)),
        *foundation_arms(drawn_NHWC, prompts, training),
        *([] if public is None else _public_arms(public, prompts, drawn_NHWC, draw)),
        ArmImages.of("generator", prompts, draw(generator, "generator")),
    ]


def _public_arms(
    public: PublicPart,
    prompts: RealTiles,
    drawn_NHWC: Images,
    draw: Callable[[Generator, str], Images],
) -> list[ArmImages]:
    shown_NHWC = in_their_place(drawn_NHWC, prompts.captions, public.picked)
    return [
        ArmImages.of("retrieved", prompts, shown_NHWC),
        ArmImages.of("public_steps", prompts, draw(public.generator, "public steps")),
    ]


def foundation_arms(
    drawn_NHWC: Images, prompts: RealTiles, training: RealTiles | None
) -> list[ArmImages]:
    """The foundation's images of ``prompts``, and under the colours of training tiles if any."""
    arms = [ArmImages.of("foundation", prompts, drawn_NHWC)]
    if training is not None:
        by_caption_NHWC = recolour_by_caption(drawn_NHWC, prompts.captions, training)
        arms += [
            ArmImages.of("recoloured", prompts, recolour(drawn_NHWC, training)),
            ArmImages.of("recoloured_by_caption", prompts, by_caption_NHWC),
        ]
    return arms


def in_their_place(images_NHWC: Images, captions: Sequence[str], picked: RealTiles) -> Images:
    """For each image a picked tile of its caption, in turn; itself where none was picked for it."""
    classes = tuple(dict.fromkeys(picked.captions))
    caption_M, taken = np.asarray(picked.captions), Counter[int]()
    tiles_MHWC, found_NHWC = middle(picked.images_NHWC, images_NHWC.shape[1]), images_NHWC.copy()
    for place, caption in enumerate(captions):
        number = caption_class(caption, classes)
        if number is not None:
            own = np.flatnonzero(caption_M == classes[number])
            found_NHWC[place] = tiles_MHWC[own[taken[number] % len(own)]]
            taken[number] += 1
    return found_NHWC


def recolour(images_NHWC: Images, training: RealTiles) -> Images:
    """Images under the affine map that carries their colours onto those of training tiles."""
    return in_colours_of(images_NHWC, ColourMoments.of(training.images_NHWC))


def recolour_by_caption(
    images_NHWC: Images, captions: Sequence[str], training: RealTiles
) -> Images:
    """The same with a map for each caption, fitted to its images and its training tiles.

    Images of a caption that no training tile has are mapped as the whole set is.
    """
    found_NHWC = recolour(images_NHWC, training)
    caption_N, caption_T = np.asarray(captions), np.asarray(training.captions)
    for caption in set(captions) & set(training.captions):
        rows = np.flatnonzero(caption_N == caption)
        target = ColourMoments.of(training.images_NHWC[caption_T == caption])
        found_NHWC[rows] = in_colours_of(images_NHWC[rows], target)
    return found_NHWC


def reconstruct(generator: Generator, images_NHWC: Images) -> Images:
    """Each tile through the VAE and back."""
    found = []
    for start in range(0, len(images_NHWC), _BATCH):
        latents_BCHW = generator.encode_images(to_pixels(images_NHWC[start : start + _BATCH]))
        found.append(to_uint8(generator.decode_latents(latents_BCHW)))
    return np.concatenate(found)
