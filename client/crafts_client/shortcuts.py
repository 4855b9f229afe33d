"""Which of a site's shortcuts are believed: those that change no gradient of public tiles.

Passes of several patients, half precision, compiled and checkpointed passes make rounds quick. Each
is tried on public tiles before patients are drawn; what fails there is left out.
"""

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from crafts_client.passes import Drawn, gradients_of, losses_of, public_draws
from crafts_client.speed import Speed
from crafts_client.training_task import TrainingTask
from crafts_core.adapters import Adapter
from crafts_core.foundation import Foundation
from crafts_core.plan_sections import Factor, Modality, StageConfig
from crafts_core.stages.batch import TileBatch
from crafts_core.stages.objective import Objective
from crafts_core.stages.public_batch import probe_batch
from crafts_core.state import add_delta, factor_names
from crafts_core.threads import Map, side_by_side
from crafts_privacy.gradients import FlatGradient, GroupGradients
from crafts_privacy.isolation import is_isolated
from crafts_privacy.ranks import Alone, Ranks

_LOG = logging.getLogger(__name__)

_AWAKE = 0.1
"""Standard deviation of what ``awake`` adds."""
_WILD = 5.0
"""Standard deviation of what a hostile adapter may hold, for a check before the first round."""
_SHIFTS = (1, 2, 3, 4)
"""Passes of the check that patients are isolated (``is_isolated``); one a round."""


class Shortcuts:
    """Those of one adapter at one site, and the public tiles that they are tried on."""

    def __init__(
        self, foundation: Foundation, adapter: Adapter, speed: Speed, ranks: Ranks | None
    ) -> None:
        """``speed`` is what the site asks for, ``ranks`` are its devices."""
        self._foundation, self._adapter = foundation, adapter
        self._speed, self._ranks = speed, ranks
        self._public_tiles: dict[tuple[Modality | None, tuple[str, ...]], TileBatch] = {}
        self._trusted: dict[tuple[StageConfig, Factor, int], Speed] = {}
        self._shifts = itertools.cycle(_SHIFTS)

    def trusted(self, task: TrainingTask, objective: Objective) -> Speed:
        """The site's shortcuts, as far as public tiles show that they change no gradient.

        Once for a stage, factor and number of rows: gradients with and without them are nearly the
        same. Patients who share a pass: to the last bit alone, once with wild weights and then with
        every adapter that comes. What is left out depends on public numbers only.
        """
        rows = task.rows
        key = (task.stage, task.factor, rows)
        if key not in self._trusted:
            self._trusted[key] = self._believed(task, objective)
        speed = self._trusted[key]
        if speed.at_a_time(rows) > 1:
            shift = next(self._shifts)
            if not self._patients_are_isolated(speed, task, objective, [shift]):
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

    def _believed(self, task: TrainingTask, objective: Objective) -> Speed:
        """What of the site's shortcuts holds before the first round."""
        speed, rows = self._speed, task.rows
        if task.factor == "all":  # a row for each patient would be a copy of all weights
            speed = replace(speed, group_rows=0)
        if not speed.group_size(rows) and not speed.changes_the_passes:
            return speed
        error = self._error_of(speed, task, objective)
        if not error <= speed.tolerance:
            _LOG.warning(
                "gradients of public tiles are off by %.0e of their length with the shortcuts of "
                "site.toml; training without them",
                error,
            )
            return Speed(microbatch_tiles=speed.microbatch_tiles, group_rows=0)
        if speed.at_a_time(rows) > 1:
            self._adapter.load_state(_moved(task, _WILD))
            is_isolated = self._patients_are_isolated(speed, task, objective, _SHIFTS)
            self._adapter.load_state(awake(task))
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
        shifts: Sequence[int],
    ) -> bool:
        """Of public patients, with the weights that the adapter holds now."""
        filler = self.filler(objective, task)
        cohort = [
            self._public_patient(objective, task, seed=index)
            for index in range(speed.at_a_time(task.rows))
        ]
        strangers = [filler, *(_spoilt(filler, value) for value in (torch.nan, 0.0, 1e4))]
        strangers = strangers[shifts[0] % 4 :] + strangers[: shifts[0] % 4]
        speed.apply(self._adapter)
        with self.passes(task, speed) as (gradients, run):
            isolated = is_isolated(
                lambda group: gradients_of(gradients, run, objective, group),
                cohort,
                strangers,
                shifts,
                in_one_pass=gradients.num_patients,
            )
        self._adapter.run_with()
        return isolated

    def _error_of(self, speed: Speed, task: TrainingTask, objective: Objective) -> float:
        """Of the gradients of two public patients with as many tiles as ours have."""
        parameters, rows = list(self._adapter.trainable(task.factor).values()), task.rows
        cohort = [
            self._public_patient(objective, task, seed=index)
            for index in range(max(speed.at_a_time(rows), 2))
        ]
        one, whole = FlatGradient(parameters), Speed(microbatch_tiles=speed.microbatch_tiles)

        def one_by_one(chosen: Speed) -> Tensor:
            return torch.stack(
                [one.compute(losses_of(objective, drawn, chosen, rows)).clone() for drawn in cohort]
            )

        exact_PD = one_by_one(whole)
        speed.apply(self._adapter)
        if not speed.group_size(rows):
            found_PD = one_by_one(speed)
        else:
            with self.passes(task, speed) as (gradients, run):
                found_PD = gradients_of(gradients, run, objective, cohort)
        one.release()
        self._adapter.run_with()
        length = exact_PD.norm().clamp(min=torch.finfo(torch.float32).tiny)
        return float((found_PD - exact_PD).norm() / length)

    @contextmanager
    def passes(self, task: TrainingTask, speed: Speed) -> Iterator[tuple[GroupGradients, Map]]:
        """Passes of one shape, and what runs as many at a time as ``speed`` says."""
        parameters = list(self._adapter.trainable(task.factor).values())
        size, rows = speed.group_size(task.rows), task.rows
        network = self._adapter.network
        with (
            GroupGradients(network, parameters, num_patients=size, num_tiles=rows) as gradients,
            side_by_side(speed.side_by_side(rows)) as run,
        ):
            yield gradients, run

    def _public_patient(self, objective: Objective, task: TrainingTask, *, seed: int) -> Drawn:
        """One who has as many rows as a pass has for each: a probe tile, each time noised anew."""
        tiles = self.probe(3, task).select(torch.tensor([seed % 3] * task.rows))
        batch = replace(tiles, weight_B=torch.full_like(tiles.weight_B, 1.0 / task.rows))
        return batch, public_draws(objective, batch, seed=seed)

    def filler(self, objective: Objective, task: TrainingTask) -> Drawn:
        """Rows that weigh nothing, for places and tiles that are not there. Public."""
        batch, draws = self._public_patient(objective, task, seed=0)
        return replace(batch, weight_B=torch.zeros_like(batch.weight_B)), draws

    def probe(self, num_tiles: int, task: TrainingTask) -> TileBatch:
        """The first of the foundation's public tiles, as the task's stage needs them."""
        known, wanted = self._public_tiles, (task.stage.modality, task.captions)
        if wanted not in known:
            modality, captions = wanted
            known[wanted] = probe_batch(self._foundation, modality=modality, captions=captions)
        return known[wanted].select(torch.arange(num_tiles))


def awake(task: TrainingTask) -> Mapping[str, Tensor]:
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


def _spoilt(drawn: Drawn, value: float) -> Drawn:
    """A patient whose latents are all ``value``, and count."""
    batch, draws = drawn
    weight_B = torch.full_like(batch.weight_B, 1.0 / len(batch))
    latents_BCHW = torch.full_like(batch.latents_BCHW, value)
    return replace(batch, latents_BCHW=latents_BCHW, weight_B=weight_B), draws
