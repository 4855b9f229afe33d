"""Alignment on the public probe: what the coordinator may measure and improve without a patient.

The *margin* asks what the text does: each probe tile is noised once and denoised twice, under its
own caption and under another tile's, with the same noise and timestep. How much closer the first
denoised latent is to the pair's target than the second, in correlation, is the margin. A denoiser
that ignores its text has margin zero.

Shape letters: B tiles times draws, C H W latent, L D text, K anchors.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from crafts_core.adapters import Adapter
from crafts_core.aligner import profile
from crafts_core.foundation import Foundation
from crafts_core.plan_sections import GENERATOR_ONLY, AdapterConfig, Factor, Part
from crafts_core.stages.alignment import alignment_target, alignment_term, denoised_correlation
from crafts_core.stages.schedule import NoiseSchedule
from crafts_core.state import State

_CHUNK = 32
_GRADIENT_CHUNK = 16
"""A backward pass keeps what every layer gave."""


class AlignmentProbe:
    """The probe with fixed noise and timesteps, and one adapter to put states into.

    Two calls with the same state give the same number: draws depend on the public seed only, and
    timesteps are spread evenly over the schedule.
    """

    def __init__(
        self,
        foundation: Foundation,
        config: AdapterConfig,
        *,
        seed: int,
        num_draws: int = 2,
        parts: Sequence[Part] = GENERATOR_ONLY,
    ) -> None:
        if num_draws < 1:
            raise ValueError(f"expected num_draws >= 1, got {num_draws}")
        self._foundation = foundation
        self._adapter = Adapter.attach(copy.deepcopy(foundation.generator.denoiser), config, parts)
        self._schedule = NoiseSchedule.of(foundation.generator)
        probe = foundation.probe
        generator = torch.Generator().manual_seed(seed)
        latents = foundation.generator.encode_images(probe.tiles_NCHW / 127.5 - 1.0)
        latents = latents.repeat_interleave(num_draws, dim=0)
        noise = torch.randn(latents.shape, generator=generator).to(latents.device)
        offsets = torch.arange(num_draws).repeat(len(probe.captions))
        jitter = torch.rand(len(offsets), generator=generator)
        timesteps = (offsets + jitter) / num_draws * self._schedule.num_timesteps
        self._timesteps_B = timesteps.long().to(latents.device)
        self._all_rows = torch.arange(len(offsets))
        self._noisy_BCHW = self._schedule.noisy(latents, noise, self._timesteps_B)
        self._text_BLD = self._encode(list(probe.captions), num_draws)
        self._mismatched_BLD = self._encode(list(probe.mismatched_captions), num_draws)
        self._target_BK = self._targets().repeat_interleave(num_draws, dim=0)

    @torch.no_grad()
    def margin(self, state: Mapping[str, Tensor]) -> float:
        """Mean over the probe of r(u matched, q) - r(u mismatched, q)."""
        self._adapter.load_state(state)
        parts = [float(self._margins(rows).sum()) for rows in self._all_rows.split(_CHUNK)]
        return math.fsum(parts) / len(self._all_rows)

    def margin_gradient(self, state: Mapping[str, Tensor], factor: Factor) -> tuple[float, State]:
        """The margin and its gradient.

        Returns:
            The margin, and for each tensor of ``factor`` its gradient (float32, CPU).
        """
        return self._mean_and_gradient(state, factor, self._margins)

    def gradient(self, state: Mapping[str, Tensor], factor: Factor) -> tuple[float, State]:
        """The public alignment loss, mean of ``a_t^2 (1 - r(u, q))``, and its gradient.

        Returns:
            The loss, and for each tensor of ``factor`` its gradient (float32, CPU).
        """
        return self._mean_and_gradient(state, factor, self._losses)

    def _mean_and_gradient(
        self,
        state: Mapping[str, Tensor],
        factor: Factor,
        of_rows: Callable[[Tensor], Tensor],
    ) -> tuple[float, State]:
        self._adapter.load_state(state)
        parameters = self._adapter.trainable(factor)
        gradients = {name: torch.zeros(value.shape) for name, value in parameters.items()}
        total = 0.0
        for rows in self._all_rows.split(_GRADIENT_CHUNK):
            mean = of_rows(rows).sum() / len(self._all_rows)
            parts = torch.autograd.grad(mean, tuple(parameters.values()))
            for name, part in zip(parameters, parts, strict=True):
                gradients[name] += part.to("cpu", torch.float32)
            total += float(mean.detach())
        return total, gradients

    def _margins(self, rows: Tensor) -> Tensor:
        """r(u matched, q) - r(u mismatched, q) of some rows, in one batch."""
        text = torch.cat([self._text_BLD[rows], self._mismatched_BLD[rows]])
        matched_B, mismatched_B = self._correlation(rows.repeat(2), text).chunk(2)
        return matched_B - mismatched_B

    def _losses(self, rows: Tensor) -> Tensor:
        correlation_B = self._correlation(rows, self._text_BLD[rows])
        return alignment_term(correlation_B, self._timesteps_B[rows], self._schedule)

    def _correlation(self, rows: Tensor, text_BLD: Tensor) -> Tensor:
        """r(u, q) for some rows, each under its own line of ``text_BLD``."""
        noisy, timesteps_B = self._noisy_BCHW[rows], self._timesteps_B[rows]
        prediction = self._adapter.predict(noisy, timesteps_B, text_BLD)
        return denoised_correlation(
            self._schedule.denoised(noisy, prediction, timesteps_B),
            self._target_BK[rows],
            latent_aligner=self._foundation.latent_aligner,
            anchors_KD=self._foundation.anchors_KD,
        )

    def _encode(self, captions: list[str], num_draws: int) -> Tensor:
        text_NLD = self._foundation.generator.encode_captions(captions)
        return text_NLD.repeat_interleave(num_draws, dim=0)

    def _targets(self) -> Tensor:
        """The target q of each probe pair."""
        foundation, anchors_KD = self._foundation, self._foundation.anchors_KD
        tiles_NK = profile(foundation.aligner.embed_images(foundation.probe.tiles_NCHW), anchors_KD)
        captions_NK = profile(
            foundation.aligner.embed_captions(list(foundation.probe.captions)), anchors_KD
        )
        return alignment_target(tiles_NK, captions_NK, foundation.manifest.alignment)
