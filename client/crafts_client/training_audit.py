"""An audit of the path that trains: the installed trainer, on patients that nobody is.

``crafts_privacy.audit`` takes the engine apart where every gradient is known by construction. Here
runs what a round runs (``Trainer``: tile store, cache, losses, groups, clipping, sampling, noise,
divisor, and what is released) as this site is set up: its device, precision, groups and noise
source. Only the patients are public. Each question has a control that shows that the answer could
have been no, and the declared number of patients is never the true one.

Letters: T steps, N patients, S counts, D coordinates.
"""

import math
import tempfile
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from crafts_client.home import SiteConfig
from crafts_client.public_patients import PublicPatients
from crafts_client.release_bench import ReleaseBench
from crafts_client.speed import Speed
from crafts_client.training_bench import (
    DELTA,
    FACTORS,
    RATE,
    SMALL_MOVE,
    Bench,
    UnseenStepsError,
)
from crafts_client.training_task import Randomness
from crafts_core.foundation import Foundation
from crafts_core.plan_sections import RELEASES, Part, StageName
from crafts_core.progress import Progress
from crafts_privacy.accounting import calibrate_noise_multiplier
from crafts_privacy.audit_statistics import (
    FALSE_ALARM,
    OneRun,
    Vector,
    one_run,
    p_fresh,
    p_rate,
    p_rotation,
    p_scale,
    p_shape,
    p_spread,
)

_Bench = TypeVar("_Bench", bound=Bench)
Integers = NDArray[Any]
"""Python's own integers (D,): nothing rounds."""

_LARGEST_MISFIT = 0.02
"""Relative difference of what is released and what the sums say, which float32 weights explain."""
_GRADIENT_DRIFT = 0.03
"""Of C in a coordinate: what a round's own movement makes of its gradients, at most."""
_NUMBERS_OF_NOISE = 2000
"""In each of four rows, so that a tenth less noise is seen: one release has 7 or some hundred."""
_COMPARED, _SAMPLED = 9, 16
"""Patients: more than one group of them, and as many as show that samples are independent."""
_QUESTIONS = 8
"""Of a stage where patients share a pass; one less where they do not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingCheck:
    """One question to the trainer."""

    stage: StageName
    name: str
    question: str
    passed: bool
    found: str
    """The figures, with those of the control."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageOneRun:
    """The one-run bound of a stage, from nothing but what the trainer releases."""

    stage: StageName
    one_run: OneRun


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingAudit:
    """All evidence of the path that trains."""

    stages: tuple[StageName, ...]
    checks: tuple[TrainingCheck, ...]
    one_runs: tuple[StageOneRun, ...]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks) and all(
            each.one_run.passed for each in self.one_runs
        )


def audit_training(
    foundation: Foundation,
    config: SiteConfig,
    stages: Collection[StageName],
    randomness: Randomness,
    *,
    num_canaries: int = 64,
    seed: int | None = None,
    progress: Progress | None = None,
) -> TrainingAudit:
    """Audit the trainer. Needs no patient's data and spends no budget.

    Args:
        foundation: The site's, on its device.
        config: How the site trains.
        stages: Those that its policy allows.
        randomness: The site's own.
        num_canaries: Of the one-run bound; more make it and its ceiling sharper.
        seed: Of the coins that put canaries in; the operating system's entropy if absent.
        progress: Called with what, done and all.
    """
    coins = np.random.default_rng(seed)
    told = tuple(stage for stage in RELEASES if stage in stages)
    wanted = tuple(stage for stage in FACTORS if stage in stages)
    parts: tuple[Part, ...] = ("generator", *(("nuclei",) if "control" in wanted else ()))
    checks: list[TrainingCheck] = []
    runs: list[StageOneRun] = []

    def done() -> None:
        if progress is not None:
            total = len(told) * len(_OF_RELEASES) + len(wanted) * _QUESTIONS
            progress("trainer", len(checks) + len(runs), total)

    with tempfile.TemporaryDirectory(prefix="crafts-audit-") as folder:
        patients = PublicPatients.write(
            Path(folder) / "tiles", foundation, num_patients=num_canaries, views=config.views
        )
        for release in told:
            of_release = ReleaseBench(foundation, patients, release, Speed.of(config), randomness)
            for question in _OF_RELEASES:
                checks += answers(question, of_release)
                done()
        for stage in wanted:
            bench = Bench(foundation, patients, parts, stage, Speed.of(config), randomness)
            for ask in (neighbours, nobody, samples, declared_number):
                for check in answers(ask, bench):
                    checks.append(check)
                    done()
            try:
                runs.append(StageOneRun(stage=stage, one_run=bound_from_releases(bench, coins)))
            except UnseenStepsError as error:
                checks.append(_unseen(bench, error))
            done()
    return TrainingAudit(stages=(*told, *wanted), checks=tuple(checks), one_runs=tuple(runs))


def answers(
    ask: Callable[[_Bench], Iterator[TrainingCheck]], bench: _Bench
) -> Iterator[TrainingCheck]:
    """What a question finds; one that cannot be asked to its end has failed."""
    try:
        yield from ask(bench)
    except UnseenStepsError as error:
        yield _unseen(bench, error)


def _unseen(bench: Bench, error: UnseenStepsError) -> TrainingCheck:
    return TrainingCheck(
        stage=bench.stage,
        name="noise in every step",
        question="does each step hand its sum to the noise source, once?",
        passed=False,
        found=str(error),
    )


def neighbours(bench: Bench) -> Iterator[TrainingCheck]:
    """Sums with and without each patient, as integers, at the very same weights."""
    bound = int(bench.bound / bench.grid) ** 2
    for way in bench.ways:
        pairs = [_sums(bench, way, deviation) for deviation in bench.deviations]
        one = [_squared_distance(whole, part) for whole, *parts in pairs for part in parts]
        two = [
            _squared_distance(first, second)
            for _, *parts in pairs
            for first, second in zip(parts[1:], parts[:-1], strict=True)
        ]
        are_whole = all(
            isinstance(value, int) for sums in pairs for sum_D in sums for value in sum_D
        )
        shares = [math.sqrt(square / bound) for square in one]
        yield TrainingCheck(
            stage=bench.stage,
            name=f"neighbouring cohorts, {way}",
            question="does a patient more or less move the sum by at most C, and one replaced by "
            "2 C, in integers?",
            passed=are_whole
            and max(one) <= bound
            and max(two) <= 4 * bound
            and min(shares) >= bench.least_share,
            found=f"{len(one)} pairs are {min(shares):.6f} to {max(shares):.6f} C apart, replaced "
            f"up to {math.sqrt(max(two) / bound):.3f} C",
        )


def _sums(bench: Bench, way: str, deviation: float) -> list[Integers]:
    """Of everybody; without each, not drawn; and once more without the first, withdrawn."""
    everybody = list(range(_COMPARED))
    without = [[other for other in everybody if other != one] for one in everybody]
    seam = bench.seam
    seam.listen(keeps="nothing", script=[everybody, *without])
    bench.train(way, steps=1 + len(without), deviation=deviation)
    sums = list(seam.sums)
    # Where patient 0 has withdrawn, the trainer counts from the next one.
    seam.listen(keeps="nothing", script=[everybody[:-1]])
    bench.train(way, steps=1, without=[0], deviation=deviation)
    return [_exact(sum_D) for sum_D in [*sums, *seam.sums]]


def _exact(sum_D: Tensor) -> Integers:
    """Each number as an integer; what is none stays a float."""
    return np.array([int(x) if x.is_integer() else x for x in sum_D.tolist()], dtype=object)


def _squared_distance(first: Integers, second: Integers) -> float:
    difference = first - second
    squared: float = (difference * difference).sum()  # an integer, if both are
    return squared


def nobody(bench: Bench) -> Iterator[TrainingCheck]:
    """Rounds on nobody: what is released is noise, of the right strength, and never the same."""
    rounds, steps, everyone = 4, 3, range(len(bench.patients.names))
    released: list[Vector] = []
    noise: list[Vector] = []
    is_idle = True
    for number in range(rounds):
        if number == rounds // 2:
            bench.restart()
        bench.seam.listen(keeps="noise")
        delta_D = bench.train(bench.fastest, steps=steps, without=everyone)
        released.append(delta_D / (bench.move * math.sqrt(steps)))
        noise += [each.numpy() for each in bench.seam.noise]
        is_idle &= not any(asked.any() for asked in bench.seam.asked)
    scale, shape = p_scale(np.stack(released)), p_shape(np.stack(released))
    yield TrainingCheck(
        stage=bench.stage,
        name="a round on nobody",
        question="does a round without patients release Gaussian noise of the declared strength?",
        passed=is_idle and min(scale, shape) >= FALSE_ALARM,
        found=f"standard deviation {np.std(released):.4f} of the declared, p = {scale:.2g}; "
        f"shape p = {shape:.2g}",
    )
    fresh = min(p_fresh(np.stack(noise)), p_fresh(np.stack(released)))
    repeated = p_fresh(np.stack([*noise, noise[0]]))
    yield TrainingCheck(
        stage=bench.stage,
        name="noise is fresh",
        question="is each step's noise its own, in each round and after a restart?",
        passed=fresh >= FALSE_ALARM > repeated,
        found=f"p = {fresh:.2g} over {len(noise)} steps; with one of them twice {repeated:.2g}",
    )


def release_of_nobody(bench: ReleaseBench) -> Iterator[TrainingCheck]:
    """Releases of nobody: noise of the right strength, and never the same."""
    everyone = range(len(bench.patients.names))
    rows, row_length = 4, math.ceil(_NUMBERS_OF_NOISE / bench.num_values)
    released: list[Vector] = []
    bench.seam.listen(keeps="noise")
    for number in range(rows):
        if number == rows // 2:
            bench.restart()
        told = [bench.train(bench.fastest, steps=1, without=everyone) for _ in range(row_length)]
        released.append(np.concatenate(told) / bench.move)
    is_idle = not any(asked.any() for asked in bench.seam.asked)
    scale, shape = p_scale(np.stack(released)), p_shape(np.stack(released))
    fresh, repeated = p_fresh(np.stack(released)), p_fresh(np.stack([*released, released[0]]))
    yield TrainingCheck(
        stage=bench.stage,
        name="a release of nobody",
        question="is what is released without patients fresh Gaussian noise of the declared "
        "strength?",
        passed=is_idle and min(scale, shape, fresh) >= FALSE_ALARM > repeated,
        found=f"standard deviation {np.std(released):.4f} of the declared, p = {scale:.2g}; "
        f"shape p = {shape:.2g}; fresh p = {fresh:.2g}, with one of {rows} twice {repeated:.2g}",
    )


def samples(bench: Bench) -> Iterator[TrainingCheck]:
    """Who is asked for in each step by the site's own sampler, and the noise beside their sum."""
    rounds, steps = 3, 6
    others = range(_SAMPLED, len(bench.patients.names))
    asked: list[Vector] = []
    beside: list[Vector] = []
    for _ in range(rounds):
        bench.seam.listen(keeps="noise")
        delta_D = bench.train(bench.fastest, steps=steps, without=others)
        asked += bench.seam.asked
        rest_D = delta_D + bench.per_sum * bench.seam.total
        beside.append(rest_D / (bench.move * math.sqrt(steps)))
    drawn_TN = np.stack(asked)[:, :_SAMPLED]
    reused_TN = np.repeat(drawn_TN[::steps], steps, axis=0)
    p_value = min(test(drawn_TN, RATE) for test in (p_rate, p_spread, p_rotation))
    control = p_rotation(reused_TN, RATE)
    yield TrainingCheck(
        stage=bench.stage,
        name="independent samples",
        question="are patients drawn anew in each step, each with the declared rate?",
        passed=p_value >= FALSE_ALARM > control,
        found=f"p = {p_value:.2g} over {len(asked)} steps; with a round's first sample in all of "
        f"its steps {control:.2g}",
    )
    scale = p_scale(np.stack(beside))
    yield TrainingCheck(
        stage=bench.stage,
        name="noise beside patients",
        question="has the noise its declared strength where patients are drawn?",
        passed=scale >= FALSE_ALARM,
        found=f"standard deviation {np.std(beside):.4f} of the declared, p = {scale:.2g}",
    )


def declared_number(bench: Bench) -> Iterator[TrainingCheck]:
    """Rounds without noise on cohorts of several sizes: the sum, over the declared number."""
    steps, sizes = 2, (_COMPARED, _COMPARED // 2, 1)
    misfits: list[float] = []
    stds: list[float] = []
    for size in sizes:
        bench.seam.listen(keeps="sum", script=[list(range(size))] * steps)
        others = range(size, len(bench.patients.names))
        delta_D = bench.train(bench.fastest, steps=steps, without=others)
        wanted_D = -bench.per_sum * bench.seam.total
        misfits.append(float(np.linalg.norm(delta_D - wanted_D) / np.linalg.norm(wanted_D)))
        stds += bench.seam.stds
    declared = bench.noise * bench.bound / bench.grid
    yield TrainingCheck(
        stage=bench.stage,
        name="the declared number",
        question="is the sum divided, and the noise sized, by what is declared, whoever is there?",
        passed=max(misfits) <= _LARGEST_MISFIT and all(std == declared for std in stds),
        found=f"what is released is off by {max(misfits):.1e} of its length with "
        f"{', '.join(map(str, sizes))} of {bench.declared} declared patients",
    )


_OF_RELEASES: tuple[Callable[[ReleaseBench], Iterator[TrainingCheck]], ...] = (
    neighbours,
    release_of_nobody,
    declared_number,
)


def bound_from_releases(
    bench: Bench, coins: np.random.Generator, *, claimed_epsilon: float = 1.0
) -> OneRun:
    """Canaries are in by coin, and guessed from the released weights alone.

    Args:
        bench: All its patients are canaries.
        coins: Whose.
        claimed_epsilon: Of the bound's own mechanism; small, where audits have power.
    """
    num, steps = len(bench.patients.names), 8
    noise = calibrate_noise_multiplier(
        target_epsilon=claimed_epsilon, delta=DELTA, sample_rate=RATE, steps=steps
    )
    bench.seam.listen(keeps="nothing", script=[[place] for place in range(num)])
    bench.train(bench.fastest, steps=num)
    canaries_ND = torch.stack(bench.seam.sums).numpy() * bench.grid / bench.bound
    right, without = (
        _num_right(bench, coins, canaries_ND, noise_multiplier=multiplier, steps=steps)
        for multiplier in (noise, 1e-3)
    )
    return one_run(
        claimed_epsilon=claimed_epsilon,
        delta=DELTA,
        num_canaries=num,
        num_right=right,
        without_noise=without,
    )


def _num_right(
    bench: Bench,
    coins: np.random.Generator,
    canaries_ND: Vector,
    *,
    noise_multiplier: float,
    steps: int,
) -> int:
    """How many canaries an attacker who knows every gradient tells in from out by the release."""
    is_in_N = coins.integers(0, 2, len(canaries_ND)).astype(bool)
    bench.seam.listen(keeps="noise")
    delta_D = bench.train(
        bench.fastest,
        steps=steps,
        without=np.flatnonzero(~is_in_N).tolist(),
        noise_multiplier=noise_multiplier,
        move=SMALL_MOVE,
    )
    seen_D = -delta_D / SMALL_MOVE
    # What no canary explains is noise, however much of it was declared.
    explained_N, *_ = np.linalg.lstsq(canaries_ND.T, seen_D, rcond=None)
    unexplained = float(np.square(seen_D - explained_N @ canaries_ND).mean())
    variance = max(unexplained, _GRADIENT_DRIFT**2)
    odds_N = log_odds(canaries_ND, seen_D, variance=variance, steps=steps)
    return int(((odds_N > 0) == is_in_N).sum())


def log_odds(canaries_ND: Vector, seen_D: Vector, *, variance: float, steps: int) -> Vector:
    """Log-odds (N,) that each took part, from ``seen = counts @ canaries + noise``.

    Gradients overlap, so all counts are estimated together, as if they were Gaussian with their own
    mean and variance. What then speaks for one canary, apart from that prior, is compared under a
    count of zero and under a binomial one.
    """
    mean, spread = steps * RATE / 2, steps * RATE / 4 + (steps * RATE / 2) ** 2
    precision_NN = canaries_ND @ canaries_ND.T / variance
    np.fill_diagonal(precision_NN, precision_NN.diagonal() + 1 / spread)
    covariance_NN = np.linalg.inv(precision_NN)
    residual_D = seen_D - mean * canaries_ND.sum(axis=0)
    posterior_N = mean + covariance_NN @ (canaries_ND @ residual_D) / variance
    own_N = covariance_NN.diagonal()
    error_N = 1 / (1 / own_N - 1 / spread)
    seen_N = error_N * (posterior_N / own_N - mean / spread)
    count_S = np.arange(steps + 1)
    inside_NS = stats.norm.logpdf(seen_N[:, None], count_S, np.sqrt(error_N)[:, None])
    likely_S = stats.binom.logpmf(count_S, steps, RATE)
    odds_N: Vector = np.logaddexp.reduce(inside_NS + likely_S, axis=1) - inside_NS[:, 0]
    return odds_N
