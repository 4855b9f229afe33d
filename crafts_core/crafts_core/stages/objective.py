"""One stage's loss as training sees it: an adapter, a stage, and the loss of each tile.

``assert_per_tile`` guards the privacy claim: a loss in which one tile's value depends on another
tile has no per-patient sensitivity, and clipping its gradients promises nothing.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from crafts_core.adapters import Adapter, Condition
from crafts_core.aligner import profile
from crafts_core.denoisers import predict
from crafts_core.errors import CraftsError
from crafts_core.foundation import Foundation
from crafts_core.plan_sections import StageConfig
from crafts_core.stages.alignment import (
    NO_CLASS,
    alignment_target,
    alignment_term,
    classes_in_draw,
    contrast_term,
    denoised_correlation,
    drift_term,
)
from crafts_core.stages.batch import Draws, TileBatch, draw
from crafts_core.stages.pretraining import pretraining_loss
from crafts_core.stages.schedule import NoiseSchedule
from crafts_core.state import AdapterError

LossPerTile = Callable[[TileBatch, Draws], Tensor]


class BatchCoupledLossError(CraftsError):
    """A loss mixes tiles, so no patient's influence on the gradient is bounded."""


class Objective:
    """The loss of one stage for one adapter.

    Args:
        foundation: Public, frozen parts.
        adapter: Attached to a UNet of this foundation; its weights may change between calls.
        stage: Which loss and its weights.
        stage_start: Adapter weights that the stage began with (theta1); needed when the stage has
            ``lambda_drift``.
        class_anchors_KD: Of the study's captions (``releases.class_anchors``); needed for the
            contrast.

    Raises:
        AdapterError: the stage needs ``stage_start`` or anchors and none were given.
    """

    def __init__(
        self,
        foundation: Foundation,
        adapter: Adapter,
        stage: StageConfig,
        stage_start: Mapping[str, Tensor] | None = None,
        class_anchors_KD: Tensor | None = None,
    ) -> None:
        self._start = None
        if stage.lambda_drift > 0:
            if stage_start is None:
                raise AdapterError(
                    "lambda_drift needs the adapter weights that the stage began with"
                )
            self._start = adapter.denoiser_with(stage_start)
        if stage.alignment_loss == "contrast" and class_anchors_KD is None:
            raise AdapterError("the contrast needs an anchor for each of the study's captions")
        self._class_anchors_KD = class_anchors_KD if stage.alignment_loss == "contrast" else None
        self._foundation = foundation
        self._adapter = adapter
        self._stage = stage
        self._schedule = NoiseSchedule.of(foundation.generator)

    def draw(self, batch: TileBatch, generator: torch.Generator) -> Draws:
        """The draws this stage trains with: uniform timesteps, its caption dropout."""
        return draw(
            batch,
            num_timesteps=self._schedule.num_timesteps,
            caption_dropout=self._stage.caption_dropout,
            generator=generator,
        )

    def loss_per_tile(self, batch: TileBatch, draws: Draws) -> Tensor:
        """L1 or L2 of each tile, shape (B,), differentiable in the trainable factor.

        In stage control it is L1 with the condition m: ``w(t) |y - d_theta(z_t, t, tau(c), m)|^2``.

        Raises:
            ValueError: stage alignment was given a batch without embeddings, or without classes for
                its contrast, or stage control one without conditions.
        """
        schedule, stage, timesteps_B = self._schedule, self._stage, draws.timesteps_B
        noisy_BCHW = schedule.noisy(batch.latents_BCHW, draws.noise_BCHW, timesteps_B)
        text_BLD = draws.text(batch)
        prediction_BCHW = self._adapter.predict(
            noisy_BCHW, timesteps_B, text_BLD, self._condition(batch)
        )
        loss_B = pretraining_loss(
            prediction_BCHW, batch, draws, schedule=schedule, min_snr_gamma=stage.min_snr_gamma
        )
        if stage.lambda_align > 0:
            denoised_BCHW = schedule.denoised(noisy_BCHW, prediction_BCHW, timesteps_B)
            loss_B = loss_B + stage.lambda_align * self._alignment(denoised_BCHW, batch, draws)
        if self._start is not None:
            with torch.no_grad():
                start_BCHW = predict(self._start, noisy_BCHW, timesteps_B, text_BLD)
            term_B = drift_term(
                prediction_BCHW,
                start_BCHW,
                timesteps_B,
                schedule=schedule,
                min_snr_gamma=stage.min_snr_gamma,
            )
            loss_B = loss_B + stage.lambda_drift * term_B
        return loss_B

    def _condition(self, batch: TileBatch) -> Condition | None:
        if self._stage.modality is None:
            return None
        if batch.condition_BCHW is None:
            raise ValueError("stage control needs conditions in the batch")
        return Condition(self._stage.modality, batch.condition_BCHW)

    def _alignment(self, denoised_BCHW: Tensor, batch: TileBatch, draws: Draws) -> Tensor:
        """What stage alignment adds for each tile, before its weight."""
        if self._class_anchors_KD is None:
            correlation_B = self._correlation(denoised_BCHW, batch)
            return alignment_term(correlation_B, draws.timesteps_B, self._schedule)
        if batch.class_B is None:
            raise ValueError("the contrast of stage alignment needs classes in the batch")
        return contrast_term(
            self._foundation.latent_aligner(denoised_BCHW),
            self._class_anchors_KD,
            classes_in_draw(batch.class_B, draws.drop_caption_B),
            draws.timesteps_B,
            self._schedule,
        )

    def _correlation(self, denoised_BCHW: Tensor, batch: TileBatch) -> Tensor:
        """r(u, q) of each tile.

        Profiles are made here and not where tiles are drawn: a prompt bank may be long, and what a
        pass costs is timed before anybody is drawn.
        """
        if batch.tile_embedding_BD is None or batch.caption_embedding_BD is None:
            raise ValueError("stage alignment needs tile and caption embeddings in the batch")
        foundation = self._foundation
        target_BK = alignment_target(
            profile(batch.tile_embedding_BD, foundation.anchors_KD),
            profile(batch.caption_embedding_BD, foundation.anchors_KD),
            foundation.manifest.alignment,
        )
        return denoised_correlation(
            denoised_BCHW,
            target_BK,
            latent_aligner=foundation.latent_aligner,
            anchors_KD=foundation.anchors_KD,
        )


@torch.no_grad()
def assert_per_tile(loss_per_tile: LossPerTile, batch: TileBatch, draws: Draws) -> None:
    """Refuse a loss in which one tile's value depends on another tile.

    Everything about the first tile is changed (latent, text, embeddings, condition, noise); the
    losses of all other tiles must stay what they were. Run it once before training under privacy.

    Raises:
        BatchCoupledLossError: the loss has another shape than one value per tile, or values moved.
        ValueError: the batch holds fewer than two tiles.
    """
    if len(batch) < 2:
        raise ValueError(f"expected at least two tiles to compare, got {len(batch)}")
    before_B = loss_per_tile(batch, draws)
    if before_B.shape != (len(batch),):
        raise BatchCoupledLossError(
            f"expected one loss per tile, shape ({len(batch)},), got {tuple(before_B.shape)}"
        )
    after_B = loss_per_tile(*_with_another_first_tile(batch, draws))
    scale = before_B.abs().max().clamp(min=1e-6)
    moved = float(((after_B - before_B)[1:].abs() / scale).max())
    if not moved <= 1e-4:
        raise BatchCoupledLossError(
            f"changing one tile moved another tile's loss by {moved:.1e} of its size; losses that "
            "compare tiles within a batch are refused under privacy"
        )


def _with_another_first_tile(batch: TileBatch, draws: Draws) -> tuple[TileBatch, Draws]:
    def change(tensor: Tensor) -> Tensor:
        changed = tensor.clone()
        changed[0] = -2.0 * tensor[0] + 1.0
        return changed

    optional = {
        name: change(tensor)
        for name in ("tile_embedding_BD", "caption_embedding_BD", "condition_BCHW")
        if (tensor := getattr(batch, name)) is not None
    }
    if batch.class_B is not None:
        optional["class_B"] = batch.class_B.clone()
        optional["class_B"][0] = 0 if int(batch.class_B[0]) == NO_CLASS else NO_CLASS
    other = replace(
        batch,
        latents_BCHW=change(batch.latents_BCHW),
        text_BLD=change(batch.text_BLD),
        **optional,
    )
    return other, replace(draws, noise_BCHW=change(draws.noise_BCHW))
