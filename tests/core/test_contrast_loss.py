"""The contrast of stage alignment against a slow loop, and that it belongs to one tile."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from crafts_core.adapters import Adapter
from crafts_core.foundation import Foundation
from crafts_core.plan_sections import AdapterConfig, StageConfig
from crafts_core.stages.alignment import NO_CLASS, contrast_term
from crafts_core.stages.batch import Draws, TileBatch
from crafts_core.stages.objective import Objective, assert_per_tile
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
    lambda_align=0.3,
    alignment_loss="contrast",
)
CLASSES = torch.tensor([2, 0, NO_CLASS, 1, 1])
DROPPED = torch.tensor([False, False, False, True, False])
Case = tuple[Objective, Adapter, TileBatch, Draws, Tensor]


@pytest.fixture(scope="module")
def wide(foundation: Foundation) -> Foundation:
    return widened(foundation)


def prepared(foundation: Foundation, stage: StageConfig = STAGE) -> Case:
    generator = torch.Generator().manual_seed(1)
    adapter = Adapter.attach(copy.deepcopy(foundation.generator.denoiser), CONFIG)
    start = initial_state(foundation, CONFIG, 0)
    adapter.load_state(
        {name: 0.2 * torch.randn(each.shape, generator=generator) for name, each in start.items()}
    )
    width = foundation.anchors_KD.shape[1]
    anchors_KD = torch.randn(3, width, generator=generator, dtype=foundation.anchors_KD.dtype)
    anchors_KD = torch.nn.functional.normalize(anchors_KD, dim=1)
    objective = Objective(foundation, adapter, stage, class_anchors_KD=anchors_KD)
    batch = replace(random_batch(foundation, 5), class_B=CLASSES.clone())
    draws = objective.draw(batch, torch.Generator().manual_seed(3))
    timesteps = torch.tensor([5, 300, 600, 900, 50])
    return (
        *(objective, adapter, batch),
        replace(draws, timesteps_B=timesteps, drop_caption_B=DROPPED),
        anchors_KD,
    )


def slow_contrast(foundation: Foundation, case: Case, row: int) -> float:
    """``a_t^2 (log sum exp(a_k u / 0.2) - a_c u / 0.2)`` of one tile, number by number."""
    _, adapter, batch, draws, anchors_KD = case
    if int(CLASSES[row]) == NO_CLASS or bool(DROPPED[row]):
        return 0.0
    one = batch.select(torch.tensor([row]))
    schedule, timestep = NoiseSchedule.of(foundation.generator), draws.timesteps_B[row : row + 1]
    noisy = schedule.noisy(one.latents_BCHW, draws.noise_BCHW[row : row + 1], timestep)
    predicted = adapter.predict(noisy, timestep, one.text_BLD)
    seen = foundation.latent_aligner(schedule.denoised(noisy, predicted, timestep))[0].tolist()
    near = [
        sum(a * u for a, u in zip(anchor, seen, strict=True)) / 0.2
        for anchor in anchors_KD.tolist()
    ]
    loss = math.log(sum(math.exp(each) for each in near)) - near[int(CLASSES[row])]
    return float(foundation.generator.alphas_cumprod[timestep]) * loss


def test_the_contrast_is_what_a_slow_loop_says(wide: Foundation) -> None:
    case = prepared(wide)
    objective, _, batch, draws, _ = case
    plain = prepared(wide, STAGE.model_copy(update={"lambda_align": 0.0}))[0]
    added_B = objective.loss_per_tile(batch, draws) - plain.loss_per_tile(batch, draws)
    expected = [0.3 * slow_contrast(wide, case, row) for row in range(5)]
    assert expected[0] > 0
    assert added_B.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_the_gradient_of_a_tile_is_as_if_it_were_alone(wide: Foundation) -> None:
    objective, adapter, batch, draws, _ = prepared(wide)
    parameters = list(adapter.trainable("second").values())
    together_B = objective.loss_per_tile(batch, draws)
    for row in range(5):
        place = torch.tensor([row])
        one = replace(
            draws,
            noise_BCHW=draws.noise_BCHW[place],
            timesteps_B=draws.timesteps_B[place],
            drop_caption_B=draws.drop_caption_B[place],
        )
        alone = objective.loss_per_tile(batch.select(place), one)
        for found, expected in zip(
            torch.autograd.grad(together_B[row], parameters, retain_graph=True),
            torch.autograd.grad(alone[0], parameters),
            strict=True,
        ):
            assert torch.allclose(found, expected, rtol=1e-7, atol=1e-12)


def test_the_guard_lets_the_contrast_pass(foundation: Foundation) -> None:
    objective, _, batch, draws, _ = prepared(foundation)
    assert_per_tile(objective.loss_per_tile, batch, draws)


def test_a_tile_without_class_has_no_loss_and_no_gradient() -> None:
    embedding_BD = torch.randn(2, 4, requires_grad=True)
    schedule = NoiseSchedule(alphas_cumprod_T=torch.tensor([0.9, 0.5]), prediction_type="epsilon")
    loss_B = contrast_term(
        embedding_BD, torch.eye(4), torch.tensor([1, NO_CLASS]), torch.tensor([0, 1]), schedule
    )
    loss_B.sum().backward()
    assert float(loss_B[1].detach()) == 0.0
    assert embedding_BD.grad is not None
    assert embedding_BD.grad[0].any()
    assert not embedding_BD.grad[1].any()


def test_without_anchors_there_is_no_contrast(foundation: Foundation) -> None:
    adapter = prepared(foundation)[1]
    with pytest.raises(AdapterError, match="an anchor for each"):
        Objective(foundation, adapter, STAGE)


def test_without_classes_there_is_no_contrast(foundation: Foundation) -> None:
    objective, _, batch, draws, _ = prepared(foundation)
    with pytest.raises(ValueError, match="needs classes"):
        objective.loss_per_tile(replace(batch, class_B=None), draws)
