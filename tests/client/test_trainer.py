import copy
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats

from crafts_client import trainer as trainer_module
from crafts_client.answer_times import PublicStep
from crafts_client.errors import TrainingError
from crafts_client.home import SiteConfig
from crafts_client.mechanism import mechanism_of
from crafts_client.patients import PatientTiles
from crafts_client.shortcuts import Shortcuts
from crafts_client.speed import Speed
from crafts_client.trainer import Trainer
from crafts_client.training_task import Randomness, TrainingTask, entropy_generator
from crafts_core.adapters import Adapter
from crafts_core.exchange import global_norm
from crafts_core.foundation import Foundation, load
from crafts_core.plan import Plan
from crafts_core.stages.batch import TileBatch, draw
from crafts_core.stages.objective import BatchCoupledLossError, Objective
from crafts_core.starting_point import initial_state
from crafts_core.state import State, add_delta
from crafts_core.tiles.latents import LatentCache
from crafts_privacy.accounting import PrivacyEvent, epsilon
from crafts_privacy.gradients import GroupGradients
from crafts_privacy.noise import ExactNoise, GridNoise
from crafts_privacy.ranks import Alone
from crafts_privacy.sampling import PoissonSampler
from crafts_simulations.small_study import DECLARED_PATIENTS, write_random_store
from support.noise import FixedSampler, NoNoise, draws_of
from support.sites import plan_values, without_privacy

pytestmark = pytest.mark.slow

SEED = 11


@pytest.fixture(scope="module")
def patients(tmp_path_factory, foundation: Foundation) -> PatientTiles:
    store = write_random_store(tmp_path_factory.mktemp("store") / "tiles", foundation)
    return PatientTiles(store, LatentCache.open(store, foundation.manifest.hash), foundation)


@pytest.fixture
def plan(foundation: Foundation) -> Plan:
    return Plan.parse(plan_values(foundation.manifest.hash))


@pytest.fixture
def open_plan(foundation: Foundation) -> Plan:
    """Without privacy, everybody in every step, all tiles."""
    values = without_privacy(plan_values(foundation.manifest.hash))
    values["privacy"] |= {"tiles_per_patient": 3}
    values["stage"][0] |= {"learning_rate": 0.5, "momentum": 0.5, "local_steps": 3}
    return Plan.parse(values)


def seeded(**changes: object) -> Randomness:
    values = {
        "noise": GridNoise(),
        "sampler": PoissonSampler(),
        "generator": partial(draws_of, SEED),
    }
    return Randomness(**(values | changes))


def trainer_of(foundation, plan, patients, *, microbatch_tiles=64, speed=None, **changes):
    return Trainer(
        foundation,
        plan.adapter,
        patients,
        randomness=seeded(**changes),
        speed=speed or Speed(microbatch_tiles=microbatch_tiles),
    )


def task_of(foundation, plan, *, stage: int = 0, factor: str = "second", **changes) -> TrainingTask:
    state = initial_state(foundation, plan.adapter, seed=plan.study.seed)
    mechanism = changes.get("mechanism", mechanism_of(plan, declared_patients=DECLARED_PATIENTS))
    values = {
        "stage": plan.stage[stage],
        "factor": factor,
        "privacy": plan.privacy,
        "mechanism": mechanism,
        "charged": mechanism.event(changes.get("stage", plan.stage[stage]).local_steps),
        "state": state,
        "stage_start": state,
    }
    return TrainingTask(**(values | changes))


def test_without_noise_it_equals_a_plain_torch_loop(foundation, open_plan, patients) -> None:
    """The oracle knows nothing of PatientSGD, microbatches or the trainer."""
    task = task_of(foundation, open_plan)
    delta = trainer_of(foundation, open_plan, patients, microbatch_tiles=2).train(task)

    unet = copy.deepcopy(foundation.generator.denoiser)
    adapter = Adapter.attach(unet, open_plan.adapter)
    adapter.load_state(task.state)
    weights = adapter.trainable("second")
    stage = open_plan.stage[0]
    optimizer = torch.optim.SGD(weights.values(), lr=stage.learning_rate, momentum=stage.momentum)
    objective = Objective(foundation, adapter, stage, task.state)
    for step in range(1, stage.local_steps + 1):
        optimizer.zero_grad()
        losses = []
        for patient in range(patients.num_patients):
            generator = draws_of(SEED, step, patients.pseudonym(patient))
            batch = patients.batch(patient, max_tiles=3, generator=generator)
            latents = batch.latents_BCHW.repeat_interleave(2, dim=0)
            draws = draw(
                batch.repeat(2), num_timesteps=1000, caption_dropout=0.1, generator=generator
            )
            assert len(latents) == 6
            losses.append(objective.loss_per_tile(batch.repeat(2), draws).mean())
        (torch.stack(losses).sum() / DECLARED_PATIENTS).backward()  # not by who is there
        optimizer.step()

    for name, weight in weights.items():
        expected = weight.detach() - task.state[name]
        assert expected.norm() > 0
        torch.testing.assert_close(delta[name], expected, rtol=1e-3, atol=1e-7)


def test_the_size_of_a_microbatch_changes_nothing(foundation, open_plan, patients) -> None:
    task = task_of(foundation, open_plan)

    whole = trainer_of(foundation, open_plan, patients).train(task)
    parts = trainer_of(foundation, open_plan, patients, microbatch_tiles=1).train(task)

    for name in whole:
        torch.testing.assert_close(whole[name], parts[name], rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("factor", ["first", "second", "both"])
@pytest.mark.parametrize("stage", [0, 1])
def test_several_patients_in_one_pass_are_the_loop(
    foundation, open_plan, patients, factor: str, stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Folded gradients against one backward pass a patient: same draws, same clipped sum."""
    start = initial_state(foundation, open_plan.adapter, seed=3)
    state = {name: value + 0.01 for name, value in start.items()}
    clipped = replace(
        mechanism_of(open_plan, declared_patients=DECLARED_PATIENTS), max_grad_norm=0.01
    )
    task = task_of(
        foundation, open_plan, stage=stage, factor=factor, state=state, mechanism=clipped
    )
    deltas: list[State] = []
    groups: list[int] = []
    counted = GroupGradients.compute

    def compute(self, loss_B):
        groups.append(self.num_patients)
        return counted(self, loss_B)

    monkeypatch.setattr(GroupGradients, "compute", compute)
    for rows in (1, 24):
        speed = Speed(microbatch_tiles=64, group_rows=rows)
        deltas.append(trainer_of(foundation, open_plan, patients, speed=speed).train(task))

    assert set(groups) == {4}, "the second run trained four patients at a time"
    for name in deltas[0]:
        assert deltas[0][name].norm() > 0
        torch.testing.assert_close(deltas[0][name], deltas[1][name], rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("stage", [0, 1])
def test_a_round_is_the_same_to_the_last_bit_on_any_number_of_cores(
    foundation, open_plan, patients, stage: int, caplog
) -> None:
    """Stage 1 looks at the denoiser of its beginning as well, from every pass."""
    values = open_plan.model_dump(mode="json")
    values["stage"][1]["lambda_drift"] = 0.5
    plan = Plan.parse(values)
    task = task_of(foundation, plan, stage=stage)
    alone, together = (
        trainer_of(foundation, plan, patients, speed=Speed(microbatch_tiles=64, cores=cores))
        for cores in (1, 3)
    )
    steps: list[PublicStep] = []
    wanted, found = alone.train(task, steps.append), together.train(task, steps.append)
    assert global_norm(wanted) > 0
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert [step.group_size for step in steps] == [1, 3]
    assert not caplog.records, "some passes were not believed in"


def test_what_a_draw_costs_is_in_the_public_step_that_is_timed(
    foundation, open_plan, patients, monkeypatch
) -> None:
    """A foundation with a long prompt bank made each patient's draw slow, and no public one."""
    bankless = replace(foundation, anchors_KD=torch.empty(0))
    drawn = PatientTiles(patients._store, patients._cache, bankless).batch(
        0, max_tiles=2, generator=torch.Generator()
    )
    assert drawn.tile_embedding_BD.shape[1] == foundation.anchors_KD.shape[1]

    steps: list[PublicStep] = []
    trainer = trainer_of(foundation, open_plan, patients)
    trainer.train(task_of(foundation, open_plan), steps.append)
    draws: list[int] = []
    public_draws = trainer_module.public_draws
    monkeypatch.setattr(
        trainer_module,
        "public_draws",
        lambda *arguments: (draws.append(1), public_draws(*arguments))[1],
    )
    for num_passes in (0, 1, 3):
        draws.clear()
        steps[0].run(num_passes)
        assert len(draws) == num_passes * steps[0].group_size


def test_a_shortcut_that_threads_may_not_share_runs_one_pass_at_a_time() -> None:
    speed = Speed(microbatch_tiles=64, cores=4)
    assert (speed.side_by_side(4), speed.at_a_time(4)) == (4, 8)
    for name, value in {"checkpointing": True, "compile": True, "precision": "bfloat16"}.items():
        assert replace(speed, **{name: value}).side_by_side(4) == 1
    assert replace(speed, group_rows=0).at_a_time(4) == 1


@pytest.mark.parametrize(("most", "passes"), [(64, 8), (24, 3), (8, 1), (4, 1)])
def test_all_passes_together_have_no_more_rows_than_a_site_allows(most: int, passes: int) -> None:
    speed = Speed(microbatch_tiles=most, cores=16)
    assert speed.side_by_side(4) == passes
    assert speed.at_a_time(4) * 4 <= most


@pytest.mark.parametrize(
    ("device", "more", "cores", "rows"),
    [
        ("cpu", (), 6, 8),
        ("cpu", ("cpu", "cpu"), 2, 8),
        ("cuda:0", (), 1, 32),
        ("cuda:0", ("cuda:1",), 1, 32),
        ("cpu", ("cuda:0",), 1, 8),
    ],
)
def test_devices_that_step_together_train_alike(monkeypatch, device, more, cores, rows) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    config = SiteConfig(
        *(), name="north", cohort="main", declared_patients=9, device=device, more_devices=more,
        foundation="f", tile_store="tiles", microbatch_tiles=64,
    )  # fmt: skip
    speed = Speed.of(config)
    assert (speed.cores, speed.group_rows) == (cores, rows)


class OneAlone(Alone):
    """Another rank, which trains patients one by one."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def least(self, number: int) -> int:
        self.asked.append(number)
        return min(number, 1 if number > 0 else -1)


def test_a_device_that_trains_one_by_one_makes_the_others_do_so(
    foundation, open_plan, patients
) -> None:
    """The time of a round is bounded by what one device takes for so many patients."""
    speed, ranks = Speed(microbatch_tiles=64, cores=2), OneAlone()
    trainer = Trainer(
        foundation, open_plan.adapter, patients, randomness=seeded(), speed=speed, ranks=ranks
    )
    steps: list[PublicStep] = []
    trainer.train(task_of(foundation, open_plan), steps.append)
    assert [step.group_size for step in steps] == [1]
    assert ranks.asked == [2, -2], "a rank that asks less often than the others leaves them waiting"


@pytest.mark.parametrize("rows", [1, 24], ids=["one by one", "in groups"])
def test_each_local_step_draws_its_patients_anew(
    foundation, open_plan, patients, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three local steps are charged as three samples, so they are three."""
    read: list[int] = []
    batch = PatientTiles.batch

    def noted(self: PatientTiles, patient: int, **options) -> TileBatch:
        read.append(patient)
        return batch(self, patient, **options)

    class OneAfterAnother:
        steps = iter(range(9))

        def sample(self, num_patients: int, sample_rate: float) -> np.ndarray:
            return np.array([next(self.steps)])

    monkeypatch.setattr(PatientTiles, "batch", noted)
    speed = Speed(microbatch_tiles=64, group_rows=rows)
    sampler = OneAfterAnother()
    trainer_of(foundation, open_plan, patients, speed=speed, sampler=sampler).train(
        task_of(foundation, open_plan)
    )
    assert read == [0, 1, 2]


@pytest.mark.parametrize("factor", ["first", "second", "both"])
def test_only_the_asked_factor_moves(foundation, plan, patients, factor: str) -> None:
    start = initial_state(foundation, plan.adapter, seed=3)
    moved = add_delta(start, {name: torch.ones_like(value) for name, value in start.items()})
    delta = trainer_of(foundation, plan, patients).train(
        task_of(foundation, plan, factor=factor, state=moved)
    )

    endings = (".first", ".second") if factor == "both" else (f".{factor}",)
    assert delta.keys() == {name for name in start if name.endswith(endings)}
    assert all(value.abs().sum() > 0 for value in delta.values())


def test_a_round_starts_from_the_state_it_is_given(foundation, plan, patients) -> None:
    """The warm model remembers nothing of the round before."""
    trainer = trainer_of(foundation, plan, patients, noise=NoNoise(), sampler=FixedSampler())
    task = task_of(foundation, plan)

    first, again = trainer.train(task), trainer.train(task)

    assert all(torch.equal(first[name], again[name]) for name in first)


def test_stage_alignment_trains_toward_another_point(foundation, plan, patients) -> None:
    trainer = trainer_of(foundation, plan, patients, noise=NoNoise(), sampler=FixedSampler())

    pretraining = trainer.train(task_of(foundation, plan))
    alignment = trainer.train(task_of(foundation, plan, stage=1))

    assert any(not torch.allclose(pretraining[name], alignment[name]) for name in pretraining)


def test_noise_comes_with_the_calibrated_strength(foundation, plan, patients) -> None:
    """Nobody sampled: the delta of each step is -lr * N(0, (sigma C / qN)^2), N as declared."""
    delta = trainer_of(foundation, plan, patients, sampler=FixedSampler([])).train(
        task_of(foundation, plan)
    )

    mechanism = mechanism_of(plan, declared_patients=DECLARED_PATIENTS)
    stage = plan.stage[0]
    std = (
        stage.learning_rate
        * mechanism.noise_multiplier
        / (0.5 * DECLARED_PATIENTS)
        * stage.local_steps**0.5
    )
    values = torch.cat([value.flatten() for value in delta.values()])
    assert values.std() == pytest.approx(std, rel=6 / (2 * len(values)) ** 0.5)


def test_the_plan_ends_at_its_target_and_not_above(plan) -> None:
    mechanism = mechanism_of(plan, declared_patients=DECLARED_PATIENTS)

    spent = epsilon([mechanism.event(plan.total_steps)], plan.privacy.delta)
    assert 7.9 < spent <= 8.0


def test_one_round_more_would_pass_the_target(plan) -> None:
    mechanism = mechanism_of(plan, declared_patients=DECLARED_PATIENTS)

    assert epsilon([mechanism.event(plan.total_steps + 2)], plan.privacy.delta) > 8.0


def test_the_declared_size_sets_the_divisor_and_not_the_noise(plan) -> None:
    small, large = (mechanism_of(plan, declared_patients=size) for size in (10, 1000))

    assert small.noise_multiplier == large.noise_multiplier
    assert (small.expected_patients, large.expected_patients) == (5.0, 500.0)


def test_a_plan_without_privacy_costs_everything(open_plan) -> None:
    event = mechanism_of(open_plan, declared_patients=DECLARED_PATIENTS).event(1)

    assert event == PrivacyEvent(noise_multiplier=0.0, sample_rate=1.0, steps=1)
    assert epsilon([event], 1e-3) == float("inf")


def test_a_batch_coupled_loss_is_refused_under_privacy(
    foundation, plan, patients, monkeypatch
) -> None:
    honest = Objective.loss_per_tile
    monkeypatch.setattr(
        Objective,
        "loss_per_tile",
        lambda self, batch, draws: honest(self, batch, draws) + honest(self, batch, draws).mean(),
    )
    with pytest.raises(BatchCoupledLossError):
        trainer_of(foundation, plan, patients).train(task_of(foundation, plan))


def test_weights_that_are_not_finite_do_not_leave(foundation, plan, patients) -> None:
    task = task_of(foundation, plan)
    stage = plan.stage[0].model_copy(update={"learning_rate": 3e38})
    loud = replace(task.mechanism, max_grad_norm=1e9)

    with pytest.raises(TrainingError):
        trainer_of(foundation, plan, patients).train(replace(task, stage=stage, mechanism=loud))


def test_other_steps_than_the_ledger_was_charged_for_give_nothing(
    foundation, plan, patients
) -> None:
    task = task_of(foundation, plan)
    less = replace(task.charged, steps=task.charged.steps - 1)

    with pytest.raises(TrainingError, match="charged"):
        trainer_of(foundation, plan, patients).train(replace(task, charged=less))


def test_the_plans_clipping_reaches_the_mechanism(foundation, plan) -> None:
    assert mechanism_of(plan, declared_patients=DECLARED_PATIENTS).stability is None
    wanted = {"clipping": "automatic", "clipping_stability": 0.5}
    automatic = plan.model_copy(update={"privacy": plan.privacy.model_copy(update=wanted)})
    assert mechanism_of(automatic, declared_patients=DECLARED_PATIENTS).stability == 0.5


def test_a_patients_tiles_are_drawn_without_replacement(patients) -> None:
    """Two of three tiles: over many draws each is taken two times in three."""
    generator = torch.Generator().manual_seed(0)
    everything = patients.batch(0, max_tiles=3, generator=generator).latents_BCHW
    counts = np.zeros(3)
    for _ in range(200):
        batch = patients.batch(0, max_tiles=2, generator=generator)
        assert batch.weight_B.tolist() == [0.5, 0.5]
        same = (batch.latents_BCHW[:, None] == everything[None]).flatten(2).all(dim=2)
        assert same.sum() == 2
        counts += same.any(dim=0).numpy()
    assert (np.abs(counts / 200 - 2 / 3) < 0.15).all()


def test_shortcuts_are_compared_anew_where_a_pass_has_another_shape(
    foundation, plan, patients, monkeypatch
) -> None:
    """The next plan of the same stage and adapter may have other tiles and draws."""
    trainer, compared = trainer_of(foundation, plan, patients), []
    honest = Shortcuts._believed

    def noted(self, task, objective):
        compared.append(task.rows)
        return honest(self, task, objective)

    monkeypatch.setattr(Shortcuts, "_believed", noted)
    task = task_of(foundation, plan)
    wider = plan.privacy.model_copy(update={"draws_per_tile": 4})
    for each in (task, task, replace(task, privacy=wider)):
        trainer.train(each)
    assert compared == [4, 8]


def test_all_devices_take_the_timed_steps_together(foundation, plan, patients) -> None:
    """Else one is timed while the others are at their patients, as long as these are many."""
    sums: list[bool] = []
    ranks = SimpleNamespace(
        rank=0, count=1, sum_=lambda _, failed: sums.append(failed), least=lambda number: number
    )
    trainer = Trainer(
        foundation, plan.adapter, patients,
        randomness=seeded(), speed=Speed(microbatch_tiles=64), ranks=ranks,
    )  # fmt: skip
    met: list[int] = []

    def time_two(step) -> None:
        step.run(1)
        step.run(0)
        met.append(len(sums))

    trainer.train(task_of(foundation, plan), time_two)
    assert met == [2]
    assert len(sums) == 2 + plan.stage[0].local_steps


def test_the_sites_own_generator_has_no_seed() -> None:
    first, second = (torch.rand(8, generator=entropy_generator()) for _ in range(2))

    assert not torch.equal(first, second)


def test_a_site_may_ask_for_exact_noise() -> None:
    assert isinstance(Randomness.from_os(exact_noise=True).noise, ExactNoise)
    assert isinstance(Randomness.from_os().noise, GridNoise)


def test_exact_noise_without_opendp_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "opendp.prelude", None)
    with pytest.raises(TrainingError, match="exact-noise"):
        Randomness.from_os(exact_noise=True)


@pytest.mark.parametrize("stage", [0, 1])
def test_checkpointing_gives_the_same_update(foundation, open_plan, patients, stage: int) -> None:
    task = task_of(foundation, open_plan, stage=stage)
    speed = Speed(microbatch_tiles=64, checkpointing=True)
    found = trainer_of(foundation, open_plan, patients, speed=speed).train(task)
    for name, wanted in trainer_of(foundation, open_plan, patients).train(task).items():
        torch.testing.assert_close(found[name], wanted, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 24], ids=["one by one", "in groups"])
def test_bfloat16_gives_nearly_the_same_update(foundation, open_plan, patients, rows: int) -> None:
    task = task_of(foundation, open_plan)
    speed = Speed(microbatch_tiles=64, precision="bfloat16", group_rows=rows)
    found = trainer_of(foundation, open_plan, patients, speed=speed).train(task)
    wanted = trainer_of(foundation, open_plan, patients).train(task)
    error = global_norm({name: found[name] - wanted[name] for name in wanted})
    assert 0 < error < 0.1 * global_norm(wanted)
    assert all(tensor.dtype == torch.float32 for tensor in found.values())


def test_all_weights_train_privately(foundation, patients) -> None:
    """kind = "full": every weight of the UNet, clipped as one vector."""
    values = plan_values(foundation.manifest.hash)
    values["adapter"] = {"kind": "full"}
    plan = Plan.parse(values)
    mechanism = replace(mechanism_of(plan, declared_patients=DECLARED_PATIENTS), max_grad_norm=0.05)
    task = task_of(foundation, plan, factor="all", mechanism=mechanism)
    quiet = trainer_of(foundation, plan, patients, noise=NoNoise(), sampler=FixedSampler([2]))
    delta = quiet.train(task)
    assert delta.keys() == dict(foundation.generator.denoiser.named_parameters()).keys()
    most = plan.stage[0].learning_rate * plan.stage[0].local_steps * 0.05
    assert 0.3 * most < global_norm(delta) * mechanism.expected_patients <= 1.0001 * most
    assert global_norm(trainer_of(foundation, plan, patients).train(task)) > 10 * global_norm(delta)


def compiled_wrongly(module: torch.nn.Module) -> Callable[..., SimpleNamespace]:
    """The right prediction, and twice its gradient: as silent as the real thing was."""

    def run(*inputs: torch.Tensor) -> SimpleNamespace:
        sample = module(*inputs).sample
        return SimpleNamespace(sample=2 * sample - sample.detach())

    return run


def test_compiled_code_with_wrong_gradients_is_not_used(
    foundation, open_plan, patients, monkeypatch, caplog
) -> None:
    task = task_of(foundation, open_plan)
    monkeypatch.setattr(torch, "compile", compiled_wrongly)
    speed = Speed(microbatch_tiles=64, compile=True)
    found = trainer_of(foundation, open_plan, patients, speed=speed).train(task)
    assert "training without" in caplog.text
    for name, wanted in trainer_of(foundation, open_plan, patients).train(task).items():
        torch.testing.assert_close(found[name], wanted, rtol=1e-3, atol=1e-7)


def test_compiled_code_sees_full_microbatches_only(
    foundation, open_plan, patients, monkeypatch, caplog
) -> None:
    """So what was checked is what runs; the rows that fill them up weigh nothing."""
    seen: list[int] = []

    def compiled(module: torch.nn.Module) -> Callable[..., object]:
        def run(noisy: torch.Tensor, *rest: torch.Tensor) -> object:
            seen.append(len(noisy))
            return module(noisy, *rest)

        return run

    monkeypatch.setattr(torch, "compile", compiled)
    values = open_plan.model_dump(mode="json")
    values["privacy"] |= {"tiles_per_patient": 5}  # every patient has three
    plan = Plan.parse(values)
    task = task_of(foundation, plan)
    speed = Speed(microbatch_tiles=4, compile=True)
    found = trainer_of(foundation, plan, patients, speed=speed).train(task)
    assert set(seen) == {4}
    assert not caplog.records
    for name, wanted in trainer_of(foundation, plan, patients).train(task).items():
        torch.testing.assert_close(found[name], wanted, rtol=1e-3, atol=1e-7)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("speed", "tolerance"),
    [
        (Speed(microbatch_tiles=64, group_rows=1), 0.01),
        (Speed(microbatch_tiles=64, group_rows=32), 0.01),
        (Speed(microbatch_tiles=2, group_rows=1, checkpointing=True), 0.01),
        (Speed(microbatch_tiles=64, group_rows=32, precision="bfloat16"), 0.1),
        (Speed(microbatch_tiles=6, compile=True), 0.05),
    ],
    ids=["one by one", "in groups", "checkpointing", "bfloat16", "compiled"],
)
def test_a_gpu_trains_what_a_cpu_trains(
    foundation, open_plan, patients, speed: Speed, tolerance: float, tmp_path: Path
) -> None:
    """Latents, draws, passes and update; whatever this machine's compiler makes of it."""
    task = task_of(foundation, open_plan)
    wanted = trainer_of(foundation, open_plan, patients).train(task)
    on_gpu = load(foundation.path, device="cuda")
    store = write_random_store(tmp_path / "tiles", on_gpu)
    cached = PatientTiles(store, LatentCache.open(store, on_gpu.manifest.hash), on_gpu)
    trainer = trainer_of(on_gpu, open_plan, cached, speed=speed)
    found = trainer.train(task)
    difference = global_norm({name: found[name] - wanted[name] for name in wanted})
    assert difference <= tolerance * global_norm(wanted)
    assert next(iter(trainer._shortcuts._trusted.values())) == speed, "the shortcut was not trusted"


def test_adam_trains_as_the_plan_says(foundation, open_plan, patients) -> None:
    """One step by hand from the gradient that a plain step of the same draws shows."""
    values = open_plan.model_dump(mode="json")
    values["stage"][0] |= {"optimizer": "adam", "momentum": 0.9, "local_steps": 1}
    adam = Plan.parse(values)
    values["stage"][0] |= {"optimizer": "sgd", "momentum": 0.0, "learning_rate": 1.0}
    plain = trainer_of(foundation, open_plan, patients).train(
        task_of(foundation, Plan.parse(values))
    )
    found = trainer_of(foundation, adam, patients).train(task_of(foundation, adam))
    for name, gradient in plain.items():
        # After one step Adam moves each weight by the learning rate, whatever its gradient.
        wanted = 0.5 * gradient / gradient.abs().clamp(min=1e-8)
        torch.testing.assert_close(found[name], wanted, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("rows", [1, 24], ids=["one by one", "in groups"])
def test_the_noise_that_leaves_the_trainer_is_what_was_declared(
    foundation, plan, patients, rows: int
) -> None:
    """Nobody is drawn, so all that leaves is noise: two-sided, fresh in each round."""
    task = task_of(foundation, plan)
    speed = Speed(microbatch_tiles=64, group_rows=rows)
    trainer = trainer_of(foundation, plan, patients, speed=speed, sampler=FixedSampler([]))
    released = [
        torch.cat([tensor.flatten() for tensor in trainer.train(task).values()]).double()
        for _ in range(2)
    ]
    stage = task.stage
    std = stage.learning_rate * task.mechanism.noise_std * stage.local_steps**0.5
    assert stage.momentum == 0
    for noise in released:
        assert stats.chi2(len(noise)).cdf(float((noise / std).square().sum())) == pytest.approx(
            0.5, abs=0.499999
        )
    correlation = float(torch.corrcoef(torch.stack(released))[0, 1])
    assert abs(correlation) < 5 / len(released[0]) ** 0.5
