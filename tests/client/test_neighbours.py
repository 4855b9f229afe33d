"""One patient less moves a step's sum by at most C, whatever adapter a coordinator sends.

Through the installed Trainer, with patients in shared passes: sums of neighbouring cohorts are
compared as integers, on the same draws.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from crafts_client.mechanism import mechanism_of
from crafts_client.patients import PatientTiles
from crafts_client.speed import Speed
from crafts_client.trainer import Trainer
from crafts_client.training_task import Randomness, TrainingTask
from crafts_core.foundation import Foundation
from crafts_core.plan import Plan
from crafts_core.starting_point import initial_state
from crafts_core.state import State
from crafts_core.tiles import TileStore
from crafts_core.tiles.latents import LatentCache
from crafts_privacy.clipping import grid_step
from crafts_privacy.gradients import GroupGradients
from crafts_simulations.small_study import write_random_store
from support.noise import FixedSampler, RecordedSums, draws_of
from support.sites import plan_values

PATIENTS, DECLARED = 12, 40
C = 1e-3
"""So small that every gradient is clipped: each patient adds C and not less."""


@pytest.fixture(scope="module")
def store(tmp_path_factory, foundation: Foundation) -> TileStore:
    folder = tmp_path_factory.mktemp("store") / "tiles"
    return write_random_store(folder, foundation, num_patients=PATIENTS)


class Cohorts:
    """The same trainer on a cohort and on its neighbours."""

    def __init__(
        self, foundation: Foundation, store: TileStore, *, seed: int = 0, cores: int = 2
    ) -> None:
        values = plan_values(foundation.manifest.hash)
        values["privacy"] |= {"max_grad_norm": C, "tiles_per_patient": 4}
        self.plan = Plan.parse(values)
        stage = self.plan.stage[0].model_copy(update={"local_steps": 1})
        self.start = initial_state(foundation, self.plan.adapter, seed=3)
        mechanism = mechanism_of(self.plan, declared_patients=DECLARED)
        self._task = TrainingTask(
            stage=stage,
            factor="second",
            privacy=self.plan.privacy,
            mechanism=mechanism,
            charged=mechanism.event(1),
            state=self.start,
            stage_start=None,
        )
        self._store = store
        self._patients = PatientTiles(
            store, LatentCache.open(store, foundation.manifest.hash), foundation
        )
        self._foundation, self._seed, self._cores = foundation, seed, cores
        self._trainers: dict[int, tuple[Trainer, RecordedSums]] = {}

    def sum_of(self, state: State, *, group: int, without: int | None = None, **task: object):
        """The clipped sum of everybody but one, in whole grid steps."""
        trainer, noise = self._trainer(group)
        names = [] if without is None else [self._store.patients[without]]
        task = {"state": state, "withdrawn": frozenset(names)} | task
        trainer.train(replace(self._task, **task))
        return noise.sums.pop()

    def most_moved(self, state: State, *, group: int, patients: range, **task: object) -> float:
        """How far the sum moves when one is taken out, in units of C."""
        whole = self.sum_of(state, group=group, **task)
        moved = [
            whole - self.sum_of(state, group=group, without=patient, **task) for patient in patients
        ]
        return max(length(difference) for difference in moved)

    def _trainer(self, group: int) -> tuple[Trainer, RecordedSums]:
        if group not in self._trainers:
            noise = RecordedSums()
            privacy = self.plan.privacy
            rows = privacy.tiles_per_patient * privacy.draws_per_tile
            trainer = Trainer(
                self._foundation,
                self.plan.adapter,
                self._patients,
                randomness=Randomness(
                    noise=noise, sampler=FixedSampler(), generator=partial(draws_of, self._seed)
                ),
                speed=Speed(
                    microbatch_tiles=rows * group * self._cores,
                    group_rows=rows * group,
                    cores=self._cores,
                ),
            )
            # An honest adapter in the first round, so that sharing a pass is believed in.
            trainer.train(replace(self._task, state=self.start))
            noise.sums.clear()
            self._trainers[group] = trainer, noise
        return self._trainers[group]


def length(difference: Tensor) -> float:
    """In units of C; the differences are whole numbers, so this is exact to float64."""
    assert torch.equal(difference, difference.round())
    return float(difference.norm()) * grid_step(C) / C


def hostile(start: State, *, seed: int) -> State:
    """Any finite adapter: entries of a deviation from 0.1 to 30, in one tensor or in all."""
    source = torch.Generator().manual_seed(seed)
    std = 0.1 * 300 ** float(torch.rand((), generator=source))
    chosen = [name for name in start if torch.rand((), generator=source) < 0.7] or list(start)
    return {
        name: value + std * torch.randn(value.shape, generator=source) * (name in chosen)
        for name, value in start.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "adapters",
    [
        # With the last two 1.06 C and 1.36 C were measured where a last pass was smaller.
        pytest.param([0, 2, 4, 6, 42, 56], id="few"),
        pytest.param(range(200), id="200", marks=pytest.mark.exhaustive),
    ],
)
def test_one_patient_less_moves_the_sum_by_no_more_than_the_bound(
    foundation, store, adapters: Sequence[int], caplog
) -> None:
    cohorts = Cohorts(foundation, store)
    moved = [
        cohorts.most_moved(
            hostile(cohorts.start, seed=seed),
            group=2 + seed % 7,
            patients=range(seed % PATIENTS, seed % PATIENTS + 1),
        )
        for seed in adapters
    ]
    assert max(moved) <= 1.0
    assert not caplog.records, "patients were trained one by one, which is not what this looks at"
    # Of a hostile adapter's gradients many are not finite and become zero; not of all.
    assert sum(length > 0.99 for length in moved) > len(adapters) / 4


MINDED = {
    "rows that weigh something": lambda loss_B: loss_B != 0,
    "rows that are not finite": torch.isnan,
}


@pytest.mark.slow
@pytest.mark.parametrize("minded", MINDED)
def test_a_pass_that_minds_its_company_is_found_and_not_used(
    foundation, store, monkeypatch, caplog, minded: str
) -> None:
    """Found with the adapter of the very round, and the bound holds all the same."""
    cohorts = Cohorts(foundation, store)
    honest = cohorts.sum_of(cohorts.start, group=5)
    whole_pass = GroupGradients.compute

    def minding(self, loss_B: Tensor) -> Tensor:
        """Rounds otherwise by how many such rows there are: as in a pass of another shape."""
        return whole_pass(self, loss_B) * (1 + 1e-3 * float(MINDED[minded](loss_B).sum()))

    monkeypatch.setattr(GroupGradients, "compute", minding)
    assert cohorts.most_moved(cohorts.start, group=5, patients=range(2)) <= 1.0
    assert "not isolated to the last bit with this round's adapter" in caplog.text
    assert torch.allclose(cohorts.sum_of(cohorts.start, group=5), honest, rtol=1e-3, atol=1e3)


@pytest.mark.slow
def test_passes_that_mind_each_other_are_found_and_not_used(
    foundation, store, monkeypatch, caplog
) -> None:
    """One patient to a pass, and two passes at a time."""
    honest = Cohorts(foundation, store, cores=1)
    wanted = honest.sum_of(honest.start, group=1)
    pass_alone, num_empty = GroupGradients.compute, [0]

    def minding(self, loss_B: Tensor) -> Tensor:
        grad_PD = pass_alone(self, loss_B) * (1 + 1e-3 * num_empty[0])
        num_empty[0] += int((loss_B == 0).sum())
        return grad_PD

    monkeypatch.setattr(GroupGradients, "compute", minding)
    cohorts = Cohorts(foundation, store, cores=2)
    found = cohorts.sum_of(cohorts.start, group=1)
    assert "not isolated to the last bit" in caplog.text
    assert torch.allclose(found, wanted, rtol=1e-3, atol=1e3)


@pytest.mark.slow
@pytest.mark.parametrize("std", [0.0, 5.0])
def test_who_else_is_drawn_moves_nobodys_draws(foundation, store, std: float) -> None:
    """Tiles, noise and timesteps belong to a step and a patient: sums simply add up."""
    cohorts = Cohorts(foundation, store)
    source = torch.Generator().manual_seed(1)
    state = {
        name: value + std * torch.randn(value.shape, generator=source)
        for name, value in cohorts.start.items()
    }
    everybody = cohorts.sum_of(state, group=1)
    rest = cohorts.sum_of(state, group=1, without=0)
    others = [name for name in store.patients if name != store.patients[0]]
    alone = cohorts.sum_of(state, group=1, withdrawn=frozenset(others))
    assert torch.equal(everybody, rest + alone)
    assert alone.any()
