"""A patient's part in a release, from the tile store; and a public stand-in, to be timed.

What cannot be read of a patient counts as zero and is no error, as everywhere.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from crafts_client.patients import PatientTiles
from crafts_core.foundation import Foundation
from crafts_core.plan_sections import Factor
from crafts_core.releases import anchor_vector, colour_vector
from crafts_core.tiles.records import decode_tile, encode_tile


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What of each patient a release is made of."""

    factor: Factor
    captions: tuple[str, ...]
    max_tiles: int


def vector_of(
    patients: PatientTiles, patient: int, told: Told, generator: torch.Generator
) -> Tensor:
    """What one patient adds, (V,), before it is cut to its length."""
    if told.factor == "colour":
        return colour_vector(
            patients.images(patient, max_tiles=told.max_tiles, generator=generator)
        )
    embedding_BD, class_B = patients.embeddings(
        patient, max_tiles=told.max_tiles, generator=generator, captions=told.captions
    )
    return anchor_vector(embedding_BD, class_B, len(told.captions))


def public_release(foundation: Foundation, told: Told) -> Callable[[], Tensor]:
    """Makes the vector of a patient with as many tiles as ours may have, from a public tile.

    It decodes that many tiles for either release: reading an embedding takes less. They are of
    noise, which no tissue takes longer than: a probe's tile may be of one colour, and is quick.
    """
    rows, side = told.max_tiles, foundation.manifest.tile_px
    stored = encode_tile(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8))
    embedding_1D = foundation.aligner.embed_images(foundation.probe.tiles_NCHW[:1])

    def make() -> Tensor:
        images = np.stack([decode_tile(stored, side) for _ in range(rows)])
        vector_V = colour_vector(images)
        if told.factor == "colour":
            return vector_V
        class_B = torch.zeros(rows, dtype=torch.int64, device=foundation.device)
        return anchor_vector(embedding_1D.expand(rows, -1), class_B, len(told.captions))

    return make
