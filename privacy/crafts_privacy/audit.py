"""An audit of the engine that runs, by canary patients whose gradients are known exactly.

Two kinds of evidence, because each alone can be vacuous:

* **Direct statistics.** A small model whose loss is linear, so that a patient's gradient is known
  and every step can be taken apart into clipped sum and noise. Each statistic has a known
  distribution when the engine is right, and gives a p-value. They look from inside: who was drawn,
  and the weights before and after each step.
* **The one-run bound** of Steinke, Nasr and Jagielski 2023 (arXiv 2305.08846). Canaries are put in
  by coin, an attacker guesses from the weights alone which are in, and the number of right guesses
  bounds epsilon from below. A bound below the claim says little by itself, so two figures stand
  beside it: the *ceiling*, what all guesses right would give (at or below the claim, the audit
  could not fail), and the *control*, what the same audit says of the same engine without noise.

Neither proves a guarantee: an audit finds faults, the accounting promises.

Letters: T steps, N patients (canaries), D coordinates.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor, nn

from crafts_privacy.accounting import calibrate_noise_multiplier
from crafts_privacy.audit_statistics import (
    FALSE_ALARM,
    OneRun,
    Vector,
    of_z,
    one_run,
    p_fresh,
    p_rate,
    p_rotation,
    p_scale,
    p_shape,
    p_spread,
)
from crafts_privacy.gradients import GroupGradients
from crafts_privacy.mechanism import Mechanism
from crafts_privacy.noise import MAX_STD, GridNoise, NoiseSource
from crafts_privacy.optimizers import Momentum
from crafts_privacy.patient_sgd import GroupLoss, PatientLoss, PatientSGD
from crafts_privacy.sampling import PatientSampler, PoissonSampler

_PATIENTS = 48
_COORDINATES = 256
_STEPS = 60
_BOUND = 1.0
_RATE = 0.5
_NOISE = 0.3
_LONG, _SHORT = 100.0, 0.1
"""Gradient norms, in units of C, of patients that must and must not be clipped."""
_NEAR = 0.9
"""Share of C from which a contribution counts as bound by it."""
_STABILITY = 0.01
"""gamma of automatic clipping."""
_TILES = 2
_GROUP = 5
_LONG_DRAWS = 2048


class Engine(Protocol):
    """What is audited: ``PatientSGD``, or what claims to be as good."""

    def step(self, num_patients: int, patient_loss: PatientLoss) -> None:
        """One private step."""

    def step_in_groups(
        self, num_patients: int, group_loss: GroupLoss, gradients: GroupGradients
    ) -> None:
        """The same, several patients to a backward pass; asked for only with ``in_groups``."""


class MakeEngine(Protocol):
    """Builds the engine exactly as training does: learning rate 1, no momentum."""

    def __call__(
        self,
        parameters: dict[str, nn.Parameter],
        mechanism: Mechanism,
        noise: NoiseSource,
        sampler: PatientSampler,
    ) -> Engine:
        """A fresh engine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One statistic: its p-value under a right engine, and what it looks at in plain words."""

    name: str
    question: str
    p_value: float

    @property
    def passed(self) -> bool:
        return self.p_value >= FALSE_ALARM


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What was audited. Training differently is not audited by it."""

    noise: str
    """The class that drew it."""
    clippings: tuple[str, ...]
    optimizer: str
    """What comes after the noise is post-processing, so one stands for all."""
    device: str
    precision: str
    in_groups: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditResult:
    """All evidence. ``passed`` only if every part of it is right and could have been wrong."""

    subject: Subject
    checks: tuple[Check, ...]
    one_run: OneRun

    @property
    def passed(self) -> bool:
        return self.one_run.passed and all(check.passed for check in self.checks)


def patient_sgd(
    parameters: dict[str, nn.Parameter],
    mechanism: Mechanism,
    noise: NoiseSource,
    sampler: PatientSampler,
) -> Engine:
    """The engine that sites train with."""
    return PatientSGD(
        parameters, mechanism, learning_rate=1.0, optimizer=Momentum(), noise=noise, sampler=sampler
    )


def audit(
    make_engine: MakeEngine = patient_sgd,
    *,
    make_noise: Callable[[], NoiseSource] = GridNoise,
    make_sampler: Callable[[], PatientSampler] = PoissonSampler,
    num_canaries: int = 1000,
    claimed_epsilon: float = 1.0,
    device: str = "cpu",
    in_groups: bool = True,
    seed: int | None = None,
) -> AuditResult:
    """Audit an engine. Takes seconds, needs no patient's data and spends no budget.

    Args:
        make_engine: Builds the engine.
        make_noise: A fresh noise source, as a process that starts makes it.
        make_sampler: A fresh sampler.
        num_canaries: Of the one-run audit; more make its bound and its ceiling sharper.
        claimed_epsilon: Of the one-run audit's own mechanism; small, where audits have power.
        device: Where the engine runs.
        in_groups: Also where several patients share a backward pass.
        seed: Of the coins that put canaries in; the operating system's entropy if absent.
    """
    coins = np.random.default_rng(seed)
    make = _Maker(make_engine, make_noise, make_sampler, device)
    checks = direct_checks(_observe(make))
    if in_groups:
        checks += _named("in groups", direct_checks(_observe(make, in_groups=True)))
    checks += _named("automatic clipping", direct_checks(_observe(make, stability=_STABILITY)))
    checks += _named("the noise source by itself", [long_noise(make_noise(), device)])
    return AuditResult(
        subject=Subject(
            noise=type(make_noise()).__name__,
            clippings=("flat", "automatic"),
            optimizer="sgd without momentum",
            device=device,
            precision="float32",
            in_groups=in_groups,
        ),
        checks=checks,
        one_run=_one_run(make, coins, num_canaries=num_canaries, claimed_epsilon=claimed_epsilon),
    )


def _named(where: str, checks: Sequence[Check]) -> tuple[Check, ...]:
    return tuple(replace(check, name=f"{check.name}, {where}") for check in checks)


@dataclass(frozen=True, slots=True)
class _Maker:
    engine: MakeEngine
    noise: Callable[[], NoiseSource]
    sampler: Callable[[], PatientSampler]
    device: str

    def __call__(self, layer: nn.Linear, mechanism: Mechanism) -> Engine:
        parameters = dict(layer.named_parameters())
        return self.engine(parameters, mechanism, self.noise(), self.sampler())

    def layer(self, num: int) -> nn.Linear:
        """Zero weights (1, num): the gradient of its output is its input."""
        layer = nn.Linear(num, 1, bias=False, device=self.device)
        nn.init.zeros_(layer.weight)
        return layer


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """What ``T`` steps of the canary study showed, in units where the right answer is known."""

    released_TD: Vector
    """Each step's change of the weights times the divisor: clipped sum plus noise."""
    drawn_TN: Vector
    """How often each patient's loss was asked for in each step."""
    contribution_N: Vector
    """Length of each patient's clipped gradient, which lies along its own coordinate."""
    mechanism: Mechanism

    @property
    def is_bound_N(self) -> NDArray[np.bool_]:  # noqa: N802  # the shape's letter
        """Whose contribution the clipping bound holds down."""
        return self.contribution_N >= _NEAR * self.mechanism.max_grad_norm

    @property
    def standardised_noise(self) -> Vector:
        """What is left (T, D), in units of its claimed standard deviation."""
        residual = self.released_TD.copy()
        residual[:, : self.drawn_TN.shape[1]] -= self.drawn_TN * self.contribution_N
        return residual / (self.mechanism.noise_multiplier * self.mechanism.max_grad_norm)


def _observe(
    make: _Maker, *, in_groups: bool = False, stability: float | None = None
) -> Observation:
    """The canary study: two engines, one after the other, as training before and after a restart.

    Patient i's gradient lies along coordinate i, a hundred times too long for even i, a tenth of
    the bound for odd i, and comes in parts that add up, as microbatches of tiles do. With
    ``stability`` the clipping is automatic, which brings all of them near to the bound.
    """
    mechanism = Mechanism(
        noise_multiplier=_NOISE,
        max_grad_norm=_BOUND,
        sample_rate=_RATE,
        expected_patients=_RATE * _PATIENTS,
        stability=stability,
    )
    layer = make.layer(_COORDINATES)
    length_N = np.where(np.arange(_PATIENTS) % 2 == 0, _LONG, _SHORT) * _BOUND
    drawn: list[int] = []

    def tiles_of(patient: int) -> Tensor:
        drawn.append(patient)
        rows_TD = torch.zeros(_TILES, _COORDINATES, device=make.device)
        rows_TD[:, patient] = length_N[patient] / _TILES
        return rows_TD

    def patient_loss(patient: int) -> Iterator[Tensor]:
        for row_D in tiles_of(patient):
            yield layer(row_D).sum()

    nobody_TD = torch.zeros(_TILES, _COORDINATES, device=make.device)

    def group_loss(places: Sequence[int | None]) -> Tensor:
        rows = [nobody_TD if patient is None else tiles_of(patient) for patient in places]
        loss_B: Tensor = layer(torch.cat(rows)).squeeze(1)
        return loss_B

    released, counts = [], []
    for _ in range(2):
        engine = make(layer, mechanism)
        for _ in range(_STEPS // 2):
            drawn.clear()
            # From zero each time, so that float32 weights hold the whole step.
            nn.init.zeros_(layer.weight)
            if in_groups:
                with GroupGradients(
                    layer, list(layer.parameters()), num_patients=_GROUP, num_tiles=_TILES
                ) as gradients:
                    engine.step_in_groups(_PATIENTS, group_loss, gradients)
            else:
                engine.step(_PATIENTS, patient_loss)
            weights_D = layer.weight.detach()[0].double().cpu().numpy()
            released.append(-weights_D * mechanism.expected_patients)
            counts.append(np.bincount(drawn, minlength=_PATIENTS).astype(float))
    return Observation(
        released_TD=np.stack(released),
        drawn_TN=np.stack(counts),
        contribution_N=(
            np.minimum(length_N, _BOUND)
            if stability is None
            else _BOUND * length_N / (length_N + stability)
        ),
        mechanism=mechanism,
    )


def direct_checks(seen: Observation) -> tuple[Check, ...]:
    """The statistics, each with its p-value under a right engine."""
    return (
        Check(
            name="weights move",
            question="does every step change the weights?",
            p_value=float(np.abs(seen.released_TD).max(axis=1).min() > 0),
        ),
        Check(
            name="clip",
            question="does no patient add more than the bound, however its tiles come?",
            p_value=_clip(seen),
        ),
        Check(
            name="noise scale",
            question="has the noise the claimed standard deviation?",
            p_value=p_scale(seen.standardised_noise),
        ),
        Check(
            name="noise shape",
            question="is the noise Gaussian around zero?",
            p_value=p_shape(seen.standardised_noise[:, _PATIENTS:]),
        ),
        Check(
            name="noise is fresh",
            question="is each step's noise its own, after a restart as well?",
            p_value=p_fresh(seen.standardised_noise[:, _PATIENTS:]),
        ),
        Check(
            name="sampling rate",
            question="is a patient drawn as often as claimed, and at most once a step?",
            p_value=p_rate(seen.drawn_TN, seen.mechanism.sample_rate),
        ),
        Check(
            name="independent sampling",
            question="does the size of the sample vary as independent draws make it?",
            p_value=p_spread(seen.drawn_TN, seen.mechanism.sample_rate),
        ),
        Check(
            name="no rotation",
            question="is who was drawn in one step independent of the step before?",
            p_value=p_rotation(seen.drawn_TN, seen.mechanism.sample_rate),
        ),
        Check(
            name="fixed divisor",
            question="is the step independent of how many were drawn?",
            p_value=_divisor(seen),
        ),
    )


def long_noise(noise: NoiseSource, device: str = "cpu") -> Check:
    """Whether the longest noise that an engine may ask for is whole.

    The canary study adds little noise. What a source cuts off elsewhere, say at the edge of the
    type that it counts in, would be the sum without noise.
    """
    drawn_D = torch.zeros(_LONG_DRAWS, dtype=torch.float64, device=device)
    noise.add_(drawn_D, MAX_STD)
    standardised = drawn_D.cpu().numpy() / MAX_STD
    return Check(
        name="long noise",
        question="is noise Gaussian and as wide as claimed where it is longest?",
        p_value=min(1.0, 2 * min(p_scale(standardised), p_shape(standardised))),
    )


def _clip(seen: Observation) -> float:
    """Mean of what the bound patients added, one-sided above what clipping leaves of them."""
    num = seen.drawn_TN.shape[1]
    inside = seen.drawn_TN.astype(bool) & seen.is_bound_N
    if not inside.any():
        return 1.0  # the sampling statistics speak to that
    excess = (seen.released_TD[:, :num] - seen.contribution_N)[inside].mean()
    std = seen.mechanism.noise_multiplier * seen.mechanism.max_grad_norm
    return float(stats.norm.sf(excess / (std / math.sqrt(inside.sum()))))


def _divisor(seen: Observation) -> float:
    """Slope of the bound patients' sum, beyond its expectation, on the size of the sample."""
    num = seen.drawn_TN.shape[1]
    bound_TN = seen.drawn_TN * seen.is_bound_N
    noise_TN = seen.standardised_noise[:, :num] * bound_TN
    size_T = seen.drawn_TN.sum(axis=1)
    centred_T = size_T - size_T.mean()
    variance = float((centred_T**2 * bound_TN.sum(axis=1)).sum())
    if variance == 0:
        return 1.0  # samples of one size: the sampling statistics speak to that
    return of_z(float((centred_T * noise_TN.sum(axis=1)).sum()) / math.sqrt(variance))


def _one_run(
    make: _Maker, coins: np.random.Generator, *, num_canaries: int, claimed_epsilon: float
) -> OneRun:
    """Eight steps at rate 1/2 on canaries of full length, each in by coin."""
    delta, steps = 1e-5, 8
    noise = calibrate_noise_multiplier(
        target_epsilon=claimed_epsilon, delta=delta, sample_rate=_RATE, steps=steps
    )
    right = _guess(make, coins, num_canaries, noise=noise, steps=steps)
    without = _guess(make, coins, num_canaries, noise=1e-3, steps=steps)
    return one_run(
        claimed_epsilon=claimed_epsilon,
        delta=delta,
        num_canaries=num_canaries,
        num_right=right,
        without_noise=without,
    )


def _guess(make: _Maker, coins: np.random.Generator, num: int, *, noise: float, steps: int) -> int:
    """How many canaries an attacker tells in from out by the final weights."""
    is_in = coins.integers(0, 2, num).astype(bool)
    members = np.flatnonzero(is_in)
    mechanism = Mechanism(
        noise_multiplier=noise,
        max_grad_norm=_BOUND,
        sample_rate=_RATE,
        expected_patients=1.0,
    )
    layer = make.layer(num)
    engine = make(layer, mechanism)
    for _ in range(steps):
        engine.step(
            len(members), lambda patient: [2 * _BOUND * layer.weight[0, int(members[patient])]]
        )
    score = -layer.weight.detach()[0].double().cpu().numpy()
    guess_in = score > _RATE * steps * _BOUND / 2
    return int((guess_in == is_in).sum())
