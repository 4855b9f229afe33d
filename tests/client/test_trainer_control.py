"""Control at a site: everybody is sampled, who has no mask adds nothing, the path is checked."""

import copy
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from crafts_client.mechanism import mechanism_of
from crafts_client.patients import PatientTiles
from crafts_client.site import Site
from crafts_client.speed import Speed
from crafts_client.trainer import Trainer
from crafts_client.training_task import Randomness, TrainingTask
from crafts_core import adapters
from crafts_core.adapters import Adapter
from crafts_core.exchange import schema_hash
from crafts_core.foundation import Foundation
from crafts_core.plan import Plan
from crafts_core.stages.objective import BatchCoupledLossError, Objective
from crafts_core.starting_point import initial_state
from crafts_core.state import State, factor_names
from crafts_core.tiles.augment import turned_as_view
from crafts_core.tiles.conditions import to_floats
from crafts_core.tiles.latents import LatentCache, tile_keys
from crafts_privacy.gradients import GroupGradients
from crafts_privacy.ledger import Ledger
from crafts_simulations.small_study import DECLARED_PATIENTS, write_random_store
from support.noise import FixedSampler, NoNoise, draws_of
from support.sites import control_values, make_site_home, without_privacy

STEERED, PATIENTS = 4, 6


def cohort(path, foundation: Foundation, **options) -> PatientTiles:
    store = write_random_store(path / "tiles", foundation, num_steered=STEERED, **options)
    return PatientTiles(store, LatentCache.open(store, foundation.manifest.hash), foundation)


@pytest.fixture(scope="module")
def patients(tmp_path_factory, foundation: Foundation) -> PatientTiles:
    return cohort(tmp_path_factory.mktemp("store"), foundation)


@pytest.fixture(scope="module")
def plan(foundation: Foundation) -> Plan:
    return Plan.parse(control_values(foundation.manifest.hash))


@pytest.fixture(scope="module")
def open_plan(foundation: Foundation) -> Plan:
    return Plan.parse(without_privacy(control_values(foundation.manifest.hash)))


def moved(foundation: Foundation, plan: Plan) -> State:
    """A state behind whose zero convolutions something happens."""
    state = initial_state(foundation, plan.adapter, plan.study.seed, plan.parts)
    source = torch.Generator().manual_seed(1)
    for name in factor_names(state, "nuclei"):
        state[name] = state[name] + 0.05 * torch.randn(state[name].shape, generator=source)
    return state


def train(foundation, plan, patients, *, rows: int = 1, **changes) -> State:
    randomness = Randomness(
        noise=NoNoise(),
        sampler=changes.pop("sampler", FixedSampler()),
        generator=partial(draws_of, 11),
    )
    trainer = Trainer(
        foundation,
        plan.adapter,
        patients,
        parts=plan.parts,
        randomness=randomness,
        speed=Speed(microbatch_tiles=64, group_rows=rows),
    )
    mechanism = mechanism_of(plan, declared_patients=DECLARED_PATIENTS)
    task = TrainingTask(
        stage=plan.stage[0],
        factor="nuclei",
        privacy=plan.privacy,
        mechanism=mechanism,
        charged=mechanism.event(plan.stage[0].local_steps),
        state=changes.pop("state", moved(foundation, plan)),
        stage_start=None,
    )
    return trainer.train(replace(task, **changes))


@pytest.mark.slow
def test_without_noise_it_equals_a_plain_torch_loop(foundation, open_plan, patients) -> None:
    state, stage = moved(foundation, open_plan), open_plan.stage[0]
    delta = train(foundation, open_plan, patients, state=state)

    unet = copy.deepcopy(foundation.generator.denoiser)
    adapter = Adapter.attach(unet, open_plan.adapter, open_plan.parts, num_halvings=2)
    adapter.load_state(state)
    weights = adapter.trainable("nuclei")
    optimizer = torch.optim.SGD(weights.values(), lr=stage.learning_rate)
    objective = Objective(foundation, adapter, stage)
    for step in range(1, stage.local_steps + 1):
        optimizer.zero_grad()
        total = torch.zeros(())
        for patient in range(PATIENTS):
            source = draws_of(11, step, patients.pseudonym(patient))
            tiles = patients.batch(patient, max_tiles=2, generator=source, modality="nuclei")
            batch = tiles.repeat(2)
            draws = objective.draw(batch, source)
            if len(batch):
                total = total + objective.loss_per_tile(batch, draws).mean()
        (total / DECLARED_PATIENTS).backward()
        optimizer.step()

    assert delta.keys() == weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(delta[name], weight.detach() - state[name], rtol=1e-3, atol=1e-6)
    assert sum(float(value.norm()) for value in delta.values()) > 0


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 24])
def test_who_has_no_mask_is_sampled_and_adds_nothing(foundation, plan, patients, rows: int) -> None:
    without = train(foundation, plan, patients, rows=rows, sampler=FixedSampler([4, 5]))
    assert all(not value.any() for value in without.values())
    mixed, alone = (
        train(foundation, plan, patients, rows=rows, sampler=FixedSampler(who))
        for who in ([0, 4, 5], [0])
    )
    assert any(value.any() for value in alone.values())
    for name in alone:
        torch.testing.assert_close(mixed[name], alone[name], rtol=1e-4, atol=1e-8)


def test_the_sampler_draws_from_the_whole_cohort_at_the_plans_rate(
    foundation, plan, patients
) -> None:
    asked = []

    class Noting:
        def sample(self, num_patients: int, sample_rate: float) -> np.ndarray:
            asked.append((num_patients, sample_rate))
            return np.array([], dtype=np.int64)

    train(foundation, plan, patients, sampler=Noting())
    assert asked == [(PATIENTS, plan.privacy.sample_rate)] * plan.stage[0].local_steps


@pytest.mark.slow
def test_several_patients_in_one_pass_are_the_loop(
    foundation, open_plan, patients, monkeypatch
) -> None:
    filled, counted = [], GroupGradients.compute

    def compute(self, loss_B):
        grad_PD = counted(self, loss_B)
        filled.append([bool(row.any()) for row in grad_PD])
        return grad_PD

    monkeypatch.setattr(GroupGradients, "compute", compute)
    one, several = (train(foundation, open_plan, patients, rows=rows) for rows in (1, 24))
    assert filled[-1] == [True] * 4 + [False] * 2, "with and without masks in one group"
    for name in one:
        torch.testing.assert_close(one[name], several[name], rtol=1e-3, atol=1e-6)


def test_only_tiles_with_a_mask_are_drawn(foundation, patients) -> None:
    source = torch.Generator().manual_seed(0)
    batch = patients.batch(0, max_tiles=9, generator=source, modality="nuclei")
    assert len(batch) == 2, "the first tile has none"
    assert batch.weight_B.sum() == pytest.approx(1.0)
    assert batch.condition_BCHW is not None
    assert batch.condition_BCHW.shape[1] == 3
    assert len(patients.batch(0, max_tiles=9, generator=source)) == 3
    assert len(patients.batch(5, max_tiles=9, generator=source, modality="nuclei")) == 0


def test_a_mask_turns_with_the_view_of_its_tile(foundation, tmp_path) -> None:
    patients = cohort(tmp_path, foundation, views=4)
    store, keys = patients._store, tile_keys(patients._store)
    seen = set()
    for seed in range(8):
        source = torch.Generator().manual_seed(seed)
        batch = patients.batch(1, max_tiles=9, generator=source, modality="nuclei")
        for latent, condition in zip(batch.latents_BCHW, batch.condition_BCHW, strict=True):
            row, view = next(
                (row, view)
                for row in store.tile_rows_of(1)
                for view in range(4)
                if torch.equal(patients._cache.latents([row], [view])[0], latent)
            )
            seen.add(view)
            stored = store.read_conditions([row], "nuclei")[0].transpose(1, 2, 0)
            turned = turned_as_view(stored, view, key=keys[row]).transpose(2, 0, 1)
            assert np.array_equal(condition.numpy(), to_floats(turned, "nuclei"))
    assert seen == {0, 1, 2, 3}


def test_tiles_that_meet_behind_zero_convolutions_are_found(
    foundation, plan, patients, monkeypatch
) -> None:
    """At the start nothing passes the zero convolutions, and still the check sees behind them."""
    steer = adapters.steering

    def coupled(control, noisy, timesteps, text, image):
        return steer(control, noisy, timesteps, text, image + image.mean(dim=0))

    monkeypatch.setattr(adapters, "steering", coupled)
    start = initial_state(foundation, plan.adapter, plan.study.seed, plan.parts)
    with pytest.raises(BatchCoupledLossError):
        train(foundation, plan, patients, state=start)


def test_a_wrong_shortcut_is_found_before_the_first_round(
    foundation, plan, patients, monkeypatch, caplog
) -> None:
    """Stem gradients are zero at the start; they are compared where they are not."""
    counted = GroupGradients.compute

    def wrong(self, loss_B):
        grad_PD = counted(self, loss_B)
        stem = sum(parameter.numel() for parameter in list(self._parameters)[:4])
        grad_PD[:, :stem] *= 3
        return grad_PD

    monkeypatch.setattr(GroupGradients, "compute", wrong)
    start = initial_state(foundation, plan.adapter, plan.study.seed, plan.parts)
    train(foundation, plan, patients, state=start, rows=24)
    assert "training without them" in caplog.text


@pytest.mark.slow
def test_a_site_answers_a_control_round_and_pays_for_it(tmp_path, foundation, coordinator) -> None:
    home = make_site_home(
        tmp_path / "site", foundation, coordinator.public_key, num_steered=3,
        allowed_stages=("control",),
    )  # fmt: skip
    hospital = Site(home, foundation)
    plan = Plan.parse(control_values(foundation.manifest.hash))
    state = coordinator.start(plan)
    release = hospital.answer(coordinator.message(plan, state))
    wanted = {name: state[name] for name in factor_names(state, "nuclei")}
    assert release.reply.schema_hash == schema_hash(wanted)
    assert all(bool(value.any()) for value in release.delta.values()), "noise is in every tensor"
    (event,) = Ledger(home.ledger_path).events("main")
    assert (event.steps, event.sample_rate) == (2, 0.5)
    assert {entry.stage for entry in Ledger(home.ledger_path).entries()} == {"", "control"}, (
        "and its place"
    )
