"""What a foundation makes of tiles and captions, a row each, whoever else is in the cohort.

A row that cannot be made is all NaN: its tile cannot be read, its caption ends in an exception, or
one of its numbers does not fit float16. Nothing is raised for it, because whether a cohort can be
encoded would tell who is in it. What ails the foundation itself is found on public rows, first.

Every pass has the same shape, filled up with public rows: so a row is the same, to the last bit,
however many others the cohort has.

Shape letters: N rows, M images of several views.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from crafts_core.foundation import Foundation, FoundationError
from crafts_core.pixels import to_pixels
from crafts_core.tiles.augment import view_of
from crafts_core.tiles.store import TileStore, readable

Input = TypeVar("Input")
Pixels = npt.NDArray[np.uint8]
_PUBLIC_TILES = 4


def check_public_rows(foundation: Foundation) -> None:
    """Encode a few public tiles and captions.

    Raises:
        FoundationError: the foundation gives NaN or infinity for them.
    """
    tiles = foundation.probe.tiles_NCHW[:_PUBLIC_TILES] / 127.5 - 1.0
    captions = ["", *foundation.probe.captions[:_PUBLIC_TILES]]
    for what, rows in (
        ("latents of public tiles", foundation.generator.encode_images(tiles)),
        ("embeddings of public tiles", foundation.aligner.embed_images(tiles)),
        ("hidden states of public captions", foundation.generator.encode_captions(captions)),
        ("embeddings of public captions", foundation.aligner.embed_captions(captions)),
    ):
        if unusable_rows(half_rows(rows)).any():
            raise FoundationError(
                f"foundation {foundation.manifest.name} gives NaN or infinity for {what}; check "
                "its files, or use another foundation"
            )


def encode_tiles(
    store: TileStore,
    foundation: Foundation,
    rows: npt.NDArray[np.int64],
    keys: Sequence[bytes],
    *,
    views: int,
    batch_size: int,
) -> tuple[Tensor, Tensor]:
    """Latents and aligner embeddings, float16, of at most ``batch_size`` tiles.

    The views of a tile lie side by side; ``keys`` are those of all tiles of the store.
    """
    image_NHWC, is_readable_N = readable(store.read_images, rows)
    images = [
        view_of(image, view, key=keys[row])
        for image, row in zip(image_NHWC, rows, strict=True)
        for view in range(views)
    ]
    size, nothing = batch_size * views, np.zeros_like(image_NHWC[0])
    latents_MCHW = _encoded(_of_pixels(foundation.generator.encode_images), images, nothing, size)
    embedded_MD = _encoded(_of_pixels(foundation.aligner.embed_images), images, nothing, size)
    is_lost_M = torch.from_numpy(np.repeat(~is_readable_N, views))
    latents_MCHW[is_lost_M] = embedded_MD[is_lost_M] = torch.nan
    return latents_MCHW, embedded_MD


def encode_captions(
    foundation: Foundation, captions: Sequence[str], *, batch_size: int
) -> tuple[Tensor, Tensor]:
    """Text states and aligner embeddings, float16, of at most ``batch_size`` captions."""
    return (
        _encoded(foundation.generator.encode_captions, captions, "", batch_size),
        _encoded(foundation.aligner.embed_captions, captions, "", batch_size),
    )


def half_rows(values_N: Tensor) -> Tensor:
    """As float16 on the CPU; a row with a number that is not finite there becomes all NaN."""
    half_N = values_N.detach().to("cpu", torch.float16)
    half_N[~half_N.flatten(1).isfinite().all(dim=1)] = torch.nan
    return half_N


def unusable_rows(half_N: Tensor) -> Tensor:
    """Which rows are none, of what ``half_rows`` gave; boolean (N,)."""
    return half_N.flatten(1)[:, 0].isnan()


def _encoded(
    encode: Callable[[list[Input]], Tensor], inputs: Sequence[Input], public: Input, size: int
) -> Tensor:
    """Rows of ``inputs`` from passes of exactly ``size``; NaN where one ends in an exception."""
    missing = size - len(inputs)
    try:
        return half_rows(encode([*inputs, *[public] * missing])[: len(inputs)])
    except Exception:  # of some input, by whatever a tokenizer may stumble over
        if len(inputs) > 1:
            return torch.cat([_encoded(encode, [each], public, size) for each in inputs])
        # Raises if it is not the input: the foundation, the device, the memory.
        return torch.full_like(half_rows(encode([public] * size)[:1]), torch.nan)


def _of_pixels(encode: Callable[[Tensor], Tensor]) -> Callable[[list[Pixels]], Tensor]:
    def of_pixels(images: list[Pixels]) -> Tensor:
        return encode(to_pixels(np.stack(images)))

    return of_pixels
