"""Patients' tiles as what backward passes are made of: cut, filled up, and joined.

All passes of a round have one shape, whoever was drawn.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from crafts_client.speed import Speed
from crafts_core.stages.batch import Draws, TileBatch
from crafts_core.stages.objective import Objective
from crafts_core.threads import Map
from crafts_privacy.gradients import GroupGradients

Drawn = tuple[TileBatch, Draws]
"""A patient's tiles with their noise and timesteps."""


def public_draws(objective: Objective, batch: TileBatch, *, seed: int = 0) -> Draws:
    """The same at every call."""
    return objective.draw(batch, torch.Generator().manual_seed(seed))


def losses_of(objective: Objective, drawn: Drawn, speed: Speed, rows: int) -> Iterator[Tensor]:
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


def joined_loss(objective: Objective, group: Sequence[Drawn], filler: Drawn) -> Tensor:
    """Weighted losses of all rows of some patients, each filled up to as many as ``filler`` has."""
    filled = [_filled(drawn, filler) for drawn in group]
    batch = TileBatch.cat([batch for batch, _ in filled])
    draws = Draws.cat([draws for _, draws in filled])
    return batch.weight_B * objective.loss_per_tile(batch, draws)


def gradients_of(
    gradients: GroupGradients, run: Map, objective: Objective, patients: Sequence[Drawn]
) -> Tensor:
    """Of patients who have as many rows as their places, enough for whole passes."""
    size = gradients.num_patients

    def one_pass(group: Sequence[Drawn]) -> Tensor:
        return gradients.compute(joined_loss(objective, group, group[0]))

    groups = [patients[start : start + size] for start in range(0, len(patients), size)]
    return torch.cat(list(run(one_pass, groups)))


def _filled(drawn: Drawn, filler: Drawn) -> Drawn:
    batch, draws = drawn
    missing = torch.arange(len(filler[0]) - len(batch))
    if not len(missing):
        return drawn
    rest, rest_draws = filler[0].select(missing), _select(filler[1], missing)
    return TileBatch.cat([batch, rest]), Draws.cat([draws, rest_draws])


def _select(draws: Draws, rows: Tensor) -> Draws:
    return replace(
        draws,
        noise_BCHW=draws.noise_BCHW[rows],
        timesteps_B=draws.timesteps_B[rows],
        drop_caption_B=draws.drop_caption_B[rows],
    )
