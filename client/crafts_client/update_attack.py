"""Do the updates that left tell who was in training? The attack of whoever saw them all.

For each round the attacker knows the adapter theta that went in and the update delta that came out.
A patient who took part pulled the update along the negative of their own gradient there, so
inner products of delta and -g_i(theta), summed over rounds, are the likelihood ratio for Gaussian
noise (white-box membership inference: Nasr et al. 2019, arXiv 1812.00910), were it not for other
patients, whose gradients point much the same way. So all candidates explain an update together:

    score = sum over rounds of (G G^T + ridge I)^-1 G (-delta / |delta|),   rows of G: clip(g_i) / C

The gradients are of the attacker's own draws of tiles, noise and timesteps. The score is computed
from patients without noise and stays in the home. Letters: P patients of both sides, D coordinates.
"""

import copy
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from crafts_client.patients import PatientTiles
from crafts_client.seen_updates import SeenUpdate
from crafts_core.adapters import Adapter
from crafts_core.control_net import num_halvings_of
from crafts_core.evaluation.leakage import (
    Attack,
    LeakageConfig,
    Vector,
    membership_attack,
)
from crafts_core.evaluation.memorisation import FEWEST_PATIENTS
from crafts_core.foundation import Foundation
from crafts_core.progress import Progress
from crafts_core.stages.batch import Draws, TileBatch
from crafts_core.stages.objective import Objective
from crafts_privacy.gradients import FlatGradient

_DRAWS = 4
"""Of noise and timesteps for each tile and round."""
_RIDGE = 0.1
"""Of a gradient's squared length: what the attacker's own draws leave uncertain of it."""


def attack_updates(
    foundation: Foundation,
    updates: Sequence[SeenUpdate],
    members: PatientTiles,
    others: PatientTiles,
    config: LeakageConfig,
    progress: Progress | None = None,
) -> Attack:
    """Tell members from others by all updates together.

    Raises:
        ValueError: fewer than 8 patients on a side.
    """
    sides = (members, others)
    count = min(config.patients, *(side.num_patients for side in sides))
    if count < FEWEST_PATIENTS:
        raise ValueError(f"expected at least {FEWEST_PATIENTS} patients on each side, got {count}")
    rng = np.random.default_rng(config.seed)
    chosen = [rng.permutation(side.num_patients)[:count].tolist() for side in sides]
    candidates = [
        (side, patient) for side, own in zip(sides, chosen, strict=True) for patient in own
    ]
    score_P = np.zeros(len(candidates))
    for number, update in enumerate(updates):
        score_P += _scores(foundation, update, candidates, config, number)
        if progress is not None:
            progress("updates", number + 1, len(updates))
    return membership_attack("every update that left", score_P[:count], score_P[count:], config)


def _scores(
    foundation: Foundation,
    update: SeenUpdate,
    candidates: Sequence[tuple[PatientTiles, int]],
    config: LeakageConfig,
    number: int,
) -> Vector:
    """One round's share of everybody's score (P,)."""
    plan = update.plan
    adapter = Adapter.attach(
        copy.deepcopy(foundation.generator.denoiser),
        plan.adapter,
        plan.parts,
        num_halvings=num_halvings_of(foundation.generator),
    )
    adapter.load_state(update.received)
    # The drift term hardly depends on whose tiles it is computed on.
    stage = update.stage.model_copy(update={"lambda_drift": 0.0})
    objective = Objective(foundation, adapter, stage)
    parameters = adapter.trainable(update.request.factor)
    gradient = FlatGradient(list(parameters.values()))
    delta_D = torch.cat([update.delta[name].flatten().float() for name in parameters])
    pull_D = -delta_D / delta_D.norm().clamp(min=torch.finfo(torch.float32).tiny)
    rows = []
    for tiles, patient in candidates:
        source = torch.Generator().manual_seed(config.seed + 1_000_003 * number + patient)
        batch = tiles.batch(
            patient,
            max_tiles=config.tiles_per_patient,
            generator=source,
            modality=stage.modality,
        ).repeat(_DRAWS)
        grad_D = gradient.compute(_losses(objective, batch, objective.draw(batch, source))).cpu()
        rows.append(grad_D / grad_D.norm().clamp(min=plan.privacy.max_grad_norm))
    grad_PD = torch.stack(rows)
    gram_PP = (grad_PD @ grad_PD.T).double()
    ridge = _RIDGE * gram_PP.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)
    explained_P = torch.linalg.solve(
        gram_PP + ridge * torch.eye(len(rows), dtype=torch.float64), (grad_PD @ pull_D).double()
    )
    score_P: Vector = explained_P.numpy()
    return score_P


def _losses(objective: Objective, batch: TileBatch, draws: Draws) -> Iterator[Tensor]:
    """Of one patient; none where a patient has no tile for this stage."""
    if len(batch):
        yield batch.mean(objective.loss_per_tile(batch, draws))
