"""The local part of a round: a global adapter goes in, a private delta comes out.

The model stays warm between rounds. No loss, count or norm of a patient is returned or logged:
everything that leaves the site went through ``PatientSGD``, or waits in a ``HeldSum`` for its
noise. One count stays, for the site's operator: how often a patient's gradient was not finite.
"""

import copy
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from crafts_client.answer_times import PublicStep
from crafts_client.errors import TrainingError
from crafts_client.passes import Drawn, joined_loss, losses_of, public_draws
from crafts_client.patients import PatientTiles
from crafts_client.releasing import Told, public_release, vector_of
from crafts_client.shortcuts import Shortcuts, awake
from crafts_client.speed import Speed
from crafts_client.training_task import Randomness, TrainingTask
from crafts_core.adapters import Adapter
from crafts_core.control_net import num_halvings_of
from crafts_core.exchange import global_norm
from crafts_core.foundation import Foundation
from crafts_core.plan_sections import GENERATOR_ONLY, AdapterConfig, Part
from crafts_core.releases import class_anchors
from crafts_core.stages.objective import Objective, assert_per_tile
from crafts_core.state import State, factor_names
from crafts_privacy.held_sum import HeldStep, HeldSum
from crafts_privacy.optimizers import optimizer_of
from crafts_privacy.patient_sgd import PatientSGD, PatientSum
from crafts_privacy.ranks import Alone, Ranks
from crafts_privacy.sampling import PatientSampler

TakeSteps = Callable[[PatientSum], None]
"""Exactly a round's steps, on this device's patients."""


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
        self._shortcuts = Shortcuts(foundation, self._adapter, speed, ranks)
        self._ranks = ranks
        self._after_step = after_step
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
        self._adapter.load_state(awake(task))
        objective = self._objective(task)
        speed = self._shortcuts.trusted(task, objective)
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
        tiles = self._shortcuts.probe(1, task).select(torch.zeros(num_tiles, dtype=torch.int64))
        tiles = replace(tiles, weight_B=torch.full_like(tiles.weight_B, 1.0 / num_tiles))
        at_a_time = speed.at_a_time(task.rows)

        def drawn(_patient: int) -> Drawn:
            batch = tiles.repeat(task.privacy.draws_per_tile)
            return batch, public_draws(objective, batch)

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
        rows = task.rows
        if not speed.group_size(rows):
            for number in range(num_steps):
                optimizer.step(
                    num_patients, lambda patient: losses_of(objective, drawn(patient), speed, rows)
                )
                after_step(number + 1)
            return
        filler = self._shortcuts.filler(objective, task)

        reading = threading.Lock()  # a store is read by one pass at a time

        def group_loss(places: Sequence[int | None]) -> Tensor:
            with reading:
                group = [filler if place is None else drawn(place) for place in places]
            return joined_loss(objective, group, filler)

        with self._shortcuts.passes(task, speed) as (gradients, run):
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
            batch = self._shortcuts.probe(3, task)
            assert_per_tile(objective.loss_per_tile, batch, public_draws(objective, batch))
        return objective

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
