"""Stage 1 against slow, obvious arithmetic in float64."""

import copy
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from crafts_core.adapters import Adapter
from crafts_core.foundation import Foundation
from crafts_core.plan_sections import AdapterConfig, StageConfig
from crafts_core.stages.batch import Draws, draw
from crafts_core.stages.objective import Objective
from crafts_core.stages.schedule import NoiseSchedule
from support.batches import random_batch, widened
from support.foundations import tiny_foundation

STAGE = StageConfig(
    name="pretraining", rounds=1, local_steps=1, learning_rate=0.1, caption_dropout=0.5
)
CONFIG = AdapterConfig(kind="lora", rank=2)
GAMMA = 5.0


@pytest.fixture(scope="module", params=["v_prediction", "epsilon"])
def wide(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Foundation:
    path: Path = tmp_path_factory.mktemp("wide") / "tiny"
    return widened(tiny_foundation(path, prediction_type=request.param))


def objective_of(foundation: Foundation) -> Objective:
    adapter = Adapter.attach(copy.deepcopy(foundation.generator.denoiser), CONFIG)
    return Objective(foundation, adapter, STAGE)


def objective_and_adapter(foundation: Foundation) -> tuple[Objective, Adapter]:
    adapter = Adapter.attach(copy.deepcopy(foundation.generator.denoiser), CONFIG)
    return Objective(foundation, adapter, STAGE), adapter


def slow_loss(
    foundation: Foundation, adapter: Adapter, draws: Draws, row: int, **batch: Tensor
) -> float:
    """L1 of one tile, element by element."""
    alpha = float(foundation.generator.alphas_cumprod[draws.timesteps_B[row]])
    signal, level = math.sqrt(alpha), math.sqrt(1 - alpha)
    clean, noise = batch["latents"][row], draws.noise_BCHW[row]
    text = batch["null"] if draws.drop_caption_B[row] else batch["text"][row]
    noisy = signal * clean + level * noise
    with torch.no_grad():
        prediction = adapter.denoiser(noisy[None], draws.timesteps_B[row], text[None]).sample[0]
    snr = alpha / (1 - alpha)
    velocity = foundation.generator.prediction_type == "v_prediction"
    weight = min(snr, GAMMA) / (snr + 1) if velocity else min(snr, GAMMA) / snr
    total = 0.0
    for d, x0, n in zip(
        prediction.flatten().tolist(),
        clean.flatten().tolist(),
        noise.flatten().tolist(),
        strict=True,
    ):
        y = signal * n - level * x0 if velocity else n
        total += (y - d) ** 2
    return weight * total / clean.numel()


def test_loss_is_the_formula_for_every_tile(wide: Foundation) -> None:
    objective, adapter = objective_and_adapter(wide)
    batch = random_batch(wide, 6)
    draws = objective.draw(batch, torch.Generator().manual_seed(4))
    draws = replace(draws, timesteps_B=torch.tensor([0, 50, 200, 500, 800, 998]))
    assert draws.drop_caption_B.any()
    assert not draws.drop_caption_B.all()
    got = objective.loss_per_tile(batch, draws)
    tensors = {"latents": batch.latents_BCHW, "text": batch.text_BLD, "null": batch.null_text_LD}
    expected = [slow_loss(wide, adapter, draws, row, **tensors) for row in range(6)]
    # The schedule itself is float32.
    torch.testing.assert_close(got, torch.tensor(expected).double(), rtol=2e-5, atol=1e-7)


def test_tile_loss_does_not_see_other_tiles(wide: Foundation) -> None:
    objective = objective_of(wide)
    batch = random_batch(wide, 4)
    draws = objective.draw(batch, torch.Generator().manual_seed(1))
    together = objective.loss_per_tile(batch, draws)
    for row in range(4):
        rows = torch.tensor([row])
        alone = objective.loss_per_tile(
            batch.select(rows),
            Draws(
                noise_BCHW=draws.noise_BCHW[rows],
                timesteps_B=draws.timesteps_B[rows],
                drop_caption_B=draws.drop_caption_B[rows],
            ),
        )
        torch.testing.assert_close(alone[0], together[row])


@pytest.mark.parametrize(("kind", "at_zero"), [("v_prediction", 0.0), ("epsilon", 1.0)])
def test_min_snr_weights_at_the_edges(kind: str, at_zero: float) -> None:
    schedule = NoiseSchedule(alphas_cumprod_T=torch.tensor([0.0, 0.5, 0.99]), prediction_type=kind)
    weight = schedule.min_snr_weight(torch.tensor([0, 1, 2]), GAMMA)
    last = GAMMA / 100 if kind == "v_prediction" else GAMMA / 99
    middle = 0.5 if kind == "v_prediction" else 1.0
    torch.testing.assert_close(weight, torch.tensor([at_zero, middle, last]), rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", ["v_prediction", "epsilon"])
def test_denoising_the_true_target_gives_the_clean_latent(kind: str) -> None:
    schedule = NoiseSchedule(
        alphas_cumprod_T=torch.linspace(0.99, 0.01, 10).double(), prediction_type=kind
    )
    clean, noise = torch.randn(2, 10, 4, 3, 3, dtype=torch.float64)
    timesteps = torch.arange(10)
    noisy = schedule.noisy(clean, noise, timesteps)
    target = schedule.target(clean, noise, timesteps)
    torch.testing.assert_close(schedule.denoised(noisy, target, timesteps), clean)


def test_denoising_where_no_signal_is_left_is_finite() -> None:
    schedule = NoiseSchedule(alphas_cumprod_T=torch.zeros(1), prediction_type="epsilon")
    noisy = torch.randn(1, 4, 2, 2)
    assert schedule.denoised(noisy, 0.9 * noisy, torch.tensor([0])).isfinite().all()


def test_schedule_agrees_with_diffusers(foundation: Foundation) -> None:
    scheduler, schedule = foundation.generator.scheduler, NoiseSchedule.of(foundation.generator)
    clean, noise = torch.randn(2, 4, 4, 8, 8)
    timesteps = torch.tensor([0, 10, 500, 999])
    torch.testing.assert_close(
        schedule.noisy(clean, noise, timesteps), scheduler.add_noise(clean, noise, timesteps)
    )
    torch.testing.assert_close(
        schedule.target(clean, noise, timesteps), scheduler.get_velocity(clean, noise, timesteps)
    )


def test_same_seed_gives_the_same_draws_and_dropout_has_its_rate(foundation: Foundation) -> None:
    batch = random_batch(foundation, 2).repeat(500)
    draws = [
        draw(
            batch,
            num_timesteps=1000,
            caption_dropout=0.1,
            generator=torch.Generator().manual_seed(seed),
        )
        for seed in (0, 0, 1)
    ]
    assert torch.equal(draws[0].noise_BCHW, draws[1].noise_BCHW)
    assert not torch.equal(draws[0].timesteps_B, draws[2].timesteps_B)
    assert 0.06 < float(draws[0].drop_caption_B.float().mean()) < 0.14
    assert 0 <= int(draws[0].timesteps_B.min()) <= 10
    assert 989 <= int(draws[0].timesteps_B.max()) <= 999


def test_repeated_tiles_keep_the_patients_mean(foundation: Foundation) -> None:
    batch = random_batch(foundation, 3)
    repeated = batch.repeat(4)
    assert len(repeated) == 12
    loss = torch.tensor([1.0, 2.0, 6.0])
    torch.testing.assert_close(repeated.mean(loss.repeat_interleave(4)), batch.mean(loss))


def test_padding_weighs_nothing(foundation: Foundation) -> None:
    batch = random_batch(foundation, 3)
    padded = replace(batch, weight_B=torch.tensor([0.5, 0.5, 0.0]))
    assert float(padded.mean(torch.tensor([1.0, 3.0, 1e6]))) == 2.0
