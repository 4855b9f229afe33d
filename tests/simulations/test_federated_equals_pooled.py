"""A distributed study by real sites ends where one engine over all their patients ends: to the bit.

Coordinator and sites are the programs' own, over the local grid. The reference is the engine of a
single site that holds everybody's patients and is given the noise that the sites drew.
"""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from crafts_client.patients import PatientTiles
from crafts_client.trainer import Speed, Trainer, TrainingTask
from crafts_core.foundation import Foundation
from crafts_core.plan import Plan
from crafts_core.stages.batch import TileBatch
from crafts_core.starting_point import initial_state
from crafts_core.state import State
from crafts_core.tiles import TileStore
from crafts_core.tiles.latents import LatentCache
from crafts_privacy.mechanism import Mechanism
from crafts_privacy.optimizers import Optimizer, optimizer_of
from crafts_privacy.patient_sgd import PatientSGD
from crafts_privacy.plan_noise import plan_noise_multiplier
from crafts_privacy.ranks import Ranks
from crafts_privacy.sampling import PatientSampler
from crafts_privacy.secure_aggregation.shares import own_noise_multiplier, total_noise_multiplier
from support.federations import Federation, Noted, randomness
from support.foundations import tiny_foundation
from support.sites import plan_values


class Given:
    """The noise of all sites together, round by round."""

    def __init__(self, sites: Sequence[Noted]) -> None:
        self._rounds = iter(zip(*(site.drawn for site in sites), strict=True))

    def add_(self, grid_sum_D: Tensor, _std: float) -> None:
        grid_sum_D += torch.stack(next(self._rounds)).sum(dim=0)


class Pooled(PatientTiles):
    """The patients of all sites, site after site."""

    def __init__(self, sites: Sequence[PatientTiles]) -> None:
        self._all = [(site, place) for site in sites for place in range(site.num_patients)]

    def leave_out(self, withdrawn: Collection[str]) -> None:
        assert not withdrawn

    def of_rank(self, ranks: Ranks) -> Sequence[int]:
        assert ranks.count == 1
        return range(len(self._all))

    def pseudonym(self, patient: int) -> str:
        site, place = self._all[patient]
        return site.pseudonym(place)

    def batch(self, patient: int, **options: object) -> TileBatch:
        site, place = self._all[patient]
        return site.batch(place, **options)  # type: ignore[arg-type]


class PooledTrainer(Trainer):
    """Goes on with one optimizer, on the grid of sums."""

    optimizer: Optimizer
    grid_bits: int

    def _sgd(
        self,
        task: TrainingTask,
        parameters: Mapping[str, nn.Parameter],
        sampler: PatientSampler,
        ranks: Ranks | None = None,
    ) -> PatientSGD:
        return PatientSGD(
            dict(sorted(parameters.items())),
            task.mechanism,
            learning_rate=task.stage.learning_rate,
            optimizer=self.optimizer,
            noise=self._randomness.noise,
            sampler=sampler,
            ranks=ranks,
            grid_bits=self.grid_bits,
        )


def plan_of(foundation: Foundation, num_sites: int, stages: list[dict[str, object]]) -> Plan:
    values = plan_values(foundation.manifest.hash)
    values["adapter"] |= {"schedule": "second_only"}  # type: ignore[operator]
    values["stage"] = stages
    values["privacy"] |= {  # type: ignore[operator]
        "tiles_per_patient": 2,
        "draws_per_tile": 1,
        "trust": "distributed",
        "colluding_sites": max(1, num_sites // 5),
        "sum_grid_bits": 17,
    }
    values["aggregation"] = {
        "rule": "uniform",
        "min_sites": num_sites,
        "secure_aggregation": True,
    }
    return Plan.parse(values)


def stage_of(name: str, optimizer: str, **more: object) -> dict[str, object]:
    settings = {"sgd": {"momentum": 0.6}, "adam": {"momentum": 0.9, "second_moment_decay": 0.99}}
    return {
        "name": name,
        "rounds": 2,
        "local_steps": 1,
        "learning_rate": 0.05,
        "optimizer": optimizer,
        **settings[optimizer],
        **more,
    }


def check(tmp_path: Path, num_sites: int, stages: list[dict[str, object]], **home: int) -> None:
    foundation = tiny_foundation(tmp_path / "foundation")
    plan = plan_of(foundation, num_sites, stages)
    federation = Federation(
        *(tmp_path, foundation, num_sites),
        allowed_trust=("distributed",),
        max_epsilon_alone=1e6,
        **home,
    )
    homes, noise = federation.homes, federation.noise
    federated = federation.run(plan)[-1].state()

    patients = [
        PatientTiles(store, LatentCache.open(store, foundation.manifest.hash), foundation)
        for store in (TileStore.open(each.tile_store_path) for each in homes)
    ]
    total = sum(each.config.declared_patients for each in homes)
    expected = _train_pooled(
        plan, foundation, Pooled(patients), Given(list(noise.values())), num_sites, total
    )
    start = initial_state(foundation, plan.adapter, plan.study.seed, plan.parts)
    assert any(not torch.equal(federated[name], start[name]) for name in start)
    for name in expected:
        assert torch.equal(federated[name], expected[name]), name


def _train_pooled(
    plan: Plan,
    foundation: Foundation,
    patients: Pooled,
    noise: Given,
    num_sites: int,
    declared_patients: int,
) -> State:
    """The plan's steps by one engine. Nothing of server or sums."""
    trainer = PooledTrainer(
        foundation,
        plan.adapter,
        patients,
        parts=plan.parts,
        randomness=randomness(noise),
        speed=Speed(microbatch_tiles=64),
    )
    trainer.grid_bits = plan.privacy.sum_grid_bits or 0
    colluding = plan.privacy.colluding_sites or 0
    share = own_noise_multiplier(
        plan_noise_multiplier(plan), num_members=num_sites, colluding_sites=colluding
    )
    mechanism = Mechanism(
        noise_multiplier=total_noise_multiplier([share] * num_sites),
        max_grad_norm=plan.privacy.max_grad_norm,
        sample_rate=plan.privacy.sample_rate,
        expected_patients=plan.privacy.sample_rate * declared_patients,
    )
    state = initial_state(foundation, plan.adapter, plan.study.seed, plan.parts)
    for planned in plan.rounds():
        if planned.starts_stage:
            stage_start = state
            trainer.optimizer = optimizer_of(planned.stage)
        task = TrainingTask(
            stage=planned.stage,
            factor=planned.factor,
            privacy=plan.privacy,
            mechanism=mechanism,
            charged=mechanism.event(1),
            state=state,
            stage_start=stage_start if planned.stage.lambda_drift > 0 else None,
        )
        trainer.train(task)
        state = trainer.schema()
    return state


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_three_sites_equal_pooled_training(tmp_path: Path, optimizer: str) -> None:
    check(
        tmp_path,
        3,
        [
            stage_of("pretraining", optimizer),
            stage_of("alignment", optimizer, lambda_align=0.1, lambda_drift=0.1),
        ],
    )


@pytest.mark.slow
def test_stage_control_equals_pooled_training(tmp_path: Path) -> None:
    check(tmp_path, 3, [stage_of("control", "sgd", modality="nuclei")], num_steered=2)


@pytest.mark.exhaustive
@pytest.mark.parametrize("num_sites", [10, 30])
def test_many_sites_equal_pooled_training(tmp_path: Path, num_sites: int) -> None:
    check(tmp_path, num_sites, [stage_of("pretraining", "sgd")])
