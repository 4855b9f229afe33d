"""The local part of a round: a global adapter goes in, a private delta comes out.

The model stays warm between rounds. No loss, count or norm of a patient is returned or logged:
everything that leaves the site went through ``PatientSGD``, or waits in a ``HeldSum`` for its
noise. One count stays, for the site's operator: how often a patient's gradient was not finite.
"""

import copy
import itertools
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from crafts_client.answer_times import PublicStep
from crafts_client.errors import TrainingError
from crafts_client.patients import PatientTiles
from crafts_client.releasing import Told, public_release, vector_of
from crafts_client.speed import Speed
from crafts_core.adapters import Adapter
from crafts_core.control_net import num_halvings_of
from crafts_core.exchange import global_norm
from crafts_core.foundation import Foundation
from crafts_core.installing import how_to_install
from crafts_core.plan import (
    GENERATOR_ONLY,
    AdapterConfig,
    Factor,
    Modality,
    Part,
    Plan,
    PrivacyConfig,
    StageConfig,
)
from crafts_core.releases import class_anchors
from crafts_core.stages.batch import Draws, TileBatch
from crafts_core.stages.objective import Objective, assert_per_tile
from crafts_core.stages.public_batch import probe_batch
from crafts_core.state import State, add_delta, factor_names
from crafts_core.threads import Map, side_by_side
from crafts_privacy.accounting import PrivacyEvent
from crafts_privacy.gradients import FlatGradient, GroupGradients
from crafts_privacy.held_sum import HeldStep, HeldSum
from crafts_privacy.isolation import is_isolated
from crafts_privacy.mechanism import Mechanism
from crafts_privacy.noise import ExactNoise, GridNoise, NoiseSource
from crafts_privacy.optimizers import optimizer_of
from crafts_privacy.patient_sgd import PatientSGD, PatientSum
from crafts_privacy.ranks import Alone, Ranks
from crafts_privacy.sampling import PatientSampler, PoissonSampler

_LOG = logging.getLogger(__name__)

_AWAKE = 0.1
"""Standard deviation of what ``_awake`` adds."""
_WILD = 5.0
"""Standard deviation of what a hostile adapter may hold, for a check before the first round."""
_SHIFTS = (1, 2, 3, 4)
"""Passes of the check that patients are isolated (``is_isolated``); one a round."""
Drawn = tuple[TileBatch, Draws]
"""A patient's tiles with their noise and timesteps."""
TakeSteps = Callable[[PatientSum], None]
"""Exactly a round's steps, on this device's patients."""


def entropy_generator(step: int = 0, patient: str = "") -> torch.Generator:  # noqa: ARG001
    """A generator that nobody can seed again: which tiles, which noise, which timesteps."""
    return torch.Generator().manual_seed(int.from_bytes(os.urandom(8), "little", signed=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class Randomness:
    """Where a site's private randomness comes from.

    Anything but the default is for tests and simulations: a release tells which noise it was.
    """

    noise: NoiseSource
    sampler: PatientSampler
    generator: Callable[[int, str], torch.Generator]
    """A fresh one for each step of a round and each patient (by pseudonym), for the choice of tiles
    and the diffusion draws: who else is drawn must not move a patient's draws."""

    @classmethod
    def from_os(cls, *, exact_noise: bool = False) -> "Randomness":
        """The operating system's entropy.

        Raises:
            TrainingError: exact noise is asked for and OpenDP is not installed.
        """
        try:
            noise = ExactNoise() if exact_noise else GridNoise()
        except ImportError as error:
            raise TrainingError(
                f"exact_noise needs OpenDP: {how_to_install('exact-noise')}"
            ) from error
        return cls(noise=noise, sampler=PoissonSampler(), generator=entropy_generator)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingTask:
    """One round at one site, after every check."""

    stage: StageConfig
    factor: Factor
    privacy: PrivacyConfig
    mechanism: Mechanism
    charged: PrivacyEvent
    """What the ledger holds for this round; training that differs from it gives nothing."""
    state: Mapping[str, Tensor]
    """The global adapter of the round."""
    stage_start: Mapping[str, Tensor] | None
    """The adapter that the stage began with (theta1), where the stage's loss needs it."""
    sum_grid_bits: int | None = None
    """Of a step whose sum is held until it is known who else adds noise; of the plan."""
    withdrawn: frozenset[str] = frozenset()
    """Pseudonyms of patients who take no part any more."""
    captions: tuple[str, ...] = ()
    """The study's classes, of a stage that needs them."""

    @classmethod
    def of_plan(
        cls,
        plan: Plan,
        stage: StageConfig,
        factor: Factor,
        mechanism: Mechanism,
        *,
        state: Mapping[str, Tensor],
        stage_start: Mapping[str, Tensor] | None,
        withdrawn: frozenset[str] = frozenset(),
    ) -> Self:
        """A round of one of the plan's stages."""
        return cls(
            stage=stage,
            factor=factor,
            privacy=plan.privacy_of(stage),
            mechanism=mechanism,
            charged=mechanism.event(stage.local_steps),
            state=state,
            stage_start=stage_start,
            withdrawn=withdrawn,
            sum_grid_bits=plan.privacy.sum_grid_bits,
            captions=plan.captions_of(stage),
        )

    @property
    def num_bytes(self) -> int:
        """Of a round's files: sealed, then kept for an attack of the site's own with all it got."""
        size_of = {name: tensor.numel() for name, tensor in self.state.items()}
        names = factor_names(self.state, self.factor)
        return 4 * (2 * sum(size_of[name] for name in names) + sum(size_of.values()))


class _AllPublic:
    """The sampler of steps on public patients: all of them."""

    def sample(self, num_patients: int, sample_rate: float) -> NDArray[np.int64]:  # noqa: ARG002
        return np.arange(num_patients)


class Trainer:
    """One adapter on one copy of the UNet, ready for the next round."""

    def __init__(
        self,
        foundation: Foundation,
        config: AdapterConfig,
        patients: PatientTiles,
        *,
        parts: Sequence[Part] = GENERATOR_ONLY,
        randomness: Randomness,
        speed: Speed,
        ranks: Ranks | None = None,
        after_step: Callable[[int], None] = lambda _: None,
    ) -> None:
        """Attach the adapter.

        Args:
            foundation: Already on the device that trains.
            config: The plan's adapter section.
            patients: The site's cohort.
            parts: What the plan's adapter consists of.
            randomness: ``Randomness.from_os()``.
            speed: Memory and time only.
            ranks: The site's devices that share every step; this one alone if absent.
            after_step: Told how many of a round's steps are done. When it is called tells roughly
                how many patients were drawn.

        Raises:
            AdapterError: the adapter does not fit the foundation.
        """
        self._foundation = foundation
        self._adapter = Adapter.attach(
            copy.deepcopy(foundation.generator.denoiser),
            config,
            parts,
            num_halvings=num_halvings_of(foundation.generator),
        )
        self._patients = patients
        self._randomness = randomness
        self._speed = speed
        self._ranks = ranks
        self._after_step = after_step
        self._public_tiles: dict[tuple[Modality | None, tuple[str, ...]], TileBatch] = {}
        self._trusted: dict[tuple[StageConfig, Factor, int], Speed] = {}
        self._shifts = itertools.cycle(_SHIFTS)
        self.num_unusable_patients = 0
        """Of the newest round, as ``PatientSGD`` counts them: for the site's own eyes."""
        self.has_drawn = False
        """Whether the newest round has drawn patients. Before, only public values decided."""

    def schema(self) -> State:
        """Tensors with the names and shapes that every global adapter must have."""
        return self._adapter.state()

    def train(
        self, task: TrainingTask, before_draws: Callable[[PublicStep], None] | None = None
    ) -> State:
        """Run the round's local steps.

        Args:
            task: The round, after every check.
            before_draws: Called when only private steps are left to do, with one on public tiles
                that can be timed. What comes before it takes no longer for one patient more.

        Returns:
            Final minus received weights of the trained factor, float32 on the CPU.

        Raises:
            AdapterError: a state does not fit the adapter.
            BatchCoupledLossError: the loss has no per-patient sensitivity.
            TrainingError: the result is not finite.
        """
        take_steps = self._prepare(task, before_draws)
        parameters = self._trained(task)
        optimizer = self._sgd(task, parameters, self._randomness.sampler, self._ranks)
        self._step_on_patients(optimizer, task, take_steps)
        delta = {
            name: parameter.detach().to("cpu", torch.float32) - task.state[name].float()
            for name, parameter in parameters.items()
        }
        # A function of noised sums and public values alone, so that a refusal tells no more of a
        # patient than the update would have.
        if not torch.tensor(global_norm(delta)).isfinite():
            raise TrainingError(
                "training gave weights that are not finite; ask the coordinator for a smaller "
                "learning rate"
            )
        return delta

    def hold(
        self, task: TrainingTask, before_draws: Callable[[PublicStep], None] | None = None
    ) -> HeldSum:
        """Take the round's one step as far as the sum over patients, which is held.

        Args:
            task: The round, after every check; with ``sum_grid_bits``.
            before_draws: As in ``train``.

        Raises:
            AdapterError: a state does not fit the adapter.
            BatchCoupledLossError: the loss has no per-patient sensitivity.
            TrainingError: another number of steps was charged.
        """
        assert task.sum_grid_bits is not None
        take_steps = self._prepare(task, before_draws)
        step = HeldStep(
            self._trained(task),
            task.mechanism,
            noise=self._randomness.noise,
            sampler=self._randomness.sampler,
            grid_bits=task.sum_grid_bits,
            ranks=self._ranks,
        )
        self._step_on_patients(step, task, take_steps)
        return step.take()

    def time(self, task: TrainingTask, before_draws: Callable[[PublicStep], None]) -> None:
        """What comes before a round's first draw, and no more: ``before_draws`` as in ``train``."""
        self._prepare(task, before_draws)

    def _prepare(
        self, task: TrainingTask, before_draws: Callable[[PublicStep], None] | None
    ) -> TakeSteps:
        """Everything before the first draw, on public values; what is left are the steps."""
        self.num_unusable_patients, self.has_drawn = 0, False
        self._patients.leave_out(task.withdrawn)
        if task.captions:
            self._patients.classes_of(task.captions)  # not while an answer's time is running
        if task.stage.is_release:
            return self._prepare_release(task, before_draws)
        self._adapter.load_state(_awake(task))
        objective = self._objective(task)
        speed = self._trusted_speed(task, objective, _rows_of(task))
        if before_draws is not None:
            before_draws(self._public_step(task, objective, speed))
        self._adapter.load_state(task.state)
        own = self._patients.of_rank(self._ranks or Alone())

        def take_steps(optimizer: PatientSum) -> None:
            self._take_steps(
                optimizer,
                task,
                objective,
                speed,
                num_steps=task.stage.local_steps,
                num_patients=len(own),
                drawn=lambda place: self._drawn(
                    own[place], objective, task, step=optimizer.steps_taken
                ),
                after_step=self._after_step,
            )

        return take_steps

    def _prepare_release(
        self, task: TrainingTask, before_draws: Callable[[PublicStep], None] | None
    ) -> TakeSteps:
        """The same of a release: no network runs, each patient is told by a vector of its own."""
        told = Told(
            factor=task.factor,
            captions=task.captions,
            max_tiles=task.privacy.tiles_per_patient,
        )
        if before_draws is not None:
            before_draws(self._public_release(task, told))
        own = self._patients.of_rank(self._ranks or Alone())

        def take_step(optimizer: PatientSum) -> None:
            def vector(place: int) -> Tensor:
                name = self._patients.pseudonym(own[place])
                generator = self._randomness.generator(optimizer.steps_taken, name)
                return vector_of(self._patients, own[place], told, generator)

            optimizer.step_on_vectors(len(own), vector)
            self._after_step(1)

        return take_step

    def _public_release(self, task: TrainingTask, told: Told) -> PublicStep:
        """A release of public patients, noise and all."""
        make = public_release(self._foundation, told)

        def run(num_patients: int) -> None:
            optimizer = self._sgd(task, self._trained(task), _AllPublic(), self._ranks)
            optimizer.step_on_vectors(num_patients, lambda _: make())

        return PublicStep(run=run, group_size=1)

    def _step_on_patients(
        self, optimizer: PatientSum, task: TrainingTask, take_steps: TakeSteps
    ) -> None:
        """Exactly the steps that were charged, on this device's patients."""
        self.has_drawn = True
        take_steps(optimizer)
        self.num_unusable_patients = optimizer.num_unusable_patients()
        if optimizer.event() != task.charged:
            raise TrainingError("training ran other steps than the ledger was charged for")

    def _trained(self, task: TrainingTask) -> dict[str, nn.Parameter]:
        """What a round moves: a factor's weights, or what a release tells, from zero."""
        if not task.stage.is_release:
            return self._adapter.trainable(task.factor)
        return {
            name: nn.Parameter(task.state[name].to(self._foundation.device, copy=True))
            for name in factor_names(task.state, task.factor)
        }

    def _sgd(
        self,
        task: TrainingTask,
        parameters: Mapping[str, nn.Parameter],
        sampler: PatientSampler,
        ranks: Ranks | None = None,
    ) -> PatientSGD:
        return PatientSGD(
            parameters,
            task.mechanism,
            learning_rate=task.stage.learning_rate,
            optimizer=optimizer_of(task.stage),
            noise=self._randomness.noise,
            sampler=sampler,
            ranks=ranks,
        )

    def _public_step(self, task: TrainingTask, objective: Objective, speed: Speed) -> PublicStep:
        """A private step, noise and all, on public patients with as many tiles as ours may have.

        Their tiles are drawn anew for each, as patients' are. All of the site's devices take it
        together, as they take patients' steps: it lasts as long as the slowest one's, and no device
        is at its patients while another is timed.
        """
        num_tiles = task.privacy.tiles_per_patient
        tiles = self._probe(1, task).select(torch.zeros(num_tiles, dtype=torch.int64))
        tiles = replace(tiles, weight_B=torch.full_like(tiles.weight_B, 1.0 / num_tiles))
        at_a_time = speed.at_a_time(_rows_of(task))

        def drawn(_patient: int) -> Drawn:
            batch = tiles.repeat(task.privacy.draws_per_tile)
            return batch, _public_draws(objective, batch)

        def run(num_passes: int) -> None:
            self._take_steps(
                self._sgd(task, self._trained(task), _AllPublic(), self._ranks),
                task,
                objective,
                speed,
                num_steps=1,
                num_patients=num_passes * at_a_time,
                drawn=drawn,
            )
            if self._foundation.device.type == "cuda":
                torch.cuda.synchronize(self._foundation.device)

        return PublicStep(run=run, group_size=at_a_time)

    def _take_steps(
        self,
        optimizer: PatientSum,
        task: TrainingTask,
        objective: Objective,
        speed: Speed,
        *,
        num_steps: int,
        num_patients: int,
        drawn: Callable[[int], Drawn],
        after_step: Callable[[int], None] = lambda _: None,
    ) -> None:
        """Private steps on a cohort: as many patients to a pass as ``speed`` says."""
        rows = _rows_of(task)
        if not speed.group_size(rows):
            for number in range(num_steps):
                optimizer.step(
                    num_patients, lambda patient: _parts(objective, drawn(patient), speed, rows)
                )
                after_step(number + 1)
            return
        filler = self._filler(objective, task, rows)

        reading = threading.Lock()  # a store is read by one pass at a time

        def group_loss(places: Sequence[int | None]) -> Tensor:
            with reading:
                group = [filler if place is None else drawn(place) for place in places]
            return _joined(objective, group, filler)

        with self._passes(task, speed, rows) as (gradients, run):
            for number in range(num_steps):
                optimizer.step_in_groups(num_patients, group_loss, gradients, run)
                after_step(number + 1)

    def _objective(self, task: TrainingTask) -> Objective:
        """The stage's loss, refused under privacy if it mixes tiles. Checked on public tiles."""
        self._adapter.run_with()
        anchors_KD = (
            class_anchors(self._foundation, task.captions, task.state) if task.captions else None
        )
        objective = Objective(
            self._foundation, self._adapter, task.stage, task.stage_start, anchors_KD
        )
        if task.mechanism.private:
            batch = self._probe(3, task)
            assert_per_tile(objective.loss_per_tile, batch, _public_draws(objective, batch))
        return objective

    def _trusted_speed(self, task: TrainingTask, objective: Objective, rows: int) -> Speed:
        """The site's shortcuts, as far as public tiles show that they change no gradient.

        Once for a stage, factor and number of rows: gradients with and without them are nearly the
        same. Patients who share a pass: to the last bit alone, once with wild weights and then with
        every adapter that comes. What is left out depends on public numbers only.
        """
        key = (task.stage, task.factor, rows)
        if key not in self._trusted:
            self._trusted[key] = self._believed(task, objective, rows)
        speed = self._trusted[key]
        if speed.at_a_time(rows) > 1:
            shift = next(self._shifts)
            if not self._patients_are_isolated(speed, task, objective, rows, [shift]):
                _LOG.warning(
                    "patients who share a backward pass are not isolated to the last bit with this "
                    "round's adapter; training them one by one"
                )
                speed = replace(speed, group_rows=0)
        # The time of a round is bounded by what the first device takes for so many patients.
        own, ranks = speed.at_a_time(rows), self._ranks or Alone()
        least, most = ranks.least(own), -ranks.least(-own)  # every rank asks both
        if least != most:
            speed = replace(speed, group_rows=0)
        speed.apply(self._adapter)
        return speed

    def _believed(self, task: TrainingTask, objective: Objective, rows: int) -> Speed:
        """What of the site's shortcuts holds before the first round."""
        speed = self._speed
        if task.factor == "all":  # a row for each patient would be a copy of all weights
            speed = replace(speed, group_rows=0)
        if not speed.group_size(rows) and not speed.changes_the_passes:
            return speed
        error = self._error_of(speed, task, objective, rows)
        if not error <= speed.tolerance:
            _LOG.warning(
                "gradients of public tiles are off by %.0e of their length with the shortcuts of "
                "site.toml; training without them",
                error,
            )
            return Speed(microbatch_tiles=speed.microbatch_tiles, group_rows=0)
        if speed.at_a_time(rows) > 1:
            self._adapter.load_state(_moved(task, _WILD))
            is_isolated = self._patients_are_isolated(speed, task, objective, rows, _SHIFTS)
            self._adapter.load_state(_awake(task))
            if not is_isolated:
                _LOG.warning(
                    "patients who share a backward pass are not isolated to the last bit on this "
                    "device; training them one by one, which may take longer"
                )
                return replace(speed, group_rows=0)
        return speed

    def _patients_are_isolated(
        self,
        speed: Speed,
        task: TrainingTask,
        objective: Objective,
        rows: int,
        shifts: Sequence[int],
    ) -> bool:
        """Of public patients, with the weights that the adapter holds now."""
        filler = self._filler(objective, task, rows)
        cohort = [
            self._public_patient(objective, task, rows, seed=index)
            for index in range(speed.at_a_time(rows))
        ]
        strangers = [filler, *(_spoilt(filler, value) for value in (torch.nan, 0.0, 1e4))]
        strangers = strangers[shifts[0] % 4 :] + strangers[: shifts[0] % 4]
        speed.apply(self._adapter)
        with self._passes(task, speed, rows) as (gradients, run):
            isolated = is_isolated(
                lambda group: _gradients(gradients, run, objective, group),
                cohort,
                strangers,
                shifts,
                in_one_pass=gradients.num_patients,
            )
        self._adapter.run_with()
        return isolated

    def _error_of(self, speed: Speed, task: TrainingTask, objective: Objective, rows: int) -> float:
        """Of the gradients of two public patients with as many tiles as ours have."""
        parameters = list(self._adapter.trainable(task.factor).values())
        cohort = [
            self._public_patient(objective, task, rows, seed=index)
            for index in range(max(speed.at_a_time(rows), 2))
        ]
        one, whole = FlatGradient(parameters), Speed(microbatch_tiles=speed.microbatch_tiles)

        def one_by_one(chosen: Speed) -> Tensor:
            return torch.stack(
                [one.compute(_parts(objective, drawn, chosen, rows)).clone() for drawn in cohort]
            )

        exact_PD = one_by_one(whole)
        speed.apply(self._adapter)
        if not speed.group_size(rows):
            found_PD = one_by_one(speed)
        else:
            with self._passes(task, speed, rows) as (gradients, run):
                found_PD = _gradients(gradients, run, objective, cohort)
        one.release()
        self._adapter.run_with()
        length = exact_PD.norm().clamp(min=torch.finfo(torch.float32).tiny)
        return float((found_PD - exact_PD).norm() / length)

    @contextmanager
    def _passes(
        self, task: TrainingTask, speed: Speed, rows: int
    ) -> Iterator[tuple[GroupGradients, Map]]:
        """Passes of one shape, and what runs as many at a time as ``speed`` says."""
        parameters = list(self._adapter.trainable(task.factor).values())
        size = speed.group_size(rows)
        network = self._adapter.network
        with (
            GroupGradients(network, parameters, num_patients=size, num_tiles=rows) as gradients,
            side_by_side(speed.side_by_side(rows)) as run,
        ):
            yield gradients, run

    def _public_patient(
        self, objective: Objective, task: TrainingTask, rows: int, *, seed: int
    ) -> Drawn:
        """One who has as many rows as a pass has for each: a probe tile, each time noised anew."""
        tiles = self._probe(3, task).select(torch.tensor([seed % 3] * rows))
        batch = replace(tiles, weight_B=torch.full_like(tiles.weight_B, 1.0 / rows))
        return batch, objective.draw(batch, torch.Generator().manual_seed(seed))

    def _filler(self, objective: Objective, task: TrainingTask, rows: int) -> Drawn:
        """Rows that weigh nothing, for places and tiles that are not there. Public."""
        batch, draws = self._public_patient(objective, task, rows, seed=0)
        return replace(batch, weight_B=torch.zeros_like(batch.weight_B)), draws

    def _probe(self, num_tiles: int, task: TrainingTask) -> TileBatch:
        known, wanted = self._public_tiles, (task.stage.modality, task.captions)
        if wanted not in known:
            modality, captions = wanted
            known[wanted] = probe_batch(self._foundation, modality=modality, captions=captions)
        return known[wanted].select(torch.arange(num_tiles))

    def _drawn(
        self,
        patient: int,
        objective: Objective,
        task: TrainingTask,
        *,
        step: int,
    ) -> Drawn:
        """Up to K of a patient's tiles, J times each, with their noise and timesteps."""
        generator = self._randomness.generator(step, self._patients.pseudonym(patient))
        tiles = self._patients.batch(
            patient,
            max_tiles=task.privacy.tiles_per_patient,
            generator=generator,
            modality=task.stage.modality,
            captions=task.captions,
        )
        batch = tiles.repeat(task.privacy.draws_per_tile)
        return batch, objective.draw(batch, generator)


def _awake(task: TrainingTask) -> Mapping[str, Tensor]:
    """The state on which gradients are compared and the loss is probed.

    Behind zero convolutions every gradient is zero, and nothing could be seen to be wrong: before a
    control round they are moved a little, by public numbers.
    """
    return task.state if task.stage.modality is None else _moved(task, _AWAKE)


def _moved(task: TrainingTask, std: float) -> Mapping[str, Tensor]:
    """The round's state with public random numbers added to what trains."""
    source = torch.Generator().manual_seed(0)
    moved = {
        name: std * torch.randn(task.state[name].shape, generator=source)
        for name in factor_names(task.state, task.factor)
    }
    return add_delta(task.state, moved)


def _rows_of(task: TrainingTask) -> int:
    """Tiles times draws of one patient in one step, at most."""
    return task.privacy.tiles_per_patient * task.privacy.draws_per_tile


def _public_draws(objective: Objective, batch: TileBatch) -> Draws:
    return objective.draw(batch, torch.Generator().manual_seed(0))


def _parts(objective: Objective, drawn: Drawn, speed: Speed, rows: int) -> Iterator[Tensor]:
    """Losses that add up to a patient's mean loss over K tiles and J draws of each.

    All draws were made before the cut into microbatches, so its size changes no result. Compiled
    code runs on full microbatches only, padded with rows that weigh nothing.
    """
    batch, draws = drawn
    if not len(batch):
        return
    size = min(speed.microbatch_tiles, rows)
    missing = -len(batch) % size if speed.compile else 0
    if missing:
        padded = torch.cat([torch.arange(len(batch)), torch.zeros(missing, dtype=torch.int64)])
        batch, draws = batch.select(padded), _select(draws, padded)
        batch.weight_B[-missing:] = 0.0
    for part in torch.arange(len(batch)).split(size):
        tiles = batch.select(part)
        yield tiles.mean(objective.loss_per_tile(tiles, _select(draws, part)))


def _joined(objective: Objective, group: Sequence[Drawn], filler: Drawn) -> Tensor:
    """Weighted losses of all rows of some patients, each filled up to as many as ``filler`` has."""
    filled = [_filled(drawn, filler) for drawn in group]
    batch = TileBatch.cat([batch for batch, _ in filled])
    draws = Draws.cat([draws for _, draws in filled])
    return batch.weight_B * objective.loss_per_tile(batch, draws)


def _gradients(
    gradients: GroupGradients, run: Map, objective: Objective, patients: Sequence[Drawn]
) -> Tensor:
    """Of patients who have as many rows as their places, enough for whole passes."""
    size = gradients.num_patients

    def one_pass(group: Sequence[Drawn]) -> Tensor:
        return gradients.compute(_joined(objective, group, group[0]))

    groups = [patients[start : start + size] for start in range(0, len(patients), size)]
    return torch.cat(list(run(one_pass, groups)))


def _filled(drawn: Drawn, filler: Drawn) -> Drawn:
    batch, draws = drawn
    missing = torch.arange(len(filler[0]) - len(batch))
    if not len(missing):
        return drawn
    rest, rest_draws = filler[0].select(missing), _select(filler[1], missing)
    return TileBatch.cat([batch, rest]), Draws.cat([draws, rest_draws])


def _spoilt(drawn: Drawn, value: float) -> Drawn:
    """A patient whose latents are all ``value``, and count."""
    batch, draws = drawn
    weight_B = torch.full_like(batch.weight_B, 1.0 / len(batch))
    latents_BCHW = torch.full_like(batch.latents_BCHW, value)
    return replace(batch, latents_BCHW=latents_BCHW, weight_B=weight_B), draws


def _select(draws: Draws, rows: Tensor) -> Draws:
    return replace(
        draws,
        noise_BCHW=draws.noise_BCHW[rows],
        timesteps_B=draws.timesteps_B[rows],
        drop_caption_B=draws.drop_caption_B[rows],
    )
