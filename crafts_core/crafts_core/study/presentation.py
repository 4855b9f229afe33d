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
    """A random order in which each kind is spread evenly, and repeats come half an order later.

    An order is a line from 0 to 1. The images of a kind are shuffled and the i-th of n lies
    somewhere in the i-th of n equal parts: whatever part of a session is tiring or was never
    reached, it holds its share of both kinds. What is repeated is drawn, for each kind, from the
    first half, and lies exactly half a line after its first showing.

    Args:
        is_synthetic: Of each image.
        repeats_share: Of the images that are shown a second time; at most a half.
        rng: Draws the order.

    Returns:
        Every image once, and the repeats.
    """
    kind_N = np.asarray(is_synthetic, dtype=bool)
    places: list[tuple[float, Showing]] = []
    for kind in (False, True):
        images = rng.permutation(np.flatnonzero(kind_N == kind))
        position = (np.arange(len(images)) + rng.random(len(images))) / max(len(images), 1)
        places += [
            (at, Showing(int(image), False)) for at, image in zip(position, images, strict=True)
        ]
        early = np.flatnonzero(position < 0.5)
        count = min(round(repeats_share * len(images)), len(early))
        places += [
            (position[each] + 0.5, Showing(int(images[each]), True))
            for each in rng.choice(early, count, replace=False)
        ]
    return [showing for _, showing in sorted(places)]
