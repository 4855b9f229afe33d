"""One stage of the installed trainer on public patients, with its noise and its samples in sight.

What an audit may touch of the path that trains, and no more: the place where the trainer hands a
clipped sum to its noise source, and the place where it asks who is drawn. Everything between them
is the site's own. Letters: T steps, N patients, D coordinates.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crafts_client.public_patients import TILES_EACH, PublicPatients
from crafts_client.speed import Speed
from crafts_client.trainer import Trainer
from crafts_client.training_task import Randomness, TrainingTask
from crafts_core.errors import CraftsError
from crafts_core.foundation import Foundation
from crafts_core.plan_sections import (
    AdapterConfig,
    Factor,
    Part,
    PrivacyConfig,
    StageConfig,
    StageName,
)
from crafts_core.starting_point import initial_state
from crafts_core.state import State, add_delta
from crafts_privacy.audit_statistics import Vector
from crafts_privacy.clipping import grid_step
from crafts_privacy.mechanism import Mechanism

FACTORS: Mapping[StageName, Factor] = {
    "pretraining": "second",
    "alignment": "first",
    "control": "nuclei",
}
"""Every stage, and what trains in the audit of it."""
BOUND = 1e-5
"""C. Shorter than any gradient, so that clipping holds everybody down; the audit checks that."""
RATE = 0.5
NOISE = 1.0
MOVE = 1e-4
"""Standard deviation of a step's noise in a weight: large in float32, small beside a weight."""
SMALL_MOVE = 2e-5
"""The same where gradients must stay what they were for a whole round."""
DELTA = 1e-5
USUAL_DEVIATION = 0.1
"""Of what is added to an adapter that changes nothing yet, so that every weight has a gradient."""
ADAPTERS = (USUAL_DEVIATION, 1.0)
"""Deviations of the received adapters under which neighbouring cohorts are compared: one as
training makes them, and one that a coordinator might choose to make rounding large."""
LEAST_SHARE = 0.99
"""Of C, that a patient must move the sum by, or the comparison would show nothing."""

_ADAPTER = AdapterConfig(kind="lora", rank=2, first_factor="random")
Keeps = Literal["noise", "sum", "nothing"]
"""What becomes of a clipped sum: the site's own noise is added, nothing is, or it is taken away, so
that no step moves a weight."""


class UnseenStepsError(CraftsError):
    """The trainer took steps whose sums never met the noise source."""


class Seam:
    """Where the trainer meets its noise source and its sampler.

    ``sums`` are in grid steps, ``noise`` in its declared standard deviations, ``asked`` (N,) is how
    often each patient's tiles were asked for: one of each for every step since ``listen``.
    """

    def __init__(self, own: Randomness, patients: PublicPatients) -> None:
        self._own, self._patients = own, patients
        self.listen(keeps="noise")

    def listen(self, *, keeps: Keeps, script: Sequence[Sequence[int]] | None = None) -> None:
        """Forget what was seen. A ``script`` stands in for the sampler from now on."""
        self._keeps = keeps
        self._script = None if script is None else iter(script)
        self._patients.take_asked()
        self.sums: list[Tensor] = []
        self.noise: list[Tensor] = []
        self.stds: list[float] = []
        self.asked: list[Vector] = []

    @property
    def total(self) -> Vector:
        """The sum over all steps."""
        return torch.stack(self.sums).sum(0).numpy()

    def sample(self, num_patients: int, sample_rate: float) -> NDArray[np.int64]:
        """See ``PatientSampler``."""
        if self._script is None:
            return self._own.sampler.sample(num_patients, sample_rate)
        return np.array(next(self._script), dtype=np.int64)

    def add_(self, grid_sum_D: Tensor, std: float) -> None:
        """See ``NoiseSource``."""
        before_D = grid_sum_D.clone()
        if self._keeps == "noise":
            self._own.noise.add_(grid_sum_D, std)
            self.noise.append((grid_sum_D - before_D).cpu() / std)
        elif self._keeps == "nothing":
            grid_sum_D.zero_()
        self.sums.append(before_D.cpu())
        self.stds.append(std)
        self.asked.append(self._patients.take_asked())


class Bench:
    """One stage of one trainer, ready to be asked."""

    def __init__(
        self,
        foundation: Foundation,
        patients: PublicPatients,
        parts: tuple[Part, ...],
        stage: StageName,
        speed: Speed,
        own: Randomness,
    ) -> None:
        self.stage, self.patients = stage, patients
        self.bound, self.noise = BOUND, NOISE
        self.deviations: tuple[float, ...] = ADAPTERS
        self.least_share = LEAST_SHARE
        self.seam = Seam(own, patients)
        self._foundation, self._parts, self._own = foundation, parts, own
        self._start = initial_state(foundation, _ADAPTER, 0, parts)
        self.declared = 3 * len(patients.names) + 1
        self.ways = {"one by one": replace(speed, group_rows=0)}
        if speed.group_size(TILES_EACH):
            # Passes side by side also where this process has one core: others may have more.
            on_cpu = foundation.device.type == "cpu"
            self.ways["in groups"] = replace(speed, cores=max(2, speed.cores)) if on_cpu else speed
        self._trainers = {name: self._trainer(way) for name, way in self.ways.items()}

    @property
    def fastest(self) -> str:
        """How the site trains where patients have few tiles."""
        return list(self.ways)[-1]

    @property
    def move(self) -> float:
        """Standard deviation of a step's noise in a weight, at the usual learning rate."""
        return MOVE

    @property
    def per_sum(self) -> float:
        """Weights that one grid step of a step's sum moves, at the usual learning rate."""
        return self.move * self.grid / (self.noise * self.bound)

    @property
    def grid(self) -> float:
        """What an integer of a sum stands for."""
        return grid_step(self.bound)

    def restart(self) -> None:
        """New trainers, as after a restart of the site."""
        self._trainers = {name: self._trainer(way) for name, way in self.ways.items()}

    def _trainer(self, speed: Speed) -> Trainer:
        return Trainer(
            self._foundation,
            _ADAPTER,
            self.patients,
            parts=self._parts,
            randomness=Randomness(
                noise=self.seam, sampler=self.seam, generator=self._own.generator
            ),
            speed=speed,
        )

    def train(
        self,
        way: str,
        *,
        steps: int,
        without: Collection[int] = (),
        noise_multiplier: float = NOISE,
        move: float = MOVE,
        deviation: float = USUAL_DEVIATION,
    ) -> Vector:
        """One round on the public patients but those ``without``.

        Args:
            way: One of ``ways``.
            steps: Of the round.
            without: Patients who have withdrawn.
            noise_multiplier: Declared.
            move: Standard deviation that noise of multiplier one would have in a weight.
            deviation: Of the received adapter, from one that changes nothing.

        Returns:
            What the trainer releases (D,).

        Raises:
            UnseenStepsError: some step did not hand its sum to the noise source, or twice.
        """
        mechanism = Mechanism(
            noise_multiplier=noise_multiplier,
            max_grad_norm=BOUND,
            sample_rate=RATE,
            expected_patients=RATE * self.declared,
        )
        state = self._state(deviation)
        task = TrainingTask(
            stage=self._stage_config(steps, move),
            factor=FACTORS[self.stage],
            privacy=_privacy(),
            mechanism=mechanism,
            charged=mechanism.event(steps),
            state=state,
            stage_start=state,
            withdrawn=frozenset(self.patients.names[place] for place in without),
        )
        return self.released(way, task, steps)

    def released(self, way: str, task: TrainingTask, steps: int) -> Vector:
        """What the trainer releases (D,) of a round of so many steps.

        Raises:
            UnseenStepsError: some step did not hand its sum to the noise source, or twice.
        """
        before = len(self.seam.sums)
        delta = self._trainers[way].train(task)
        seen = len(self.seam.sums) - before
        if seen != steps:
            raise UnseenStepsError(f"{seen} sums met the noise source in {steps} steps")
        return torch.cat([tensor.flatten() for tensor in delta.values()]).double().numpy()

    def _state(self, deviation: float) -> State:
        source = torch.Generator().manual_seed(0)
        moved = {
            name: deviation * torch.randn(value.shape, generator=source)
            for name, value in self._start.items()
        }
        return add_delta(self._start, moved)

    def _stage_config(self, steps: int, move: float) -> StageConfig:
        terms = {"lambda_align": 0.1, "lambda_drift": 0.1} if self.stage == "alignment" else {}
        return StageConfig(
            name=self.stage,
            modality="nuclei" if self.stage == "control" else None,
            rounds=1,
            local_steps=steps,
            learning_rate=move * RATE * self.declared / (NOISE * BOUND),
            **terms,
        )


def _privacy() -> PrivacyConfig:
    return PrivacyConfig(
        mechanism="patient_dp",
        target_epsilon=1.0,
        delta=DELTA,
        max_grad_norm=BOUND,
        sample_rate=RATE,
        tiles_per_patient=TILES_EACH,
        draws_per_tile=1,
    )
