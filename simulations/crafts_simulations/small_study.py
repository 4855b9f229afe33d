"""A study that takes seconds: a few patients of random tiles, a small adapter, few steps.

For what is not about images: faults, traffic, overhead.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from crafts_client.home import SiteConfig, SiteHome
from crafts_client.policy import Policy
from crafts_core.foundation import Foundation
from crafts_core.plan import Plan
from crafts_core.plan_sections import Modality
from crafts_core.tiles import TileRecord, TileStore, TileStoreWriter, encode_tile
from crafts_core.tiles.conditions import encode_condition, nuclei_condition, to_bytes
from crafts_core.tiles.latents import LatentCache
from crafts_server.home import CoordinatorHome
from crafts_simulations.agreement import agree_on_patients
from crafts_simulations.processes import loopback_config

COHORT = "main"
NUM_PATIENTS = 6
DECLARED_PATIENTS = 10
"""What the sites say. Never the true number, so that taking one for the other shows."""
_CAPTIONS = ("tissue with glands", "tissue with sheets", "tissue with spindle cells")


@dataclass(frozen=True, slots=True, kw_only=True)
class SmallStudy:
    """Homes of a coordinator and its sites, and a plan."""

    coordinator: CoordinatorHome
    sites: dict[str, Path]
    plan: Plan


def make_small_study(
    folder: Path,
    foundation: Foundation,
    *,
    num_sites: int = 2,
    rounds: int = 2,
    min_sites: int = 2,
    deadline_s: float = 120.0,
    rank: int = 2,
    learning_rate: float = 0.01,
    aggregation: Mapping[str, object] | None = None,
    privacy: Mapping[str, object] | None = None,
) -> SmallStudy:
    """Everything that a study needs, in an empty folder.

    ``aggregation`` changes the plan's plain averaging, ``privacy`` its patient-level privacy.
    """
    coordinator = CoordinatorHome.create(folder / "coordinator", loopback_config(foundation.path))
    averaging = {"rule": "uniform", "min_sites": min_sites, "deadline_s": deadline_s}
    plan = _plan(
        *(foundation.manifest.hash, rounds, rank, learning_rate),
        averaging | dict(aggregation or {}),
        privacy or {},
    )
    sites = {}
    for number in range(1, num_sites + 1):
        name = f"site-{number}"
        config = SiteConfig(
            name=name,
            cohort=COHORT,
            declared_patients=DECLARED_PATIENTS,
            device="cpu",
            foundation=str(foundation.path.resolve()),
            tile_store="tiles",
            microbatch_tiles=64,
            answer_every_s=0,
        )
        policy = _policy(plan, coordinator.public_key)
        site = SiteHome.create(folder / "sites" / name, config, policy)
        site.foundation_approvals.approve(foundation.manifest)
        write_random_store(site.tile_store_path, foundation, seed=number)
        sites[name] = site.path
    agree_on_patients(coordinator, sites.values())
    return SmallStudy(coordinator=coordinator, sites=sites, plan=plan)


def write_random_store(
    path: Path,
    foundation: Foundation,
    *,
    num_patients: int = NUM_PATIENTS,
    tiles_each: int = 3,
    seed: int = 0,
    num_steered: int = 0,
    views: int = 1,
) -> TileStore:
    """A finished store of random tiles with its latent cache.

    The first ``num_steered`` patients have nuclei over all tiles but their first.
    """
    rng = np.random.default_rng(seed)
    side = foundation.manifest.tile_px
    with TileStoreWriter(path, cohort=COHORT, tile_px=side, mpp=1.0) as writer:
        for patient in range(num_patients):
            for number in range(tiles_each):
                pixels = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
                record = TileRecord(
                    tile_id=f"{patient:04d}{number:04d}",
                    patient=f"patient{patient:04d}",
                    case="",
                    slide=f"slide{patient:04d}",
                    x=number * side,
                    y=0,
                    level0_width=side,
                    level0_height=side,
                    mpp=1.0,
                    caption=_CAPTIONS[patient % len(_CAPTIONS)],
                    label="",
                    tissue_fraction=1.0,
                    sharpness=1.0,
                )
                conditions: dict[Modality, bytes] = {}
                if patient < num_steered and number > 0:
                    labels = np.kron(rng.integers(0, 3, (4, 4)), np.ones((side // 4, side // 4)))
                    stored = to_bytes(nuclei_condition(labels.astype(np.int64)), "nuclei")
                    conditions = {"nuclei": encode_condition(stored, "nuclei")}
                writer.add(record, encode_tile(pixels), conditions)
    store = TileStore.open(path)
    LatentCache.build(store, foundation, views=views)
    return store


def _plan(
    foundation: str,
    rounds: int,
    rank: int,
    learning_rate: float,
    aggregation: dict[str, object],
    privacy: Mapping[str, object],
) -> Plan:
    stage = {
        "name": "pretraining",
        "rounds": rounds,
        "local_steps": 1,
        "learning_rate": learning_rate,
    }
    protection: dict[str, object] = {
        "mechanism": "patient_dp",
        "target_epsilon": 8.0,
        "delta": 1e-3,
        "max_grad_norm": 1.0,
        "sample_rate": 0.5,
        "tiles_per_patient": 1,
        "draws_per_tile": 1,
    }
    return Plan.parse(
        {
            "study": {"name": "small", "foundation": foundation, "seed": 3},
            "adapter": {
                "kind": "lora",
                "rank": rank,
                "first_factor": "random",
                "schedule": "second_only",
            },
            "stage": [stage],
            "privacy": protection | dict(privacy),
            "aggregation": aggregation,
        }
    )


def _policy(plan: Plan, signer: str) -> Policy:
    shares_noise = plan.privacy.trust == "distributed"
    return Policy(
        allowed_signers=(signer,),
        allowed_stages=("pretraining", "alignment"),
        max_epsilon=8.0,
        max_delta=1e-3,
        lifetime_filters=("sums",),
        min_noise_multiplier=0.0,
        max_sample_rate=plan.privacy.sample_rate,
        min_patients=1,
        max_tiles_per_patient=plan.privacy.tiles_per_patient,
        max_draws_per_tile=plan.privacy.draws_per_tile,
        max_local_steps=10,
        max_rounds=plan.num_rounds,
        max_update_norm=1e6,
        max_adapter_norm=1e6,
        allow_non_private=False,
        require_secure_aggregation=False,
        require_approval=False,
        allowed_trust=("site", "distributed") if shares_noise else ("site",),
        max_epsilon_alone=1e6 if shares_noise else None,
    )
