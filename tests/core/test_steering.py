"""How far a ControlNet is followed: the same figures whatever a site's salt."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from crafts_core.control_net import build_control_net, num_halvings_of
from crafts_core.evaluation.steering import SteeringConfig, measure_steering, others_of
from crafts_core.tiles import TileStore
from crafts_core.tiles.conditions import STORED_CHANNELS, encode_condition
from crafts_core.tiles.records import TileRecord, encode_tile
from crafts_core.tiles.writer import TileStoreWriter
from support.foundations import tiny_foundation


def write(path: Path, pseudonyms: list[str]) -> TileStore:
    """Two tiles of each patient, all with a mask, under these pseudonyms, whose order is theirs."""
    rng = np.random.default_rng(0)
    images = rng.integers(256, size=(2 * len(pseudonyms), 32, 32, 3), dtype=np.uint8)
    stored = rng.integers(2, size=(len(images), STORED_CHANNELS["nuclei"], 32, 32), dtype=np.uint8)
    with TileStoreWriter(path, cohort="x", tile_px=32, mpp=1.0) as writer:
        for place in np.argsort(pseudonyms, kind="stable"):
            name = pseudonyms[place]
            for row in (2 * place, 2 * place + 1):
                record = TileRecord(
                    tile_id=f"{name}-{row}", patient=name, case="c", slide="s", x=0, y=0,
                    level0_width=1, level0_height=1, mpp=1.0, caption=f"tissue {row % 3}",
                    label="", tissue_fraction=1, sharpness=1,
                )  # fmt: skip
                mask = encode_condition(stored[row], "nuclei")
                writer.add(record, encode_tile(images[row]), {"nuclei": mask})
    return TileStore.open(path)


def test_two_salts_give_the_same_figures(tmp_path: Path) -> None:
    """Of some of the tiles, so that which are drawn and whose is the other one matters."""
    generator = tiny_foundation(tmp_path / "f", seed=1).generator
    network = build_control_net(generator.unet, "nuclei", num_halvings=num_halvings_of(generator))
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=source))
    stores = [
        write(tmp_path / "a", ["7f", "02", "c1", "90", "44"]),
        write(tmp_path / "b", ["13", "e0", "25", "08", "9d"]),
    ]
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
