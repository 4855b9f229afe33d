"""In every stage the sums of sites, added up, are the sum of one site with all their patients."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from crafts_client.errors import TrainingError
from crafts_client.mechanism import mechanism_of
from crafts_client.patients import PatientTiles
from crafts_client.speed import Speed
from crafts_client.trainer import Trainer
from crafts_client.training_task import Randomness, TrainingTask
from crafts_core.foundation import Foundation
from crafts_core.plan import Plan
from crafts_core.plan_sections import Factor, StageConfig
from crafts_core.starting_point import initial_state
from crafts_core.state import factor_names
from crafts_core.tiles.latents import LatentCache
from crafts_privacy.secure_aggregation.fixed_point import from_group
from crafts_privacy.secure_aggregation.masking import add_masks_
from crafts_simulations.small_study import write_random_store
from support.noise import FixedSampler, RecordedSums, draws_of
from support.sum_study import distributed_values

SEED, SITES = 11, 3
STAGES = {
    "pretraining": {"name": "pretraining"},
    "alignment": {"name": "alignment", "lambda_align": 0.1, "lambda_drift": 0.1},
    "control": {"name": "control", "modality": "nuclei"},
}


@pytest.fixture(scope="module")
def patients(tmp_path_factory: pytest.TempPathFactory, foundation: Foundation) -> PatientTiles:
    folder = tmp_path_factory.mktemp("store") / "tiles"
    store = write_random_store(folder, foundation, num_steered=4)
    return PatientTiles(store, LatentCache.open(store, foundation.manifest.hash), foundation)


def task_of(foundation: Foundation, stage: str) -> TrainingTask:
    plan = Plan.parse(distributed_values(foundation.manifest.hash, **STAGES[stage]))
    state = initial_state(foundation, plan.adapter, plan.study.seed, plan.parts)
    factor: Factor = "nuclei" if stage == "control" else "second"
    source = torch.Generator().manual_seed(1)
    for name in factor_names(state, factor):  # behind zeros nothing would happen
        state[name] = state[name] + 0.05 * torch.randn(state[name].shape, generator=source)
    mechanism = mechanism_of(plan, declared_patients=20)
    return TrainingTask(
        stage=plan.stage[0],
        factor=factor,
        privacy=plan.privacy,
        mechanism=mechanism,
        charged=mechanism.event(1),
        state=state,
        stage_start={name: value + 0.01 for name, value in state.items()},
        sum_grid_bits=plan.privacy.sum_grid_bits,
    )


def trainer_of(
    foundation: Foundation, patients: PatientTiles, task: TrainingTask, noise: RecordedSums
) -> Trainer:
    plan = Plan.parse(distributed_values(foundation.manifest.hash, **STAGES[task.stage.name]))
    return Trainer(
        foundation,
        plan.adapter,
        patients,
        parts=plan.parts,
        randomness=Randomness(
            noise=noise, sampler=FixedSampler(), generator=partial(draws_of, SEED)
        ),
        speed=Speed(microbatch_tiles=64),
    )


def opened(trainer: Trainer, task: TrainingTask) -> Tensor:
    """What leaves, without the one mask."""
    vector_D = trainer.hold(task).release(1.0, [(bytes(32), True)])
    add_masks_(vector_D, [(bytes(32), False)])
    return from_group(vector_D)


@pytest.mark.slow
@pytest.mark.parametrize("stage", list(STAGES))
def test_sums_of_sites_are_the_sum_of_everybody(
    foundation: Foundation, patients: PatientTiles, stage: str
) -> None:
    """Each site leaves out the others' patients, and knows nothing of them."""
    task, noise = task_of(foundation, stage), RecordedSums()
    trainer = trainer_of(foundation, patients, task, noise)
    everybody = opened(trainer, task)
    names = [patients.pseudonym(index) for index in range(patients.num_patients)]
    parts = []
    for site in range(SITES):
        others = frozenset(name for place, name in enumerate(names) if place % SITES != site)
        parts.append(opened(trainer, replace(task, withdrawn=others)))
    trainer.hold(task)  # everybody is back
    assert everybody.any()
    assert all(part.any() for part in parts[:2])
    assert torch.equal(torch.stack(parts).sum(dim=0), everybody)


def test_the_held_step_is_the_step_that_the_trainer_takes(
    foundation: Foundation, patients: PatientTiles
) -> None:
    """The same integers that ``train`` adds noise to, on the coarser grid."""
    task, noise = task_of(foundation, "pretraining"), RecordedSums()
    trainer = trainer_of(foundation, patients, task, noise)
    held = opened(trainer, replace(task, sum_grid_bits=24))
    trainer.train(replace(task, sum_grid_bits=None))
    assert torch.equal(held, noise.sums[-1])
    coarse = opened(trainer, task)
    assert float((held / 2.0**6 - coarse).abs().max()) <= patients.num_patients


def test_a_held_step_must_be_what_was_charged(
    foundation: Foundation, patients: PatientTiles
) -> None:
    task = task_of(foundation, "pretraining")
    trainer = trainer_of(foundation, patients, task, RecordedSums())
    with pytest.raises(TrainingError, match="other steps"):
        trainer.hold(replace(task, charged=task.mechanism.event(2)))
    two: StageConfig = task.stage.model_copy(update={"local_steps": 2})
    with pytest.raises(TrainingError, match="other steps"):
        trainer.hold(replace(task, stage=two))
