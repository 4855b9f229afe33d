"""The audit of the path that trains passes the trainer, and catches what was broken in it."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from crafts_client import trainer
from crafts_client.home import SiteConfig
from crafts_client.patients import PatientTiles
from crafts_client.public_patients import PublicPatients
from crafts_client.release_bench import ReleaseBench
from crafts_client.speed import Speed
from crafts_client.trainer import Trainer
from crafts_client.training_audit import (
    TrainingCheck,
    answers,
    audit_training,
    bound_from_releases,
    declared_number,
    log_odds,
    neighbours,
    nobody,
    release_of_nobody,
    samples,
)
from crafts_client.training_bench import RATE, Bench
from crafts_client.training_task import Randomness, TrainingTask, entropy_generator
from crafts_core.foundation import Foundation
from crafts_core.plan_sections import RELEASES, ReleaseName, StageName
from crafts_core.state import State
from crafts_privacy.gradients import GroupGradients
from crafts_privacy.patient_sgd import PatientSGD
from support.noise import NoNoise, SeededNoise, SeededSampler

NUM_PATIENTS = 24
Patch = Callable[[pytest.MonkeyPatch], None]


@pytest.fixture(scope="module")
def patients(tmp_path_factory: pytest.TempPathFactory, foundation: Foundation) -> PublicPatients:
    folder = tmp_path_factory.mktemp("public") / "tiles"
    return PublicPatients.write(folder, foundation, num_patients=NUM_PATIENTS, views=1)


def seeded(seed: int, **changes: object) -> Randomness:
    own = {"noise": SeededNoise(seed), "sampler": SeededSampler(seed + 1000)}
    return Randomness(**({"generator": entropy_generator} | own | changes))


def bench_of(
    foundation: Foundation,
    patients: PublicPatients,
    *,
    stage: StageName = "pretraining",
    seed: int = 1,
    **changes: object,
) -> Bench:
    speed = Speed(microbatch_tiles=64)
    return Bench(foundation, patients, ("generator",), stage, speed, seeded(seed, **changes))


def site_config(**changes: object) -> SiteConfig:
    values: dict[str, object] = {
        "name": "north",
        "cohort": "main",
        "declared_patients": 7,
        "device": "cpu",
        "foundation": "embedded",
        "tile_store": "tiles",
        "microbatch_tiles": 64,
    }
    return SiteConfig.model_validate(values | changes)


def engine(**methods: object) -> Patch:
    """The trainer's engine with other methods."""
    faulty = type("Faulty", (PatientSGD,), methods)
    return lambda monkeypatch: monkeypatch.setattr(trainer, "PatientSGD", faulty)


def built(change: Callable[[PatientSGD], None]) -> Patch:
    """The trainer's engine, changed once it is built."""

    def init(self: PatientSGD, *arguments: object, **options: object) -> None:
        PatientSGD.__init__(self, *arguments, **options)
        change(self)

    return engine(__init__=init)


def no_clip(self: PatientSGD, grad_D: Tensor) -> None:
    self._sum_D += (grad_D / self._step).trunc()


class Running:
    """Each patient's row holds those before it as well."""

    def __init__(self, gradients: GroupGradients) -> None:
        self._gradients = gradients
        self.num_patients = gradients.num_patients

    def compute(self, *arguments: object) -> Tensor:
        return self._gradients.compute(*arguments).cumsum(0)


def rows_run_on(self: PatientSGD, *arguments: object) -> None:
    """A fault of the step, where no comparison on public tiles sees it."""
    swapped = [Running(each) if isinstance(each, GroupGradients) else each for each in arguments]
    PatientSGD.step_in_groups(self, *swapped)


def tiles_of_another_patient(monkeypatch: pytest.MonkeyPatch) -> None:
    right = PatientTiles.batch
    monkeypatch.setattr(
        PatientTiles,
        "batch",
        lambda self, patient, **options: right(self, patient // 2, **options),
    )


def nobody_withdraws(monkeypatch: pytest.MonkeyPatch) -> None:
    right = PatientTiles.leave_out
    monkeypatch.setattr(PatientTiles, "leave_out", lambda self, withdrawn: right(self, ()))


class FirstSampleAgain:
    def __init__(self, sampler: object) -> None:
        self._sampler, self._first = sampler, None

    def sample(self, num_patients: int, sample_rate: float) -> NDArray[np.int64]:
        if self._first is None:
            self._first = self._sampler.sample(num_patients, sample_rate)
        return self._first


def one_sample_for_the_round(self: PatientSGD) -> None:
    self._sampler = FirstSampleAgain(self._sampler)


def trained_as(change: Callable[[Trainer, TrainingTask], TrainingTask]) -> Patch:
    right = Trainer.train
    return lambda monkeypatch: monkeypatch.setattr(
        Trainer, "train", lambda self, task: right(self, change(self, task))
    )


def true_number_divides(self: Trainer, task: TrainingTask) -> TrainingTask:
    self._patients.leave_out(task.withdrawn)
    true = RATE * max(1, self._patients.num_patients)
    return replace(task, mechanism=replace(task.mechanism, expected_patients=true))


def twice_the_bound(_: Trainer, task: TrainingTask) -> TrainingTask:
    mechanism = replace(task.mechanism, max_grad_norm=2 * task.mechanism.max_grad_norm)
    return replace(task, mechanism=mechanism)


class Sometimes:
    """Noise only where ``when`` holds; else it is drawn and forgotten."""

    def __init__(self, noise: object, when: Callable[[Tensor, int], bool]) -> None:
        self._noise, self._when, self._calls = noise, when, 0

    def add_(self, grid_sum_D: Tensor, std: float) -> None:
        self._calls += 1
        is_kept = self._when(grid_sum_D, self._calls)
        self._noise.add_(grid_sum_D if is_kept else grid_sum_D.clone(), std)


def steps_on_somebody(self: PatientSGD, num_patients: int, gradients_of: object) -> None:
    """Nobody to be drawn: the step is left out."""
    if num_patients:
        PatientSGD._noisy_step(self, num_patients, gradients_of)
    else:
        self.steps_taken += 1


def noise_where(when: Callable[[Tensor, int], bool]) -> Patch:
    return built(lambda self: setattr(self, "_noise", Sometimes(self._noise, when)))


class Weaker:
    def __init__(self, noise: object) -> None:
        self._noise = noise

    def add_(self, grid_sum_D: Tensor, std: float) -> None:
        self._noise.add_(grid_sum_D, 0.9 * std)


def releases_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten percent of a round's movement once more: what is released is not what was accounted."""
    right = Trainer.train

    def train(self: Trainer, task: TrainingTask) -> State:
        return {name: 1.1 * delta for name, delta in right(self, task).items()}

    monkeypatch.setattr(Trainer, "train", train)


Question = Callable[[Bench], object]
FAULTS: dict[str, tuple[Patch, Question, str]] = {
    "no clip": (engine(_add_patient=no_clip), neighbours, "neighbouring cohorts, one by one"),
    "rows of a group run on": (
        engine(step_in_groups=rows_run_on),
        neighbours,
        "neighbouring cohorts, in groups",
    ),
    "tiles of another patient": (
        tiles_of_another_patient,
        neighbours,
        "neighbouring cohorts, one by one",
    ),
    "nobody withdraws": (nobody_withdraws, nobody, "a round on nobody"),
    "noise only where somebody is": (
        noise_where(lambda sum_D, _: bool(sum_D.any())),
        nobody,
        "a round on nobody",
    ),
    "no noise where nobody is": (
        engine(_noisy_step=steps_on_somebody),
        nobody,
        "noise in every step",
    ),
    "noise once a round": (noise_where(lambda _, calls: calls == 1), nobody, "a round on nobody"),
    "a tenth less noise": (
        built(lambda self: setattr(self, "_noise", Weaker(self._noise))),
        nobody,
        "a round on nobody",
    ),
    "twice the bound": (trained_as(twice_the_bound), nobody, "a round on nobody"),
    "one sample for the round": (
        built(one_sample_for_the_round),
        samples,
        "independent samples",
    ),
    "no noise where somebody is": (
        noise_where(lambda sum_D, _: not sum_D.any()),
        samples,
        "noise beside patients",
    ),
    "the true number divides": (
        trained_as(true_number_divides),
        declared_number,
        "the declared number",
    ),
    "more is released": (releases_more, declared_number, "the declared number"),
}
"""Each fault, the question that must find it, and the check that must fail."""
LIKE_ANOTHER = {
    "tiles of another patient",
    "noise only where somebody is",
    "noise once a round",
    "more is released",
}
"""Found by the same question and check as one that is tested every time."""
STATISTICAL = [name for name, (_, ask, _) in FAULTS.items() if ask in (nobody, samples)]


def failed(checks: Sequence[TrainingCheck]) -> set[str]:
    return {check.name for check in checks if not check.passed}


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(name, marks=pytest.mark.exhaustive) if name in LIKE_ANOTHER else name
        for name in FAULTS
    ],
)
def test_a_fault_in_the_trainer_is_caught(foundation, patients, monkeypatch, fault: str) -> None:
    patch, ask, name = FAULTS[fault]
    patch(monkeypatch)
    assert name in failed(list(answers(ask, bench_of(foundation, patients))))


def first_patient_again(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("embeddings", "images"):
        right = getattr(PatientTiles, name)
        monkeypatch.setattr(
            PatientTiles, name, lambda self, _, right=right, **rest: right(self, 0, **rest)
        )


def rate_divides(_: Trainer, task: TrainingTask) -> TrainingTask:
    half = task.mechanism.expected_patients / 2
    return replace(task, mechanism=replace(task.mechanism, expected_patients=half))


OF_RELEASES: dict[str, tuple[Patch, Callable[[ReleaseBench], object], str]] = {
    "no clip": (engine(_add_patient=no_clip), neighbours, "neighbouring cohorts, one by one"),
    "one patient's numbers for all": (
        first_patient_again,
        neighbours,
        "neighbouring cohorts, one by one",
    ),
    "a tenth less noise": (
        built(lambda self: setattr(self, "_noise", Weaker(self._noise))),
        release_of_nobody,
        "a release of nobody",
    ),
    "noise only where somebody is": (
        noise_where(lambda sum_D, _: bool(sum_D.any())),
        release_of_nobody,
        "a release of nobody",
    ),
    "nobody withdraws": (nobody_withdraws, release_of_nobody, "a release of nobody"),
    "another number divides": (
        trained_as(rate_divides),
        declared_number,
        "the declared number",
    ),
    "more is released": (releases_more, declared_number, "the declared number"),
}


def release_bench(
    foundation: Foundation, patients: PublicPatients, stage: ReleaseName, **changes: object
) -> ReleaseBench:
    return ReleaseBench(
        foundation, patients, stage, Speed(microbatch_tiles=64), seeded(1, **changes)
    )


@pytest.mark.slow
@pytest.mark.parametrize("fault", OF_RELEASES)
def test_a_fault_in_a_release_is_caught(foundation, patients, monkeypatch, fault: str) -> None:
    patch, ask, name = OF_RELEASES[fault]
    patch(monkeypatch)
    assert name in failed(list(answers(ask, release_bench(foundation, patients, "anchors"))))


@pytest.mark.slow
@pytest.mark.parametrize("stage", RELEASES)
def test_a_release_is_audited_where_a_policy_allows_it(
    foundation, patients, stage: ReleaseName
) -> None:
    result = audit_training(foundation, site_config(), [stage], seeded(1), num_canaries=24)
    assert result.stages == (stage,)
    assert len(result.checks) == 3
    assert failed(result.checks) == set()
    frozen = release_bench(foundation, patients, stage, noise=FrozenNoise())
    assert failed(list(release_of_nobody(frozen))) == {"a release of nobody"}


@pytest.mark.exhaustive
@pytest.mark.parametrize("fault", STATISTICAL)
def test_a_statistical_fault_is_caught_in_19_of_20_seeds(
    foundation, patients, monkeypatch, fault: str
) -> None:
    patch, ask, name = FAULTS[fault]
    patch(monkeypatch)
    caught = [
        name in failed(list(answers(ask, bench_of(foundation, patients, seed=seed))))
        for seed in range(20)
    ]
    assert sum(caught) >= 19


class FrozenNoise:
    """The same vector in every step of every round."""

    def add_(self, grid_sum_D: Tensor, std: float) -> None:
        SeededNoise(3).add_(grid_sum_D, std)


class SameInEachRound:
    """A stream that begins again after as many steps as a round has."""

    def __init__(self) -> None:
        self._calls = 0

    def add_(self, grid_sum_D: Tensor, std: float) -> None:
        SeededNoise(self._calls % 3).add_(grid_sum_D, std)
        self._calls += 1


@pytest.mark.slow
@pytest.mark.parametrize("noise", [FrozenNoise(), SameInEachRound()], ids=["steps", "rounds"])
def test_noise_that_comes_again_is_caught(foundation, patients, noise) -> None:
    assert "noise is fresh" in failed(list(nobody(bench_of(foundation, patients, noise=noise))))


@pytest.mark.slow
@pytest.mark.parametrize("loud", [True, False], ids=["noise", "no noise"])
def test_the_bound_from_releases_tells_noise_from_none(foundation, patients, loud: bool) -> None:
    """With noise nothing near the claim is found; without, what the control finds."""
    changes = {} if loud else {"noise": NoNoise()}
    bench = bench_of(foundation, patients, **changes)
    found = bound_from_releases(bench, np.random.default_rng(1), claimed_epsilon=0.5)
    assert found.claimed_epsilon < found.control
    assert found.passed is loud
    assert (found.bound > found.claimed_epsilon) is not loud


def test_the_attack_on_releases_finds_counts_in_a_closed_case() -> None:
    """Orthogonal canaries: each count is read alone, and the odds are those of one Gaussian."""
    canaries, seen = np.eye(3, 5), np.array([0.0, 4.0, 1.0, 9.0, 9.0])
    odds = log_odds(canaries, seen, variance=0.5, steps=8)
    counts = np.arange(9)
    weights = np.array([1, 8, 28, 56, 70, 56, 28, 8, 1]) / 256
    for value, found in zip(seen[:3], odds, strict=True):
        inside = (weights * np.exp(-((value - counts) ** 2) / (2 * 0.5))).sum()
        assert found == pytest.approx(np.log(inside) + value**2 / (2 * 0.5), abs=1e-9)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_installed_trainer_passes(foundation) -> None:
    """With the operating system's entropy, as a site audits itself.

    A minute; of stage pretraining ``crafts-client audit`` does the same in test_client_cli.
    """
    stages: tuple[StageName, ...] = ("control",)
    seen: list[tuple[int, int]] = []
    result = audit_training(
        foundation,
        site_config(),
        stages,
        Randomness.from_os(),
        num_canaries=24,
        progress=lambda _, done, total: seen.append((done, total)),
    )
    assert failed(result.checks) == set()
    assert result.stages == ("control",)
    assert seen == [(number, 8) for number in range(1, 9)]
    assert len(result.one_runs) == 1
    assert all(each.one_run.bound <= each.one_run.claimed_epsilon for each in result.one_runs)


@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("stage", ["pretraining", "alignment"])
def test_a_clean_seed_raises_no_alarm(foundation, stage: StageName, seed: int) -> None:
    result = audit_training(foundation, site_config(), [stage], seeded(seed), seed=seed)
    assert result.passed, result


def test_patients_who_cannot_share_a_pass_are_asked_one_by_one(foundation, patients) -> None:
    speed = Speed(microbatch_tiles=1)
    bench = Bench(foundation, patients, ("generator",), "pretraining", speed, seeded(1))
    assert list(bench.ways) == ["one by one"]


def test_public_patients_are_the_same_each_time_and_alike_to_nobody(
    tmp_path: Path, foundation: Foundation
) -> None:
    made = [
        PublicPatients.write(tmp_path / name, foundation, num_patients=9, views=1)
        for name in ("a", "b")
    ]
    batches = [
        [each.batch(p, max_tiles=2, generator=torch.Generator()) for p in range(9)] for each in made
    ]
    latents = [torch.cat([batch.latents_BCHW for batch in each]) for each in batches]
    assert torch.equal(*latents)
    distance = torch.cdist(latents[0].flatten(1), latents[0].flatten(1))
    assert distance[~torch.eye(18, dtype=torch.bool)].min() > 0
    assert made[0].take_asked().tolist() == [1] * 9
