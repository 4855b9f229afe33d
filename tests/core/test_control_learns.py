"""A short control stage on drawn tissue, without privacy: its masks are used, and rightly."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from crafts_core.adapters import Adapter
from crafts_core.control_net import num_halvings_of
from crafts_core.foundation import Foundation, embedded_path, load
from crafts_core.plan_sections import AdapterConfig, StageConfig
from crafts_core.procedural import phenotype, random_stain, render_region
from crafts_core.stages.batch import TileBatch
from crafts_core.stages.objective import Objective
from crafts_core.starting_point import initial_state
from crafts_core.tiles.conditions import nuclei_condition
from crafts_core.vocabulary import cancer_type, compose_caption, sample_attributes

CONFIG = AdapterConfig(kind="lora", rank=2, first_factor="random")
STAGE = StageConfig(name="control", modality="nuclei", rounds=1, local_steps=1, learning_rate=1.0)
TRAINED, HELD_OUT = 48, 16


def drawn_tiles(foundation: Foundation, count: int) -> TileBatch:
    """Tiles with their exact instance maps."""
    side_px = foundation.manifest.tile_px
    images, masks, captions = [], [], []
    for number in range(count):
        rng = np.random.default_rng([5, number])
        cancer = cancer_type(("LUAD", "COAD", "BRCA")[number % 3])
        attributes = sample_attributes(rng, cancer)
        region = render_region(
            rng, width_px=side_px, height_px=side_px, mpp=1.0,
            phenotype=phenotype(attributes), stain=random_stain(np.random.default_rng(92)),
        )  # fmt: skip
        images.append(region.image)
        masks.append(nuclei_condition(region.instances))
        captions.append(compose_caption(cancer, attributes))
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1.0
    return TileBatch(
        latents_BCHW=foundation.generator.encode_images(pixels),
        text_BLD=foundation.generator.encode_captions(captions),
        null_text_LD=foundation.null_text_LD,
        weight_B=torch.full((count,), 1 / count),
        condition_BCHW=torch.from_numpy(np.stack(masks)),
    )


@pytest.mark.slow
def test_a_tile_is_easier_with_its_own_mask_than_with_anothers() -> None:
    foundation = load(embedded_path())
    tiles = drawn_tiles(foundation, TRAINED + HELD_OUT)
    adapter = Adapter.attach(
        copy.deepcopy(foundation.generator.denoiser), CONFIG, ("nuclei",),
        num_halvings=num_halvings_of(foundation.generator),
    )  # fmt: skip
    adapter.load_state(initial_state(foundation, CONFIG, 0, ("nuclei",)))
    optimizer = torch.optim.Adam(adapter.trainable("nuclei").values(), lr=2e-3)
    objective, source = Objective(foundation, adapter, STAGE), torch.Generator().manual_seed(0)
    for _ in range(20):
        batch = tiles.select(torch.randint(TRAINED, (8,), generator=source))
        optimizer.zero_grad()
        objective.loss_per_tile(batch, objective.draw(batch, source)).mean().backward()
        optimizer.step()

    held_out = tiles.select(torch.arange(TRAINED, TRAINED + HELD_OUT)).repeat(2)
    assert held_out.condition_BCHW is not None
    draws = objective.draw(held_out, source)
    others = replace(held_out, condition_BCHW=held_out.condition_BCHW.roll(len(held_out) // 2, 0))
    with torch.no_grad():
        own = float(objective.loss_per_tile(held_out, draws).mean())
        other = float(objective.loss_per_tile(others, draws).mean())
        adapter.load_state(initial_state(foundation, CONFIG, 0, ("nuclei",)))
        before = float(objective.loss_per_tile(held_out, draws).mean())
    assert own < 0.9 * before
    assert other > 1.1 * before
