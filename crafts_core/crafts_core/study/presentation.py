"""In which order a reader sees the images."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Showing(NamedTuple):
    """One image at one place of an order."""

    image: int
    is_repeat: bool


def reading_order(
    is_synthetic: Sequence[bool], repeats_share: float, rng: np.random.Generator
) -> list[Showing]:
    """A random order; half of each kind is in each half of it, and repeats come half of it later.

    So a tiring half tires for both kinds alike. Within a half chance alone decides: in finer parts
    whoever is sure of some images could infer the next.

    Args:
        is_synthetic: Of each image.
        repeats_share: Of the images that are shown a second time; at most a half.
        rng: Draws the order.

    Returns:
        Every image once, and the repeats: drawn, for each kind, from the first half, each half of
        all images after its first showing.
    """
    kind_N = np.asarray(is_synthetic, dtype=bool)
    halves: tuple[list[int], list[int]] = ([], [])
    for kind in (False, True):
        images = rng.permutation(np.flatnonzero(kind_N == kind)).tolist()
        # Of an odd number the later half of one kind has one more, the earlier of the other.
        middle = (len(images) + kind) // 2
        halves[0].extend(images[:middle])
        halves[1].extend(images[middle:])
    order = [image for half in halves for image in rng.permutation(half).tolist()]
    places = [(float(place), Showing(image, False)) for place, image in enumerate(order)]
    for kind in (False, True):
        early = [place for place in range(len(halves[0])) if kind_N[order[place]] == kind]
        count = min(round(repeats_share * int((kind_N == kind).sum())), len(early))
        places += [
            (place + len(order) / 2, Showing(order[place], True))
            for place in rng.choice(early, count, replace=False).tolist()
        ]
    return [showing for _, showing in sorted(places)]
