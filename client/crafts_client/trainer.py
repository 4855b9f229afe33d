"""The local part of a round: a global adapter goes in, a private delta comes out.

The model stays warm between rounds. No loss, count or norm of a patient is returned, logged or
kept: everything that leaves this module went through ``PatientSGD``.
"""

import copy
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from crafts_client.errors import TrainingError
from crafts_client.patients import PatientTiles, probe_batch
from crafts_core.adapters import Adapter, State
from crafts_core.exchange import global_norm
from crafts_core.foundation import Foundation
from crafts_core.plan import AdapterConfig, Factor, PrivacyConfig, StageConfig
from crafts_core.stages.batch import Draws, TileBatch
from crafts_core.stages.objective import Objective, assert_per_tile
from crafts_privacy.accounting import PrivacyEvent
from crafts_privacy.gradients import GroupGradients
from crafts_privacy.noise import ExactNoise, GridNoise, NoiseSource
from crafts_privacy.optimizers import Momentum
from crafts_privacy.patient_sgd import Mechanism, PatientSGD
from crafts_privacy.sampling import PatientSampler, PoissonSampler

_GROUP_ROWS = 16
"""Tiles times draws that keep a step busy; below it several patients share a backward pass
(benchmarks/private_step.py)."""


def entropy_generator() -> torch.Generator:
    """A generator that nobody can seed again: which tiles, which noise, which timesteps."""
    return torch.Generator().manual_seed(int.from_bytes(os.urandom(8), "little", signed=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class Randomness:
    """Where a site's private randomness comes from. Anything but the default is for tests."""

    noise: NoiseSource
    sampler: PatientSampler
    generator: Callable[[], torch.Generator]
    """Called once per round, for the choice of tiles and for the diffusion draws."""

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
                "exact_noise needs OpenDP: pip install 'crafts-federated[exact-noise]'"
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


class Trainer:
    """One adapter on one copy of the UNet, ready for the next round."""

    def __init__(
        self,
        foundation: Foundation,
        config: AdapterConfig,
        patients: PatientTiles,
        *,
        randomness: Randomness,
        microbatch_tiles: int,
    ) -> None:
        """Attach the adapter.

        Args:
            foundation: Already on the device that trains.
            config: The plan's adapter section.
            patients: The site's cohort.
            randomness: ``Randomness.from_os()``.
            microbatch_tiles: Tiles times draws in one backward pass: memory and speed only.

        Raises:
            AdapterError: the adapter does not fit the foundation.
        """
        self._foundation = foundation
        self._adapter = Adapter.attach(copy.deepcopy(foundation.generator.unet), config)
        self._patients = patients
        self._randomness = randomness
        self._microbatch_tiles = microbatch_tiles
        self._adapter_kind = config.kind

    def schema(self) -> State:
        """Tensors with the names and shapes that every global adapter must have."""
        return self._adapter.state()

    def train(self, task: TrainingTask) -> State:
        """Run the round's local steps.

        Returns:
            Final minus received weights of the trained factor, float32 on the CPU.

        Raises:
            AdapterError: a state does not fit the adapter.
            BatchCoupledLossError: the loss has no per-patient sensitivity.
            TrainingError: the result is not finite.
        """
        self._adapter.load_state(task.state)
        parameters = self._adapter.trainable(task.factor)
        objective = self._objective(task)
        optimizer = PatientSGD(
            parameters,
            task.mechanism,
            learning_rate=task.stage.learning_rate,
            optimizer=Momentum(task.stage.momentum),
            noise=self._randomness.noise,
            sampler=self._randomness.sampler,
        )
        generator = self._randomness.generator()

        def patient_loss(patient: int) -> Iterator[Tensor]:
            return self._patient_losses(patient, objective, task.privacy, generator)

        def group_loss(group: Sequence[int]) -> tuple[Tensor, Sequence[int]]:
            return self._group_losses(group, objective, task.privacy, generator)

        num_patients, group_size = self._patients.num_patients, self._group_size(task.privacy)
        if group_size == 1:
            for _ in range(task.stage.local_steps):
                optimizer.step(num_patients, patient_loss)
        else:
            with GroupGradients(self._adapter.unet, list(parameters.values())) as gradients:
                for _ in range(task.stage.local_steps):
                    optimizer.step_in_groups(num_patients, group_loss, gradients, group_size)
        if optimizer.event() != task.charged:
            raise TrainingError("training ran other steps than the ledger was charged for")
        delta = {
            name: parameter.detach().to("cpu", torch.float32) - task.state[name].float()
            for name, parameter in parameters.items()
        }
        if not torch.tensor(global_norm(delta)).isfinite():
            raise TrainingError(
                "training gave weights that are not finite; ask the coordinator for a smaller "
                "learning rate"
            )
        return delta

    def _objective(self, task: TrainingTask) -> Objective:
        """The stage's loss, refused under privacy if it mixes tiles. Checked on public tiles."""
        objective = Objective(self._foundation, self._adapter, task.stage, task.stage_start)
        if task.mechanism.private:
            batch = probe_batch(self._foundation)
            draws = objective.draw(batch, torch.Generator().manual_seed(0))
            assert_per_tile(objective.loss_per_tile, batch, draws)
        return objective

    def _patient_losses(
        self,
        patient: int,
        objective: Objective,
        privacy: PrivacyConfig,
        generator: torch.Generator,
    ) -> Iterator[Tensor]:
        """Parts that add up to the patient's mean loss over K tiles and J draws of each.

        All draws are made before the cut into microbatches, so its size changes no result.
        """
        batch, draws = self._drawn(patient, objective, privacy, generator)
        for rows in torch.arange(len(batch)).split(self._microbatch_tiles):
            part = batch.select(rows)
            yield part.mean(objective.loss_per_tile(part, _select(draws, rows)))

    def _group_losses(
        self,
        group: Sequence[int],
        objective: Objective,
        privacy: PrivacyConfig,
        generator: torch.Generator,
    ) -> tuple[Tensor, Sequence[int]]:
        """Weighted losses of all tiles of some patients, and how many each has. Draws as above."""
        drawn = [self._drawn(patient, objective, privacy, generator) for patient in group]
        batch = TileBatch.cat([batch for batch, _ in drawn])
        draws = Draws.cat([draws for _, draws in drawn])
        losses_B = batch.weight_B * objective.loss_per_tile(batch, draws)
        return losses_B, [len(batch) for batch, _ in drawn]

    def _drawn(
        self,
        patient: int,
        objective: Objective,
        privacy: PrivacyConfig,
        generator: torch.Generator,
    ) -> tuple[TileBatch, Draws]:
        """Up to K of a patient's tiles, J times each, with their noise and timesteps."""
        tiles = self._patients.batch(
            patient, max_tiles=privacy.tiles_per_patient, generator=generator
        )
        batch = tiles.repeat(privacy.draws_per_tile)
        return batch, objective.draw(batch, generator)

    def _group_size(self, privacy: PrivacyConfig) -> int:
        """Patients to a backward pass: as many as fill a batch that one patient does not."""
        if self._adapter_kind == "full":
            return 1  # a gradient for each tile would be a copy of all weights
        rows = privacy.tiles_per_patient * privacy.draws_per_tile
        return max(1, min(_GROUP_ROWS, self._microbatch_tiles) // rows)


def _select(draws: Draws, rows: Tensor) -> Draws:
    return replace(
        draws,
        noise_BCHW=draws.noise_BCHW[rows],
        timesteps_B=draws.timesteps_B[rows],
        drop_caption_B=draws.drop_caption_B[rows],
    )
