"""Stage 2, correlation-regulated alignment: what it adds to one tile's denoising loss.

Our reading of CRAFTS (design section 6). With profiles over the public anchors, v of the real
tile, w of its caption and u of the denoised latent::

    rho = clip((r(v, w) - r_lo) / (r_hi - r_lo), 0, 1)       how far the text is trusted
    q   = rho w + (1 - rho) v                                 the target, no gradient
    L2  = L1 + lambda_align a_t^2 (1 - r(u, q)) + lambda_drift w(t) |d_theta - d_theta1|^2

theta1 are the weights that ended stage 1. Where the plan says ``contrast``, the second term asks
instead which of the study's captions the denoised latent is nearest to::

    lambda_align a_t^2 CE(softmax(A u / 0.2), k)              k: the tile's caption

with a row of A for each caption: what sites released of their tissue, or the captions' text. Tiles
of no such caption have none of it, nor has a draw whose caption was dropped.

Every term belongs to one tile: the anchors are public and fixed, nothing is compared within the
batch. Shape letters: B tiles, K anchors, C H W latent, D embedding.
"""

import torch
from torch import Tensor
from torch.nn import functional

from crafts_core.aligner import LatentAligner, pearson, profile
from crafts_core.foundation_manifest import AlignmentRange
from crafts_core.stages.pretraining import mean_square
from crafts_core.stages.schedule import NoiseSchedule


def alignment_target(
    tile_profile_BK: Tensor, caption_profile_BK: Tensor, alignment: AlignmentRange
) -> Tensor:
    """q: the caption's profile where it correlates with the tile, the tile's own where not."""
    correlation_B = pearson(tile_profile_BK, caption_profile_BK)
    gate_B = (correlation_B - alignment.r_lo) / (alignment.r_hi - alignment.r_lo)
    gate_B1 = gate_B.clamp(0.0, 1.0)[:, None]
    return (gate_B1 * caption_profile_BK + (1.0 - gate_B1) * tile_profile_BK).detach()


def denoised_correlation(
    denoised_BCHW: Tensor, target_BK: Tensor, *, latent_aligner: LatentAligner, anchors_KD: Tensor
) -> Tensor:
    """r(u, q), shape (B,); differentiable in the denoised latent."""
    return pearson(profile(latent_aligner(denoised_BCHW), anchors_KD), target_BK)


def alignment_term(correlation_B: Tensor, timesteps_B: Tensor, schedule: NoiseSchedule) -> Tensor:
    """``a_t^2 (1 - r(u, q))``, shape (B,): guesses from noise alone are not held to it."""
    return schedule.alphas_cumprod_T[timesteps_B] * (1.0 - correlation_B)


TEMPERATURE = 0.2
"""Of the contrast: how much nearer to its own anchor than to others a tile is asked to be."""
NO_CLASS = -1
"""Of a tile whose caption is none of the study's."""


def contrast_term(
    embedding_BD: Tensor,
    anchors_KD: Tensor,
    class_B: Tensor,
    timesteps_B: Tensor,
    schedule: NoiseSchedule,
) -> Tensor:
    """``a_t^2 CE(softmax(A u / 0.2), k)``, shape (B,); zero where a tile has no class."""
    profile_BK = profile(embedding_BD, anchors_KD)
    loss_B = functional.cross_entropy(
        profile_BK / TEMPERATURE, class_B, ignore_index=NO_CLASS, reduction="none"
    )
    return schedule.alphas_cumprod_T[timesteps_B] * loss_B


def classes_in_draw(class_B: Tensor, drop_caption_B: Tensor) -> Tensor:
    """A tile's class, where the draw has its caption."""
    return torch.where(drop_caption_B, NO_CLASS, class_B)


def drift_term(
    prediction_BCHW: Tensor,
    stage_start_prediction_BCHW: Tensor,
    timesteps_B: Tensor,
    *,
    schedule: NoiseSchedule,
    min_snr_gamma: float,
) -> Tensor:
    """``w(t) |d_theta - d_theta1|^2``, shape (B,)."""
    weight_B = schedule.min_snr_weight(timesteps_B, min_snr_gamma)
    return weight_B * mean_square(prediction_BCHW - stage_start_prediction_BCHW.detach())
