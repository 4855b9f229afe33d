"""Stage 1, pretraining: the denoising loss of one tile (design section 6).

``L1 = w(t) |y - d_theta(z_t, t, tau(c))|^2`` with min-SNR weights and caption dropout; the square
is the mean over the tile's latent elements. Shape letters: B tiles, C H W latent.
"""

from torch import Tensor

from crafts_core.stages.batch import Draws, TileBatch
from crafts_core.stages.schedule import NoiseSchedule


def pretraining_loss(
    prediction_BCHW: Tensor,
    batch: TileBatch,
    draws: Draws,
    *,
    schedule: NoiseSchedule,
    min_snr_gamma: float,
) -> Tensor:
    """L1 of each tile, shape (B,).

    Args:
        prediction_BCHW: What the denoiser says about the noisy latents of ``draws``.
        batch: The tiles.
        draws: The same draws that noised them.
        schedule: The foundation's noise schedule.
        min_snr_gamma: gamma of the min-SNR weights.
    """
    target_BCHW = schedule.target(batch.latents_BCHW, draws.noise_BCHW, draws.timesteps_B)
    weight_B = schedule.min_snr_weight(draws.timesteps_B, min_snr_gamma)
    return weight_B * mean_square(prediction_BCHW - target_BCHW)


def mean_square(difference_BCHW: Tensor) -> Tensor:
    """Mean of squares over each tile's own elements, shape (B,)."""
    return difference_BCHW.square().flatten(1).mean(dim=1)
