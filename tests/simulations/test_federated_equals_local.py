"""The whole federated path with one site and no noise is local training, to rounding."""

import copy
from functools import partial
from pathlib import Path

import pytest
import torch

from crafts_client.client_app import HOME_KEY, make_client_app
from crafts_client.patients import PatientTiles
from crafts_client.site import Site
from crafts_client.training_task import Randomness
from crafts_core.adapters import Adapter
from crafts_core.plan import Plan
from crafts_core.stages.objective import Objective
from crafts_core.starting_point import initial_state
from crafts_core.tiles import TileStore
from crafts_core.tiles.latents import LatentCache
from crafts_privacy.noise import GridNoise
from crafts_privacy.sampling import PoissonSampler
from crafts_server.collection import Patience
from crafts_server.coordinator import Coordinator
from crafts_server.home import CoordinatorHome, HomeConfig
from crafts_simulations.agreement import agree_on_patients
from crafts_simulations.local_grid import LocalGrid, LocalNode, TurnsHere
from crafts_simulations.small_study import DECLARED_PATIENTS
from support.foundations import tiny_foundation
from support.noise import draws_of
from support.sites import make_site_home, plan_values, without_privacy

SEED = 40


@pytest.mark.slow
def test_one_site_without_noise_equals_local_training(tmp_path: Path) -> None:
    foundation = tiny_foundation(tmp_path / "foundation")
    plan = _plan(foundation)
    coordinator_home = CoordinatorHome.create(
        tmp_path / "coordinator", HomeConfig(foundation=str(foundation.path))
    )
    home = make_site_home(
        tmp_path / "site", foundation, coordinator_home.public_key, allow_non_private=True
    )
    agree_on_patients(coordinator_home, [home.path])
    randomness = Randomness(
        noise=GridNoise(),
        sampler=PoissonSampler(),  # everybody, at sample_rate 1
        generator=partial(draws_of, SEED),
    )
    app = make_client_app(lambda _path: Site(home, foundation, randomness=randomness))
    grid = LocalGrid(
        TurnsHere({"site": LocalNode(app=app, node_config={HOME_KEY: str(home.path)})})
    )

    federated = Coordinator(
        coordinator_home, plan, foundation, patience=Patience(poll_s=0.0, join_wait_s=0.0)
    ).run(grid)

    local = _train_locally(foundation, plan, home)
    start = initial_state(foundation, plan.adapter, plan.study.seed)
    for name, expected in local.items():
        assert not torch.equal(expected, start[name])
        torch.testing.assert_close(federated.state()[name], expected, rtol=1e-3, atol=1e-6)


def _plan(foundation) -> Plan:
    """Plain averaging: no momentum, no alignment step, nothing that could reject a step."""
    values = without_privacy(plan_values(foundation.manifest.hash))
    values["privacy"] |= {"tiles_per_patient": 3, "draws_per_tile": 1}
    values["aggregation"] = {
        "rule": "uniform",
        "min_sites": 1,
        "server_momentum": 0.0,
        "server_learning_rate": 1.0,
        "trust_steps": 0,
        "trust_radius": 0.0,
        "margin_tolerance": 100.0,
        "max_weight": 1.0,
    }
    for stage in values["stage"]:
        stage |= {"learning_rate": 0.2}
    return Plan.parse(values)


def _train_locally(foundation, plan: Plan, home) -> dict[str, torch.Tensor]:
    """One model, plain SGD, the stages one after the other. Nothing of client or server."""
    store = TileStore.open(home.tile_store_path)
    cache = LatentCache.open(store, foundation.manifest.hash)
    patients = PatientTiles(store, cache, foundation)
    adapter = Adapter.attach(copy.deepcopy(foundation.generator.denoiser), plan.adapter)
    adapter.load_state(initial_state(foundation, plan.adapter, plan.study.seed))
    for planned in plan.rounds():
        if planned.starts_stage:
            stage_start = adapter.state()
        weights = list(adapter.trainable(planned.factor).values())
        objective = Objective(foundation, adapter, planned.stage, stage_start)
        for step in range(1, planned.stage.local_steps + 1):
            losses = []
            for patient in range(patients.num_patients):
                generator = draws_of(SEED, step, patients.pseudonym(patient))
                batch = patients.batch(patient, max_tiles=3, generator=generator)
                draws = objective.draw(batch, generator)
                losses.append(objective.loss_per_tile(batch, draws).mean())
            loss = torch.stack(losses).sum() / DECLARED_PATIENTS
            grads = torch.autograd.grad(loss, weights)
            with torch.no_grad():
                for weight, grad in zip(weights, grads, strict=True):
                    weight -= planned.stage.learning_rate * grad
    return adapter.state()
