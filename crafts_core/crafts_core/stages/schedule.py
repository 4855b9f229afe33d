"""The noise schedule: noisy latents, training targets, denoised latents, min-SNR weights.

``z_t = a_t z0 + s_t n`` with ``a_t^2 = alphas_cumprod[t]``. Shape letters: B batch, T timesteps,
C H W latent.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from crafts_core.generator import Generator, PredictionType


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseSchedule:
    """a_t and s_t for every timestep, and what the denoiser predicts."""

    alphas_cumprod_T: Tensor
    prediction_type: PredictionType

    @classmethod
    def of(cls, generator: Generator) -> "NoiseSchedule":
        return cls(
            alphas_cumprod_T=generator.alphas_cumprod, prediction_type=generator.prediction_type
        )

    @property
    def num_timesteps(self) -> int:
        return self.alphas_cumprod_T.shape[0]

    def signal(self, timesteps_B: Tensor) -> Tensor:
        """a_t, shape (B, 1, 1, 1)."""
        return self.alphas_cumprod_T[timesteps_B].sqrt()[:, None, None, None]

    def noise_level(self, timesteps_B: Tensor) -> Tensor:
        """s_t, shape (B, 1, 1, 1)."""
        return (1.0 - self.alphas_cumprod_T[timesteps_B]).sqrt()[:, None, None, None]

    def noisy(self, latents_BCHW: Tensor, noise_BCHW: Tensor, timesteps_B: Tensor) -> Tensor:
        """z_t."""
        return self.signal(timesteps_B) * latents_BCHW + self.noise_level(timesteps_B) * noise_BCHW

    def target(self, latents_BCHW: Tensor, noise_BCHW: Tensor, timesteps_B: Tensor) -> Tensor:
        """y: the noise, or the velocity ``a_t n - s_t z0`` (Salimans and Ho, arXiv 2202.00512)."""
        if self.prediction_type == "epsilon":
            return noise_BCHW
        return self.signal(timesteps_B) * noise_BCHW - self.noise_level(timesteps_B) * latents_BCHW

    def denoised(self, noisy_BCHW: Tensor, prediction_BCHW: Tensor, timesteps_B: Tensor) -> Tensor:
        """The x0 prediction that a noise or velocity prediction stands for."""
        signal, noise_level = self.signal(timesteps_B), self.noise_level(timesteps_B)
        if self.prediction_type == "epsilon":
            # No signal is left where a_t = 0; the loss weighs those timesteps with a_t^2 = 0.
            return (noisy_BCHW - noise_level * prediction_BCHW) / signal.clamp(min=1e-4)
        return signal * noisy_BCHW - noise_level * prediction_BCHW

    def noise_in(self, noisy_BCHW: Tensor, prediction_BCHW: Tensor, timesteps_B: Tensor) -> Tensor:
        """The noise that a noise or velocity prediction stands for."""
        if self.prediction_type == "epsilon":
            return prediction_BCHW
        signal, noise_level = self.signal(timesteps_B), self.noise_level(timesteps_B)
        return noise_level * noisy_BCHW + signal * prediction_BCHW

    def min_snr_weight(self, timesteps_B: Tensor, gamma: float) -> Tensor:
        """w(t), shape (B,): min(SNR, gamma) / SNR for noise, / (SNR + 1) for velocity.

        Hang et al., arXiv 2303.09556. At SNR = 0 the weight is 1 for noise and 0 for velocity.
        """
        signal_power_B = self.alphas_cumprod_T[timesteps_B]
        snr_B = signal_power_B / (1.0 - signal_power_B)
        if self.prediction_type == "epsilon":
            return torch.clamp(gamma / snr_B, max=1.0)
        return snr_B.clamp(max=gamma) / (snr_B + 1.0)
