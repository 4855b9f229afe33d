"""How large a plan's noise will be beside the gradient it is added to, before anybody trains.

The gradient is measured on public tiles, each in the place of a patient, where the first stage of
the plan starts; in a paler stain, since a foundation that learned them has nothing more to learn
of them as they are (what 60 agreed on was no longer than its error). What a hospital's tiles say
may be more or less: this tells magnitudes.

Letters: D coordinates, P public patients, K sites.
"""

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from crafts_core.adapters import Adapter
from crafts_core.foundation import Foundation
from crafts_core.plan import Plan, RoundOfPlan
from crafts_core.plan_sections import StageConfig
from crafts_core.progress import Progress, silent
from crafts_core.releases import class_anchors
from crafts_core.stages.objective import Objective
from crafts_core.stages.public_batch import probe_batch
from crafts_core.stains import stained_otherwise
from crafts_core.starting_point import initial_state
from crafts_core.state import State
from crafts_privacy.clipping import clip_
from crafts_privacy.gradients import FlatGradient
from crafts_privacy.plan_noise import plan_noise_multiplier

_PATIENTS, _OF_SHARE = 24, 4
_PALER_S = np.array([0.75, 0.75, 1.0])
"""Hematoxylin, eosin and the rest: about as far as laboratories differ."""
MOST_NOISE = 3.0
"""Over gradient, after all steps. Only what noise has along the gradient hurts, a small part of its
length: studies whose noise came to about as much as the gradient kept nearly all of the gain, at
three times they lost a good part of it."""

_SKETCH = 1 << 20
LEAST_ALIGNMENT = 0.1
"""Of the gradient's length: at 0.02 a stage of alignment could not be told from one without it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseForecast:
    """Lengths of one step's mean over all sites, in units of the clipping bound."""

    num_coordinates: int
    gradient_norm: float
    """Of what public patients agree on, clipped as theirs would be; two standard errors up, so that
    what is told of noise is at least."""
    noise_norm: float
    steps: int
    alignment_share: float | None = None
    """Of the gradient's length in stage alignment, what alignment adds to it; None without it."""

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
        """For people, a sentence for each figure."""
        ratio = self.noise_norm / max(self.gradient_norm, 1e-12)
        told = (
            f"On public tiles in another stain a step's noise ({self.num_coordinates:,} numbers) "
            f"is at least {ratio:.2g} times as long as its gradient, and over all {self.steps} "
            f"steps {self.noise_over_gradient:.2g} times"
        )
        if self.is_drowned:
            told = (
                f"WARNING: {told}: noise drowns what is learned; take more patients or sites, a "
                "larger epsilon, a smaller adapter, or one step over all sites (privacy.trust "
                '"distributed")'
            )
        if self.alignment_share is None:
            return f"{told}."
        told += f". In stage alignment {self.alignment_share:.0%} of the gradient is of alignment"
        if self.alignment_share < LEAST_ALIGNMENT:
            told += ": it changes little; a larger lambda_align, or the contrast, changes more"
        return f"{told}."


def is_measurable(plan: Plan) -> bool:
    """Whether some stage trains what public tiles can be asked about: no public tile has a mask."""
    return any(stage.modality is None for stage in plan.trained)


def noise_forecast(
    plan: Plan, foundation: Foundation, patients: Sequence[int], progress: Progress = silent
) -> NoiseForecast:
    """What the first stage's steps will be made of, with sites of these declared sizes.

    Args:
        plan: Of the foundation. Steps in stage control are counted and not measured.
        foundation: Public.
        patients: One number for each site, at least one.
        progress: Told of a minute's work on a CPU.

    Raises:
        ValueError: there is no site, or the plan trains nothing but ControlNets.
        CalibrationError: no noise keeps its epsilon.
    """
    if not patients:
        raise ValueError("expected at least one site")
    if not is_measurable(plan):
        raise ValueError("a plan of ControlNets alone cannot be measured")
    planned = next(
        each for each in plan.rounds() if each.stage in plan.trained and not each.stage.modality
    )
    stained = _paler(foundation)
    start = initial_state(
        foundation, plan.adapter, plan.study.seed, ("generator",), progress=progress
    )
    num_coordinates, sketches = 0, []
    for grad_D in _clipped_gradients(plan, planned, stained, start):
        num_coordinates = len(grad_D)
        sketches.append(_sketch(grad_D))
        progress("gradients of public tiles", len(sketches), _PATIENTS)
    return NoiseForecast(
        num_coordinates=num_coordinates,
        gradient_norm=_agreed_norm(torch.stack(sketches)),
        noise_norm=noise_std(plan, patients) * math.sqrt(num_coordinates),
        steps=plan.total_steps,
        alignment_share=_alignment_share(plan, planned, stained, start),
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
    plan: Plan, planned: RoundOfPlan, foundation: Foundation, start: State
) -> Iterator[Tensor]:
    """One row (D) for each patient, over the clipping bound."""
    privacy = plan.privacy
    stability = privacy.clipping_stability if privacy.clipping == "automatic" else None
    for grad_D in _gradients(plan, planned, foundation, start, planned.stage):
        clip_(grad_D, privacy.max_grad_norm, stability=stability)
        yield grad_D.cpu() / privacy.max_grad_norm


def _alignment_share(
    plan: Plan, planned: RoundOfPlan, foundation: Foundation, start: State
) -> float | None:
    """Mean over public patients of how much of the gradient is the alignment's, by its length."""
    aligning = next((stage for stage in plan.trained if stage.lambda_align > 0), None)
    if aligning is None:
        return None
    off = {"lambda_align": 0.0, "alignment_loss": "correlation"}
    pairs = zip(
        _gradients(plan, planned, foundation, start, aligning),
        _gradients(plan, planned, foundation, start, aligning.model_copy(update=off)),
        strict=True,
    )
    few = islice(pairs, _OF_SHARE)
    shares = [float((both - plain).norm() / both.norm()) for both, plain in few]
    return sum(shares) / len(shares)


def _gradients(
    plan: Plan, planned: RoundOfPlan, foundation: Foundation, start: State, stage: StageConfig
) -> Iterator[Tensor]:
    """One row (D) for each patient at the ``start``; without the drift, which begins at 0.

    With the factor and the weights of the ``planned`` round and the same draws, whatever the
    stage's loss.
    """
    adapter = Adapter.attach(
        copy.deepcopy(foundation.generator.denoiser), plan.adapter, ("generator",)
    )
    adapter.load_state(start)
    captions = plan.captions_of(stage)
    objective = Objective(
        foundation,
        adapter,
        stage.model_copy(update={"lambda_drift": 0.0}),
        class_anchors_KD=class_anchors(foundation, captions, {}) if captions else None,
    )
    gradient = FlatGradient(list(adapter.trainable(planned.factor).values()))
    everybody = probe_batch(foundation, _PATIENTS, captions=captions)
    source = torch.Generator().manual_seed(plan.study.seed)
    for row in range(len(everybody)):
        tile = everybody.select(torch.tensor([row], device=foundation.device))
        batch = tile.repeat(plan.privacy.draws_per_tile)
        batch.weight_B.fill_(1 / len(batch))
        loss = batch.mean(objective.loss_per_tile(batch, objective.draw(batch, source)))
        grad_D = gradient.compute([loss]).clone()
        gradient.release()
        yield grad_D


def _paler(foundation: Foundation) -> Foundation:
    """With its public tiles in a stain that it does not know them in."""
    tiles_NHWC = foundation.probe.tiles_NCHW.permute(0, 2, 3, 1).cpu().numpy()
    paler_NHWC = stained_otherwise(tiles_NHWC, scale_S=_PALER_S, shift_S=np.zeros(3))
    paler = torch.from_numpy(paler_NHWC).permute(0, 3, 1, 2).to(foundation.probe.tiles_NCHW)
    return replace(foundation, probe=replace(foundation.probe, tiles_NCHW=paler))


def _sketch(grad_D: Tensor) -> Tensor:
    """The row itself, or of a long one signed sums that keep inner products but for a thousandth.

    Charikar, Chen and Farach-Colton 2002; here coordinates are dealt in turn. Of all weights of a
    large denoiser the rows would not fit into memory.
    """
    if len(grad_D) <= _SKETCH:
        return grad_D.double()
    signs = torch.randint(2, grad_D.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    signed_D = torch.nn.functional.pad(grad_D * signs, (0, -len(grad_D) % _SKETCH))
    return signed_D.view(-1, _SKETCH).double().sum(0)


def _agreed_norm(rows_PD: Tensor) -> float:
    """Length of the mean that independent draws share: the mean's own would count their spread.

    The mean inner product of different rows is the squared length of what all have in common. Two
    standard errors (jackknife over rows) are added.
    """
    count = len(rows_PD)
    others_P = rows_PD @ rows_PD.sum(0) - rows_PD.square().sum(1)
    total = float(others_P.sum())
    shared = total / (count * (count - 1))
    without_P = (total - 2 * others_P) / ((count - 1) * (count - 2))
    error = math.sqrt((count - 1) / count * float((without_P - without_P.mean()).square().sum()))
    return math.sqrt(max(0.0, shared + 2 * error))
