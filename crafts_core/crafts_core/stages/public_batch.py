"""Public tiles as what a loss is computed on: for whatever must not touch a patient."""

import torch
from torch import Tensor

from crafts_core.foundation import Foundation
from crafts_core.plan_sections import Modality
from crafts_core.stages.batch import TileBatch
from crafts_core.tiles.conditions import NUM_CHANNELS


def probe_batch(
    foundation: Foundation,
    num_tiles: int = 3,
    *,
    modality: Modality | None = None,
    captions: tuple[str, ...] = (),
) -> TileBatch:
    """Public probe tiles as a batch, for checks that must not touch a patient.

    No probe tile has a condition; what stands in for it is noise from a fixed seed. Nor has one a
    caption of the study: they get one each in turn.
    """
    class_B = torch.arange(num_tiles, device=foundation.device) % max(len(captions), 1)
    tiles = foundation.probe.tiles_NCHW[:num_tiles]
    own_captions = list(foundation.probe.captions[:num_tiles])
    return TileBatch(
        latents_BCHW=foundation.generator.encode_images(tiles / 127.5 - 1.0),
        text_BLD=foundation.generator.encode_captions(own_captions),
        null_text_LD=foundation.null_text_LD,
        weight_B=torch.full((len(tiles),), 1.0 / len(tiles), device=foundation.device),
        tile_embedding_BD=foundation.aligner.embed_images(tiles),
        caption_embedding_BD=foundation.aligner.embed_captions(own_captions),
        condition_BCHW=None if modality is None else _made_up(foundation, len(tiles), modality),
        class_B=class_B[: len(tiles)] if captions else None,
    )


def _made_up(foundation: Foundation, count: int, modality: Modality) -> Tensor:
    side = foundation.manifest.tile_px
    source = torch.Generator().manual_seed(0)
    shape = (count, NUM_CHANNELS[modality], side, side)
    return torch.rand(shape, generator=source).to(foundation.device)
