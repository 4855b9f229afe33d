"""Stage 2 against slow, obvious arithmetic in float64, and the guard against batch coupling."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from crafts_core.adapters import Adapter
from crafts_core.foundation import Foundation
from crafts_core.foundation_manifest import AlignmentRange
from crafts_core.plan_sections import AdapterConfig, StageConfig
from crafts_core.stages.alignment import alignment_target, alignment_term
from crafts_core.stages.batch import Draws, TileBatch
from crafts_core.stages.objective import BatchCoupledLossError, Objective, assert_per_tile
from crafts_core.stages.schedule import NoiseSchedule
from crafts_core.starting_point import initial_state
from crafts_core.state import AdapterError
from support.batches import random_batch, widened

CONFIG = AdapterConfig(kind="lora", rank=2, targets=("to_q", "conv1"), first_factor="random")
STAGE = StageConfig(
    name="alignment",
    rounds=1,
    local_steps=1,
    learning_rate=0.1,
    caption_dropout=0.3,
    lambda_align=0.7,
    lambda_drift=0.4,
)
RANGE = AlignmentRange(r_lo=0.1, r_hi=0.5)


@pytest.fixture(scope="module")
def wide(foundation: Foundation) -> Foundation:
    return widened(foundation)


def random_state(foundation: Foundation, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: 0.2 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in initial_state(foundation, CONFIG, 0).items()
    }


def prepared(
    foundation: Foundation, stage: StageConfig = STAGE
) -> tuple[Objective, Adapter, TileBatch, Draws]:
    adapter = Adapter.attach(copy.deepcopy(foundation.generator.denoiser), CONFIG)
    adapter.load_state(random_state(foundation, 1))
    objective = Objective(foundation, adapter, stage, random_state(foundation, 2))
    batch = random_batch(foundation, 4)
    draws = objective.draw(batch, torch.Generator().manual_seed(3))
    return objective, adapter, batch, replace(draws, timesteps_B=torch.tensor([5, 300, 600, 900]))


def slow_addition(
    wide: Foundation, adapter: Adapter, batch: TileBatch, draws: Draws, row: int
) -> float:
    """What L2 adds to L1 for one tile, with numpy's correlation."""
    alpha = float(wide.generator.alphas_cumprod[draws.timesteps_B[row]])
    signal, level = alpha**0.5, (1 - alpha) ** 0.5
    noisy = signal * batch.latents_BCHW[row] + level * draws.noise_BCHW[row]
    text = batch.null_text_LD if draws.drop_caption_B[row] else batch.text_BLD[row]
    start = Adapter.attach(copy.deepcopy(wide.generator.denoiser), CONFIG)
    start.load_state(random_state(wide, 2))
    inputs = (noisy[None], draws.timesteps_B[row : row + 1], text[None])
    with torch.no_grad():
        prediction, before = adapter.predict(*inputs)[0], start.predict(*inputs)[0]
        embedding = wide.latent_aligner((signal * noisy - level * prediction)[None])[0]
    anchors = wide.anchors_KD.numpy()
    u = anchors @ embedding.numpy()
    v = anchors @ batch.tile_embedding_BD[row].numpy()
    w = anchors @ batch.caption_embedding_BD[row].numpy()
    r_lo, r_hi = wide.manifest.alignment.r_lo, wide.manifest.alignment.r_hi
    rho = min(max((np.corrcoef(v, w)[0, 1] - r_lo) / (r_hi - r_lo), 0.0), 1.0)
    q = rho * w + (1 - rho) * v
    snr = alpha / (1 - alpha)
    weight = min(snr, STAGE.min_snr_gamma) / (snr + 1)
    drift = float((prediction - before).square().mean())
    align = alpha * (1 - np.corrcoef(u, q)[0, 1])
    return STAGE.lambda_align * align + STAGE.lambda_drift * weight * drift


def test_loss_is_the_formula_for_every_tile(wide: Foundation) -> None:
    objective, adapter, batch, draws = prepared(wide)
    plain_stage = STAGE.model_copy(update={"lambda_align": 0.0, "lambda_drift": 0.0})
    plain = Objective(wide, adapter, plain_stage).loss_per_tile(batch, draws)
    got = objective.loss_per_tile(batch, draws) - plain
    expected = [slow_addition(wide, adapter, batch, draws, row) for row in range(4)]
    torch.testing.assert_close(got, torch.tensor(expected).double(), rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("factor", ["first", "second"])
def test_gradient_is_that_of_finite_differences(wide: Foundation, factor: str) -> None:
    objective, adapter, batch, draws = prepared(wide)
    parameters = adapter.trainable(factor)
    batch.mean(objective.loss_per_tile(batch, draws)).backward()
    step = 1e-6
    for parameter in list(parameters.values())[::4]:
        index = int(parameter.grad.abs().argmax())
        flat = parameter.data.view(-1)
        values = []
        for sign in (1, -1):
            flat[index] += sign * step
            with torch.no_grad():
                values.append(float(batch.mean(objective.loss_per_tile(batch, draws))))
            flat[index] -= sign * step
        numeric = (values[0] - values[1]) / (2 * step)
        assert float(parameter.grad.view(-1)[index]) == pytest.approx(numeric, rel=1e-4, abs=1e-9)


def test_tile_loss_and_gradient_do_not_see_other_tiles(wide: Foundation) -> None:
    objective, adapter, batch, draws = prepared(wide)
    parameters = list(adapter.trainable("second").values())
    weights = torch.tensor([1.0, 0.0, 0.0, 0.0])
    other = batch.select(torch.tensor([0, 3, 1, 1]))
    gradients = [
        torch.autograd.grad((weights * objective.loss_per_tile(tiles, draws)).sum(), parameters)
        for tiles in (batch, other)
    ]
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two)


def test_no_drift_where_the_stage_begins(foundation: Foundation) -> None:
    _, adapter, batch, draws = prepared(foundation)
    only_drift = STAGE.model_copy(update={"lambda_align": 0.0})
    without = STAGE.model_copy(update={"lambda_align": 0.0, "lambda_drift": 0.0})
    at_start = Objective(foundation, adapter, only_drift, adapter.state())
    plain = Objective(foundation, adapter, without)
    torch.testing.assert_close(
        at_start.loss_per_tile(batch, draws), plain.loss_per_tile(batch, draws)
    )


def test_drift_pulls_towards_the_stage_start(foundation: Foundation) -> None:
    """One small step down the drift term alone comes closer to theta1's predictions."""
    objective, adapter, batch, draws = prepared(foundation)
    stage = STAGE.model_copy(update={"lambda_align": 0.0, "lambda_drift": 1e4})
    objective = Objective(foundation, adapter, stage, random_state(foundation, 2))
    parameters = list(adapter.trainable("second").values())
    before = batch.mean(objective.loss_per_tile(batch, draws))
    gradients = torch.autograd.grad(before, parameters)
    norm = sum(float(gradient.square().sum()) for gradient in gradients) ** 0.5
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter -= 1e-2 * gradient / norm
        after = batch.mean(objective.loss_per_tile(batch, draws))
    assert float(after) < float(before.detach())


@pytest.mark.parametrize(("correlation", "trust"), [(1.0, 1.0), (-1.0, 0.0)])
def test_well_captioned_tiles_follow_text_and_others_themselves(
    correlation: float, trust: float
) -> None:
    tile = torch.randn(1, 12)
    caption = correlation * tile + 3.0
    target = alignment_target(tile, caption, RANGE)
    torch.testing.assert_close(target, trust * caption + (1 - trust) * tile)


def test_target_carries_no_gradient() -> None:
    tile = torch.randn(2, 12, requires_grad=True)
    assert not alignment_target(tile, tile * 0.5 + 1, RANGE).requires_grad


def test_alignment_is_not_asked_of_pure_noise() -> None:
    schedule = NoiseSchedule(
        alphas_cumprod_T=torch.tensor([1.0, 0.25, 0.0]), prediction_type="v_prediction"
    )
    term = alignment_term(torch.full((3,), -0.5), torch.tensor([0, 1, 2]), schedule)
    torch.testing.assert_close(term, torch.tensor([1.5, 0.375, 0.0]))


def test_stage_without_its_start_is_refused(foundation: Foundation) -> None:
    adapter = Adapter.attach(copy.deepcopy(foundation.generator.denoiser), CONFIG)
    with pytest.raises(AdapterError, match="stage began with"):
        Objective(foundation, adapter, STAGE)


def test_alignment_without_embeddings_is_refused(foundation: Foundation) -> None:
    objective, _, batch, draws = prepared(foundation)
    with pytest.raises(ValueError, match="needs tile and caption embeddings"):
        objective.loss_per_tile(replace(batch, caption_embedding_BD=None), draws)


def test_both_stages_are_per_tile(foundation: Foundation) -> None:
    objective, _, batch, draws = prepared(foundation)
    assert_per_tile(objective.loss_per_tile, batch, draws)


def info_nce(batch: TileBatch, draws: Draws) -> Tensor:
    """A tile against the captions of the other tiles in its batch."""
    logits = batch.tile_embedding_BD @ batch.caption_embedding_BD.T
    return -logits.log_softmax(dim=1).diagonal()


def centred(batch: TileBatch, draws: Draws) -> Tensor:
    """Hidden coupling: the batch mean is taken out first."""
    return (batch.latents_BCHW - batch.latents_BCHW.mean(dim=0)).square().mean(dim=(1, 2, 3))


@pytest.mark.parametrize("loss", [info_nce, centred])
def test_batch_coupled_loss_is_refused(foundation: Foundation, loss: object) -> None:
    _, _, batch, draws = prepared(foundation)
    with pytest.raises(BatchCoupledLossError, match="moved another tile's loss"):
        assert_per_tile(loss, batch, draws)


def test_loss_that_is_one_number_is_refused(foundation: Foundation) -> None:
    _, _, batch, draws = prepared(foundation)
    with pytest.raises(BatchCoupledLossError, match="one loss per tile"):
        assert_per_tile(lambda batch, draws: batch.latents_BCHW.mean(), batch, draws)


def test_loss_that_is_not_a_number_is_refused(foundation: Foundation) -> None:
    _, _, batch, draws = prepared(foundation)
    with pytest.raises(BatchCoupledLossError):
        assert_per_tile(lambda b, d: b.weight_B * torch.nan, batch, draws)
