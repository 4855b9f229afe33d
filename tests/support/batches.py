"""Random tile batches for losses, and a foundation widened to float64 for oracles."""

import copy
from dataclasses import replace

import torch

from crafts_core.foundation import Foundation
from crafts_core.stages.batch import TileBatch


def random_batch(foundation: Foundation, num_tiles: int, *, seed: int = 0) -> TileBatch:
    """Tiles with random latents, probe captions, and random embeddings."""
    generator = torch.Generator().manual_seed(seed)
    dtype = foundation.anchors_KD.dtype
    captions = [foundation.probe.captions[row % 8] for row in range(num_tiles)]
    width = foundation.anchors_KD.shape[1]

    def embeddings() -> torch.Tensor:
        drawn = torch.randn(num_tiles, width, generator=generator, dtype=dtype)
        return drawn / drawn.norm(dim=1, keepdim=True)

    return TileBatch(
        latents_BCHW=torch.randn(
            num_tiles, *foundation.generator.latent_shape, generator=generator, dtype=dtype
        ),
        text_BLD=foundation.generator.encode_captions(captions).to(dtype),
        null_text_LD=foundation.null_text_LD,
        weight_B=torch.full((num_tiles,), 1.0 / num_tiles, dtype=dtype),
        tile_embedding_BD=embeddings(),
        caption_embedding_BD=embeddings(),
    )


def widened(foundation: Foundation) -> Foundation:
    """The same foundation with denoiser, latent aligner and anchors in float64."""
    unet = copy.deepcopy(foundation.generator.denoiser).double()
    return replace(
        foundation,
        generator=replace(foundation.generator, denoiser=unet),
        latent_aligner=copy.deepcopy(foundation.latent_aligner).double(),
        anchors_KD=foundation.anchors_KD.double(),
        null_text_LD=foundation.null_text_LD.double(),
    )
