"""The audit passes the engine that trains, and catches every fault that was ever seen in one."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor, nn

from crafts_privacy.audit import (
    AuditResult,
    Engine,
    MakeEngine,
    audit,
    patient_sgd,
)
from crafts_privacy.audit_statistics import epsilon_lower_bound
from crafts_privacy.clipping import to_grid_
from crafts_privacy.gradients import GroupGradients
from crafts_privacy.mechanism import Mechanism
from crafts_privacy.noise import NoiseSource
from crafts_privacy.optimizers import Momentum
from crafts_privacy.patient_sgd import GroupLoss, PatientLoss, PatientSGD
from crafts_privacy.sampling import PatientSampler
from support.noise import FixedSampler, NoNoise, SeededNoise, SeededSampler


class NoClip(PatientSGD):
    def _add_patient(self, grad_D: Tensor) -> None:
        self._sum_D += grad_D / self._step


class ClipPerTile(PatientSGD):
    def step(self, num_patients: int, patient_loss: PatientLoss) -> None:
        def tile_by_tile(drawn: Sequence[int]) -> Iterator[Tensor]:
            for patient in drawn:
                for part in patient_loss(patient):
                    yield self._gradient.compute([part])

        self._noisy_step(num_patients, tile_by_tile)


class StaleNorms(PatientSGD):
    """Each gradient is scaled by the norm of the one before it."""

    _norm = 1.0

    def _add_patient(self, grad_D: Tensor) -> None:
        norm = float(grad_D.norm())
        grad_D *= min(1.0, self._mechanism.max_grad_norm / self._norm)
        self._norm = norm
        self._sum_D += to_grid_(grad_D, self._step)


class RealisedDivisor(PatientSGD):
    def step(self, num_patients: int, patient_loss: PatientLoss) -> None:
        seen = self._num_seen
        before = [master.clone() for master in self._masters]
        super().step(num_patients, patient_loss)
        factor = self._mechanism.expected_patients / max(1, self._num_seen - seen)
        with torch.no_grad():
            for master, old in zip(self._masters, before, strict=True):
                master.copy_(old + factor * (master - old))


class NeverMoves(PatientSGD):
    """As when the adapter is attached after the optimizer took its parameters."""

    def _update(self) -> None:
        self._sum_D.zero_()


def faulty(engine: type[PatientSGD]) -> MakeEngine:
    def make(
        parameters: dict[str, nn.Parameter],
        mechanism: Mechanism,
        noise: NoiseSource,
        sampler: PatientSampler,
    ) -> Engine:
        return engine(
            parameters,
            mechanism,
            learning_rate=1.0,
            optimizer=Momentum(),
            noise=noise,
            sampler=sampler,
        )

    return make


@dataclass
class HalvedNoise:
    noise: NoiseSource

    def add_(self, grid_sum_D: Tensor, std: float) -> None:
        self.noise.add_(grid_sum_D, std / 2)


@dataclass
class ShortNoise:
    """As numbers of 32 bits hold it."""

    noise: NoiseSource

    def add_(self, grid_sum_D: Tensor, std: float) -> None:
        drawn_D = torch.zeros_like(grid_sum_D)
        self.noise.add_(drawn_D, std)
        grid_sum_D.add_(drawn_D.clamp(-(2.0**31), 2.0**31 - 1))


class FrozenNoise:
    """The same vector in every step."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def add_(self, grid_sum_D: Tensor, std: float) -> None:
        SeededNoise(self._seed).add_(grid_sum_D, std)


class CountingSampler:
    def __init__(self, seed: int) -> None:
        self._sampler, self.size = SeededSampler(seed), 0

    def sample(self, num_patients: int, sample_rate: float) -> NDArray[np.int64]:
        drawn = self._sampler.sample(num_patients, sample_rate)
        self.size = len(drawn)
        return drawn


@dataclass
class NoiseOverBatch:
    """Noise for the mean, added to the sum."""

    noise: NoiseSource
    sampler: CountingSampler

    def add_(self, grid_sum_D: Tensor, std: float) -> None:
        self.noise.add_(grid_sum_D, std / max(1, self.sampler.size))


class ShuffledDeck:
    """Batches of fixed size from a shuffled deck, as data loaders deal them."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._deck: list[int] = []

    def sample(self, num_patients: int, sample_rate: float) -> NDArray[np.int64]:
        size = max(1, round(num_patients * sample_rate))
        if len(self._deck) < size:
            self._deck = list(self._rng.permutation(num_patients))
        hand, self._deck = self._deck[:size], self._deck[size:]
        return np.array(hand, dtype=np.int64)


def sources(seed: int) -> Callable[[], int]:
    """A new seed for every source that one audit makes."""
    state = np.random.default_rng(seed)
    return lambda: int(state.integers(0, 2**31))


def run(fault: str, seed: int, **options: object) -> AuditResult:
    fresh = sources(seed)
    engine = patient_sgd
    make_noise: Callable[[], NoiseSource] = lambda: SeededNoise(fresh())  # noqa: E731
    make_sampler: Callable[[], PatientSampler] = lambda: SeededSampler(fresh())  # noqa: E731
    engines = {
        "no clip": NoClip,
        "clip per tile": ClipPerTile,
        "stale norms": StaleNorms,
        "division by the realised batch": RealisedDivisor,
        "an adapter that never moves": NeverMoves,
    }
    if fault in engines:
        engine = faulty(engines[fault])
    elif fault == "noise halved":
        make_noise = lambda: HalvedNoise(SeededNoise(fresh()))  # noqa: E731
    elif fault == "noise cut off where it is long":
        make_noise = lambda: ShortNoise(SeededNoise(fresh()))  # noqa: E731
    elif fault == "no noise":
        make_noise = NoNoise
    elif fault == "noise reused in every step":
        make_noise = lambda: FrozenNoise(fresh())  # noqa: E731
    elif fault == "noise reused after a restart":
        make_noise = lambda: SeededNoise(seed)  # noqa: E731
    elif fault == "full batch":
        make_sampler = FixedSampler
    elif fault == "shuffling":
        make_sampler = lambda: ShuffledDeck(fresh())  # noqa: E731
    elif fault == "noise divided by the batch":
        return _noise_over_batch(seed, options)
    values = {"num_canaries": 50 if fault else 300} | options
    return audit(engine, make_noise=make_noise, make_sampler=make_sampler, seed=seed, **values)


def _noise_over_batch(seed: int, options: dict[str, object]) -> AuditResult:
    fresh = sources(seed)

    def make(
        parameters: dict[str, nn.Parameter],
        mechanism: Mechanism,
        noise: NoiseSource,
        sampler: PatientSampler,
    ) -> Engine:
        counting = CountingSampler(fresh())
        return patient_sgd(parameters, mechanism, NoiseOverBatch(noise, counting), counting)

    values = {"num_canaries": 50} | options
    return audit(make, make_noise=lambda: SeededNoise(fresh()), seed=seed, **values)


FAULTS = {
    "no clip": "clip",
    "clip per tile": "clip",
    "stale norms": "clip",
    "noise halved": "noise scale",
    "noise divided by the batch": "noise scale",
    "no noise": "noise scale",
    "noise cut off where it is long": "long noise, the noise source by itself",
    "noise reused in every step": "noise is fresh",
    "noise reused after a restart": "noise is fresh",
    "full batch": "sampling rate",
    "shuffling": "independent sampling",
    "division by the realised batch": "fixed divisor",
    "an adapter that never moves": "weights move",
}
"""Each fault, and the statistic that must see it."""


FEW = {"in_groups": False, "num_canaries": 10}
"""Of an audit whose statistics of the ordinary path are all that is looked at."""


def caught(result: AuditResult, statistic: str) -> bool:
    (check,) = [check for check in result.checks if check.name == statistic]
    return not check.passed and not result.passed


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_caught(fault: str) -> None:
    assert caught(run(fault, seed=1, **FEW), FAULTS[fault])


@pytest.mark.exhaustive
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_caught_in_19_of_20_seeds(fault: str) -> None:
    assert sum(caught(run(fault, seed, **FEW), FAULTS[fault]) for seed in range(20)) >= 19


GROUP_FAULTS = {
    "a neighbour's tiles as well": "noise scale, in groups",
    "tiles as patients": "clip, in groups",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "num_seeds", [pytest.param(1, id="1"), pytest.param(20, id="20", marks=pytest.mark.exhaustive)]
)
@pytest.mark.parametrize("fault", GROUP_FAULTS)
def test_a_fault_of_the_folded_gradients_is_caught(
    fault: str, num_seeds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where only the path that trains several patients at once is wrong."""
    right = GroupGradients.compute

    def with_neighbours(self: GroupGradients, loss_B: Tensor) -> Tensor:
        grad_PD = right(self, loss_B)
        return grad_PD + grad_PD.roll(1, dims=0)

    def by_tile(
        self: PatientSGD, num_patients: int, group_loss: GroupLoss, gradients: GroupGradients
    ) -> None:
        size, num_tiles = gradients.num_patients, gradients.num_tiles
        gradients.num_patients, gradients.num_tiles = size * num_tiles, 1

        def rows(drawn: Sequence[int]) -> Iterator[Tensor]:
            for start in range(0, len(drawn), size):
                group = drawn[start : start + size]
                places = [*group, *[None] * (size - len(group))]
                yield from gradients.compute(group_loss(places))[: len(group) * num_tiles]

        self._noisy_step(num_patients, rows)

    if fault == "tiles as patients":
        monkeypatch.setattr(PatientSGD, "step_in_groups", by_tile)
    else:
        monkeypatch.setattr(GroupGradients, "compute", with_neighbours)
    for seed in range(num_seeds):
        result = run("", seed, num_canaries=10)
        assert caught(result, GROUP_FAULTS[fault])
        failed = [check.name for check in result.checks if not check.passed]
        assert all(name.endswith("in groups") for name in failed)


class AutomaticWithoutNorm(PatientSGD):
    """Where automatic clipping, and only that, forgets the gradient's own length."""

    def _add_patient(self, grad_D: Tensor) -> None:
        if self._mechanism.stability is None:
            super()._add_patient(grad_D)
        else:
            grad_D *= self._mechanism.max_grad_norm / (0.5 + self._mechanism.stability)
            self._sum_D += to_grid_(grad_D, self._step)


@pytest.mark.slow
def test_a_fault_of_automatic_clipping_is_caught() -> None:
    result = audit(faulty(AutomaticWithoutNorm), seed=1, num_canaries=10)
    assert caught(result, "clip, automatic clipping")
    failed = [check.name for check in result.checks if not check.passed]
    assert all(name.endswith("automatic clipping") for name in failed)


@pytest.mark.slow
@pytest.mark.parametrize(
    "num_seeds", [pytest.param(3, id="3"), pytest.param(20, id="20", marks=pytest.mark.exhaustive)]
)
def test_the_right_engine_passes_whatever_the_seed(num_seeds: int) -> None:
    for seed in range(num_seeds):
        result = run("", seed)
        assert result.passed, [check for check in result.checks if not check.passed]


@pytest.mark.exhaustive
def test_the_engine_that_trains_passes_with_its_own_entropy() -> None:
    """As `crafts-client audit` runs it, whose own test does so each time."""
    result = audit()
    assert result.passed
    assert result.one_run.bound <= result.one_run.claimed_epsilon
    assert result.one_run.claimed_epsilon < result.one_run.control


@pytest.mark.slow
def test_an_audit_that_could_not_fail_does_not_pass() -> None:
    """Ten canaries all guessed right bound epsilon by 1.05 at best: no evidence for epsilon 2."""
    result = audit(num_canaries=10, claimed_epsilon=2.0, seed=0)
    assert result.one_run.ceiling < result.one_run.claimed_epsilon
    assert not result.passed


@pytest.mark.parametrize(("guesses", "right"), [(20, 15), (100, 80), (1000, 600), (50, 50)])
def test_without_delta_the_bound_is_clopper_pearsons(guesses: int, right: int) -> None:
    """Pure DP: right guesses are at best Binomial(e^eps / (1 + e^eps)); a closed form."""
    share = stats.beta.ppf(0.05, right, guesses - right + 1)
    expected = math.log(share / (1 - share))
    bound = epsilon_lower_bound(num_guesses=guesses, num_right=right, delta=0.0)
    assert bound == pytest.approx(max(0.0, expected), abs=2e-4)


def test_delta_weakens_the_bound_and_chance_gives_none() -> None:
    pure = epsilon_lower_bound(num_guesses=1000, num_right=800, delta=0.0)
    assert 0 < epsilon_lower_bound(num_guesses=1000, num_right=800, delta=1e-4) < pure
    assert epsilon_lower_bound(num_guesses=1000, num_right=500, delta=1e-5) == 0.0
    assert epsilon_lower_bound(num_guesses=10, num_right=0, delta=1e-5) == 0.0


def test_randomized_response_is_never_bounded_above_its_epsilon() -> None:
    """The oracle: a mechanism whose epsilon is known and whose guesses are the best there are."""
    rng, claim = np.random.default_rng(4), 1.5
    truth_share = 1 / (1 + math.exp(-claim))
    bounds = [
        epsilon_lower_bound(num_guesses=2000, num_right=rng.binomial(2000, truth_share), delta=0)
        for _ in range(40)
    ]
    assert sum(bound > claim for bound in bounds) <= 6  # 95 % confidence: 2 expected
    assert min(bounds) > claim - 0.3


@pytest.mark.gpu
def test_the_engine_passes_on_a_gpu_and_a_fault_is_caught_there() -> None:
    assert audit(device="cuda").passed
    assert not audit(faulty(AutomaticWithoutNorm), device="cuda", num_canaries=10).passed
