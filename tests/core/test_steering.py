"""How far a ControlNet is followed: the same figures whatever a site's salt."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from crafts_core.control_net import build_control_net, num_halvings_of
from crafts_core.evaluation.steering import SteeringConfig, measure_steering, others_of
from support.foundations import tiny_foundation
from support.salts import SALTS, write_salted


def test_two_salts_give_the_same_figures(tmp_path: Path) -> None:
    """Of some of the tiles, so that which are drawn and whose is the other one matters."""
    generator = tiny_foundation(tmp_path / "f", seed=1).generator
    network = build_control_net(
        generator.denoiser, "nuclei", num_halvings=num_halvings_of(generator)
    )
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(0.5 * torch.randn(weight.shape, generator=source))
    stores = [write_salted(tmp_path / names[0], names, tile_px=32, masks=True) for names in SALTS]
    config = SteeringConfig(max_tiles=6, draws_per_tile=1, num_inference_steps=2)
    first, second = (
        measure_steering(generator, network, store, "nuclei", config) for store in stores
    )
    assert first == second
    assert first.loss_own != first.loss_other
    other_seed = replace(config, seed=1)
    assert measure_steering(generator, network, stores[0], "nuclei", other_seed) != first


@pytest.mark.parametrize(
    "patients, others",
    [([0, 0, 1, 1], [2, 2, 0, 0]), ([0, 1, 0, 2], [1, 2, 3, 0]), ([0, 0, 0], [1, 2, 0])],
)
def test_the_other_condition_is_another_patients_where_there_is_one(
    patients: list[int], others: list[int]
) -> None:
    assert others_of(np.array(patients)).tolist() == others
