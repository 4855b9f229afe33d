"""A scenario small enough for tests: two hospitals of six patients, two rounds of each stage."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from crafts_client.ingest.table import TableColumns
from crafts_simulations.scenario import Scenario, parse_scenario
from crafts_simulations.sites import TileSource


def tiny_site(name: str, code: str, seed: int) -> dict[str, Any]:
    return {
        "name": name,
        "num_patients": 6,
        "declared_patients": 8,
        "heldout_patients": 4,
        "slide_px": 128,
        "mpp": 1.0,
        "cancer_mix": {code: 1.0},
        "stain_seed": seed,
        "seed": seed,
    }


def tiny_scenario_values(foundation: Path) -> dict[str, Any]:
    """As a TOML file would hold it."""
    stage = {"rounds": 2, "local_steps": 2, "learning_rate": 0.05}
    values: dict[str, Any] = {
        "scenario": {
            "title": "Tiny",
            "foundation": str(foundation),
            "max_tiles_per_slide": 3,
        },
        "evaluation": {"num_images": 16, "num_inference_steps": 2, "num_bootstrap": 20},
        "site": [tiny_site("north", "LUAD", 1), tiny_site("south", "COAD", 2)],
        "study": {"name": "tiny", "seed": 3},
        "adapter": {"kind": "lora", "rank": 2, "first_factor": "random"},
        "stage": [
            {"name": "pretraining", **stage},
            {"name": "alignment", **stage, "lambda_align": 0.1, "lambda_drift": 0.1},
        ],
        "privacy": {
            "mechanism": "patient_dp",
            "target_epsilon": 8.0,
            "delta": 1e-3,
            "max_grad_norm": 1.0,
            "sample_rate": 0.5,
            "tiles_per_patient": 2,
            "draws_per_tile": 2,
        },
        "aggregation": {"rule": "alignment_regularized", "min_sites": 2},
    }
    return copy.deepcopy(values)


def tiles_scenario_values(foundation: Path) -> dict[str, Any]:
    """Three sites out of one folder of tiles, one round: the quickest whole study."""
    values = tiny_scenario_values(foundation)
    del values["site"]
    values["tiles"] = {"num_sites": 3, "alpha": 2.0, "heldout_fraction": 0.25, "seed": 1}
    values["stage"] = [values["stage"][0] | {"rounds": 1}]
    return values


def tile_source(directory: Path) -> TileSource:
    """Forty-eight tiles of twenty-four patients, with columns of their own names."""
    rng = np.random.default_rng(0)
    folder = directory / "tiles"
    folder.mkdir()
    lines = ["picture\twho\tkind"]
    for patient in range(24):
        kind = ("lung_aca", "lung_n")[patient % 2]
        for tile in range(2):
            name = f"{patient}-{tile}.png"
            pixels = rng.integers(0, 256, (48, 48, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name)
            lines.append(f"{name}\t{patient}\t{kind}")
    (directory / "labels.tsv").write_text("\n".join(lines) + "\n")
    columns = TableColumns(file=("picture",), patient=("who",), label=("kind",))
    return TileSource(folder=folder, labels=directory / "labels.tsv", columns=columns)


def tiny_scenario(foundation: Path) -> Scenario:
    return parse_scenario(tiny_scenario_values(foundation), "tiny")
