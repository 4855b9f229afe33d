"""The foundation's own public update: the directions that it moves weights along, and how far.

A LoRA layer can only read its input through A. The first A is public: the leading right singular
directions of the update that plain training would give the layer on the foundation's probe. One
full-batch gradient is taken for each of several public colour shifts, because a laboratory's stain
is what a foundation meets first at a hospital; the stacked updates share their right directions.

How strongly a layer's B moves the prediction differs by orders of magnitude between layers. Under
differential privacy that is costly twice: one clipping norm and one noise level serve them all.
``influence`` measures it on public data, so that A's rows can be scaled to make it equal.

Shape letters: N tiles, C H W latent, O outputs, I inputs (times kernel), S shifts, R rank.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from crafts_core.denoisers import predict
from crafts_core.foundation import Foundation
from crafts_core.progress import Progress, silent
from crafts_core.stages.batch import TileBatch, draw
from crafts_core.stages.pretraining import pretraining_loss
from crafts_core.stages.schedule import NoiseSchedule

MIN_SNR_GAMMA = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PublicUpdateConfig:
    """How much public work the first factor is worth."""

    num_shifts: int = 6
    draws_per_tile: int = 2
    max_tiles: int = 64
    batch_size: int = 32
    num_projections: int = 2
    """Random projections of each tile's prediction, for ``influence``."""


def public_update(
    foundation: Foundation,
    modules: Sequence[str],
    *,
    seed: int,
    config: PublicUpdateConfig | None = None,
    progress: Progress = silent,
) -> dict[str, Tensor]:
    """Stacked weight updates (S * O, I) of some of the denoiser's modules under L1 on the probe.

    Args:
        foundation: Where the probe and the weights come from; it stays unchanged.
        modules: Names of Linear or Conv2d modules; a kernel is flattened into the inputs.
        seed: Public randomness (shifts, noise, timesteps): same seed, same update.
        config: Amount of work.
        progress: Told of each colour shift.
    """
    config = config or PublicUpdateConfig()
    generator = torch.Generator().manual_seed(seed)
    denoiser = copy.deepcopy(foundation.generator.denoiser).requires_grad_(False)
    weights = {name: denoiser.get_submodule(name).weight.requires_grad_(True) for name in modules}
    schedule = NoiseSchedule.of(foundation.generator)
    updates: dict[str, list[Tensor]] = {name: [] for name in modules}
    for shift in range(config.num_shifts):
        progress("public directions", shift, config.num_shifts)
        totals = [torch.zeros_like(weight) for weight in weights.values()]
        for batch in _probe_batches(foundation, config, shifted=shift > 0, generator=generator):
            draws = draw(
                batch,
                num_timesteps=schedule.num_timesteps,
                caption_dropout=0.0,
                generator=generator,
            )
            noisy = schedule.noisy(batch.latents_BCHW, draws.noise_BCHW, draws.timesteps_B)
            prediction = predict(denoiser, noisy, draws.timesteps_B, batch.text_BLD)
            loss_B = pretraining_loss(
                prediction, batch, draws, schedule=schedule, min_snr_gamma=MIN_SNR_GAMMA
            )
            gradients = torch.autograd.grad(batch.mean(loss_B), list(weights.values()))
            for total, gradient in zip(totals, gradients, strict=True):
                total -= gradient
        for name, total in zip(weights, totals, strict=True):
            updates[name].append(total.flatten(1))
    progress("public directions", config.num_shifts, config.num_shifts)
    return {name: torch.cat(parts) for name, parts in updates.items()}


def influence(
    foundation: Foundation,
    first: Mapping[str, Tensor],
    *,
    seed: int,
    config: PublicUpdateConfig | None = None,
) -> dict[str, Tensor]:
    """How strongly the second factor of each row of A moves the prediction, shape (R,) a module.

    The mean square of ``d prediction / d B[o, r]``, over the prediction's elements, outputs o,
    probe tiles, noise and timesteps, at B = 0. Estimated with random projections (Hutchinson 1989):
    for white v, the mean of ``(J^T v)^2`` is the diagonal of ``J^T J``.

    Args:
        foundation: Where the probe and the weights come from; it stays unchanged.
        first: Module name to A, shape (R, inputs of the module's weight).
        seed: Public randomness: same seed, same numbers.
        config: Amount of work.
    """
    config = config or PublicUpdateConfig()
    generator = torch.Generator().manual_seed(seed)
    denoiser = copy.deepcopy(foundation.generator.denoiser).requires_grad_(False)
    weights = {name: denoiser.get_submodule(name).weight.requires_grad_(True) for name in first}
    schedule = NoiseSchedule.of(foundation.generator)
    totals = {name: torch.zeros(len(rows)) for name, rows in first.items()}
    num_projections = 0
    for _ in range(config.num_projections):
        for batch in _probe_batches(
            foundation,
            replace(config, batch_size=4, draws_per_tile=1),
            shifted=False,
            generator=generator,
        ):
            draws = draw(
                batch,
                num_timesteps=schedule.num_timesteps,
                caption_dropout=0.0,
                generator=generator,
            )
            noisy = schedule.noisy(batch.latents_BCHW, draws.noise_BCHW, draws.timesteps_B)
            prediction = predict(denoiser, noisy, draws.timesteps_B, batch.text_BLD)
            white = torch.randn(prediction.shape, generator=generator).to(prediction)
            projected = (prediction * white).sum() / prediction.numel() ** 0.5
            slopes = torch.autograd.grad(projected, list(weights.values()))
            for (name, rows_RI), slope in zip(first.items(), slopes, strict=True):
                # The chain rule of W = W0 + B A at B = 0.
                slope_OR = slope.flatten(1).cpu() @ rows_RI.flatten(1).T
                totals[name] += slope_OR.square().mean(dim=0)
            num_projections += 1
    return {name: total / num_projections for name, total in totals.items()}


def leading_right_directions(update_OI: Tensor, rank: int, *, seed: int) -> Tensor:
    """The first ``rank`` right singular directions as orthonormal rows, shape (R, I).

    Subspace iteration from a seeded start: no huge decomposition for huge layers, and an update of
    lower rank is completed with orthonormal directions. Each row's largest entry is positive.

    Raises:
        ValueError: ``rank`` is larger than the number of inputs.
    """
    num_inputs = update_OI.shape[1]
    if rank > num_inputs:
        raise ValueError(f"expected rank <= {num_inputs} inputs, got {rank}")
    matrix_OI = update_OI.detach().to("cpu", torch.float32)
    matrix_OI = matrix_OI / matrix_OI.abs().max().clamp(min=1e-30)
    start = torch.Generator().manual_seed(seed)
    basis_IR = torch.randn(num_inputs, min(rank + 8, num_inputs), generator=start)
    for _ in range(12):
        basis_IR = torch.linalg.qr(matrix_OI.T @ (matrix_OI @ basis_IR))[0]
    _, _, turn_RR = torch.linalg.svd(matrix_OI @ basis_IR, full_matrices=True)
    rows_RI = torch.linalg.qr((basis_IR @ turn_RR.T)[:, :rank])[0].T
    largest_R1 = rows_RI.gather(1, rows_RI.abs().argmax(dim=1, keepdim=True))
    signed_RI: Tensor = rows_RI * largest_R1.sign()
    return signed_RI.contiguous()


def _probe_batches(
    foundation: Foundation,
    config: PublicUpdateConfig,
    *,
    shifted: bool,
    generator: torch.Generator,
) -> Iterator[TileBatch]:
    """The probe's first tiles, all under one colour shift, weighted to one mean."""
    tiles = foundation.probe.tiles_NCHW[: config.max_tiles]
    images = (_shift_colours(tiles, generator) if shifted else tiles.float()) / 127.5 - 1.0
    captions = list(foundation.probe.captions[: config.max_tiles])
    for start in range(0, len(tiles), config.batch_size):
        rows = slice(start, start + config.batch_size)
        yield TileBatch(
            latents_BCHW=foundation.generator.encode_images(images[rows]),
            text_BLD=foundation.generator.encode_captions(captions[rows]),
            null_text_LD=foundation.null_text_LD,
            weight_B=torch.full((len(tiles[rows]),), 1 / len(tiles), device=foundation.device),
        ).repeat(config.draws_per_tile)


def _shift_colours(tiles_NCHW: Tensor, generator: torch.Generator) -> Tensor:
    """Another laboratory: optical densities scaled and mixed a little, floats in [0, 255]."""
    density = -torch.log((tiles_NCHW.float() + 1.0) / 256.0)
    mixing_CC = torch.eye(3) + 0.15 * torch.randn(3, 3, generator=generator)
    mixing_CC = mixing_CC * torch.exp(0.25 * torch.randn(3, 1, generator=generator))
    shifted = torch.einsum("dc,nchw->ndhw", mixing_CC, density)
    return (256.0 * torch.exp(-shifted) - 1.0).clamp(0.0, 255.0)
