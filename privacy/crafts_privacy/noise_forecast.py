"""How large a plan's noise will be beside the gradient it is added to, before anybody trains.

The gradient is measured on public tiles, each in the place of a patient, where the first stage of
the plan starts. What a hospital's tiles say may be more or less: this tells magnitudes.

Letters: D coordinates, P public patients, K sites.
"""

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain

import torch
from torch import Tensor

from crafts_core.adapters import Adapter
from crafts_core.foundation import Foundation
from crafts_core.plan import Plan, RoundOfPlan
from crafts_core.stages.objective import Objective
from crafts_core.stages.public_batch import probe_batch
from crafts_core.starting_point import initial_state
from crafts_privacy.clipping import clip_
from crafts_privacy.gradients import FlatGradient
from crafts_privacy.plan_noise import plan_noise_multiplier

_PATIENTS = 16
MOST_NOISE = 3.0
"""Over gradient, after all steps. Only what noise has along the gradient hurts, a small part of its
length: studies whose noise came to about as much as the gradient kept nearly all of the gain, at
three times they lost a good part of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseForecast:
    """Lengths of one step's mean over all sites, in units of the clipping bound."""

    num_coordinates: int
    gradient_norm: float
    """Of what public patients agree on, clipped as theirs would be."""
    noise_norm: float
    steps: int

    @property
    def noise_over_gradient(self) -> float:
        """After all steps, along one direction kept: gradients add up, noise by its root."""
        if self.noise_norm == 0:
            return 0.0
        gradient = math.sqrt(self.steps) * self.gradient_norm
        return self.noise_norm / gradient if gradient else math.inf

    def as_json(self) -> dict[str, object]:
        """For machines."""
        ratio = self.noise_over_gradient
        return asdict(self) | {
            "noise_over_gradient": ratio if math.isfinite(ratio) else None,
            "is_drowned": self.is_drowned,
        }

    @property
    def is_drowned(self) -> bool:
        """Whether noise will take a good part of what training gains."""
        return self.noise_over_gradient > MOST_NOISE

    @property
    def in_words(self) -> str:
        """For people, in one sentence."""
        ratio = self.noise_norm / max(self.gradient_norm, 1e-12)
        told = (
            f"On public tiles a step's noise ({self.num_coordinates:,} numbers) is {ratio:.2g} "
            f"times as long as its gradient, and over all {self.steps} steps "
            f"{self.noise_over_gradient:.2g} times"
        )
        if not self.is_drowned:
            return f"{told}."
        return (
            f"WARNING: {told}: noise drowns what is learned; take more patients or sites, a larger "
            'epsilon, a smaller adapter, or one step over all sites (privacy.trust "distributed").'
        )


def is_measurable(plan: Plan) -> bool:
    """Whether some stage trains what public tiles can be asked about: no public tile has a mask."""
    return any(stage.modality is None for stage in plan.stage)


def noise_forecast(plan: Plan, foundation: Foundation, patients: Sequence[int]) -> NoiseForecast:
    """What the first stage's steps will be made of, with sites of these declared sizes.

    Args:
        plan: Of the foundation. Steps in stage control are counted and not measured.
        foundation: Public.
        patients: One number for each site, at least one.

    Raises:
        ValueError: there is no site, or the plan trains nothing but ControlNets.
        CalibrationError: no noise keeps its epsilon.
    """
    if not patients:
        raise ValueError("expected at least one site")
    if not is_measurable(plan):
        raise ValueError("a plan of ControlNets alone cannot be measured")
    planned = next(each for each in plan.rounds() if each.stage.modality is None)
    rows = _clipped_gradients(plan, planned, foundation)
    first_D = next(rows)
    return NoiseForecast(
        num_coordinates=len(first_D),
        gradient_norm=_agreed_norm(chain([first_D], rows)),
        noise_norm=noise_std(plan, patients) * math.sqrt(len(first_D)),
        steps=plan.total_steps,
    )


def noise_std(plan: Plan, patients: Sequence[int]) -> float:
    """Of one coordinate of a step's mean over all sites, in units of the clipping bound.

    Sites count by their patients. Where each adds all of its noise these add up; of distributed
    trust all sites but ``colluding_sites`` add one site's together, and those their shares beyond.
    """
    num_noises: float = len(patients)
    if plan.privacy.trust == "distributed":
        num_noises /= max(1, len(patients) - (plan.privacy.colluding_sites or 0))
    drawn = plan.privacy.sample_rate * sum(patients)
    return plan_noise_multiplier(plan) * math.sqrt(num_noises) / drawn


def _clipped_gradients(
    plan: Plan, planned: RoundOfPlan, foundation: Foundation
) -> Iterator[Tensor]:
    """One row (D) for each patient, over the clipping bound; without the drift, which begins at 0.

    One at a time: of all weights of a large denoiser sixteen would not fit into memory.
    """
    privacy = plan.privacy
    adapter = Adapter.attach(copy.deepcopy(foundation.generator.unet), plan.adapter, ("generator",))
    start = initial_state(foundation, plan.adapter, plan.study.seed, ("generator",))
    adapter.load_state(start)
    stage = planned.stage.model_copy(update={"lambda_drift": 0.0})
    objective = Objective(foundation, adapter, stage)
    gradient = FlatGradient(list(adapter.trainable(planned.factor).values()))
    everybody = probe_batch(foundation, _PATIENTS)
    source = torch.Generator().manual_seed(plan.study.seed)
    stability = privacy.clipping_stability if privacy.clipping == "automatic" else None
    for row in range(len(everybody)):
        tile = everybody.select(torch.tensor([row], device=foundation.device))
        batch = tile.repeat(privacy.draws_per_tile)
        batch.weight_B.fill_(1 / len(batch))
        loss = batch.mean(objective.loss_per_tile(batch, objective.draw(batch, source)))
        grad_D = gradient.compute([loss]).clone()
        clip_(grad_D, privacy.max_grad_norm, stability=stability)
        yield grad_D.cpu() / privacy.max_grad_norm
    gradient.release()


def _agreed_norm(grads: Iterable[Tensor]) -> float:
    """Length of the mean that independent draws share: the mean's own would count their spread.

    The mean inner product of different rows is the squared length of what all have in common.
    """
    total_D, squares, count = torch.zeros((), dtype=torch.float64), 0.0, 0
    for grad_D in grads:
        total_D = total_D + grad_D.double()
        squares += float(grad_D.double().square().sum())
        count += 1
    shared = (float(total_D.square().sum()) - squares) / (count * (count - 1))
    return math.sqrt(max(0.0, shared))
