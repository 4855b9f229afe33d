"""A scenario small enough for tests: two hospitals of six patients, two rounds of each stage."""

import copy
from pathlib import Path
from typing import Any

from crafts_simulations.scenario import Scenario, parse_scenario


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


def tiny_scenario(foundation: Path) -> Scenario:
    return parse_scenario(tiny_scenario_values(foundation), "tiny")
