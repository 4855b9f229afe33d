"""One round of training at a site: what is asked for, and where its randomness comes from."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from crafts_client.errors import TrainingError
from crafts_core.installing import how_to_install
from crafts_core.plan import Plan
from crafts_core.plan_sections import Factor, PrivacyConfig, StageConfig
from crafts_core.state import factor_names
from crafts_privacy.accounting import PrivacyEvent
from crafts_privacy.mechanism import Mechanism
from crafts_privacy.noise import ExactNoise, GridNoise, NoiseSource
from crafts_privacy.sampling import PatientSampler, PoissonSampler


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
    def rows(self) -> int:
        """Tiles times draws of one patient in one step, at most."""
        return self.privacy.tiles_per_patient * self.privacy.draws_per_tile

    @property
    def num_bytes(self) -> int:
        """Of a round's files: sealed, then kept for an attack of the site's own with all it got."""
        size_of = {name: tensor.numel() for name, tensor in self.state.items()}
        names = factor_names(self.state, self.factor)
        return 4 * (2 * sum(size_of[name] for name in names) + sum(size_of.values()))
