"""What an opened sum means: one step over all patients, or the weighted sum of sites' own updates.

Both are post-processing of the sum, and public.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from crafts_core.state import State
from crafts_privacy.declared_noise import NormBounds
from crafts_privacy.secure_aggregation.updates import UpdateGrid
from crafts_server.aggregation import PublicProbe, RoundState, ServerStep
from crafts_server.open_round import OpenRound
from crafts_server.sum_of_sites import added, bounds_of, descend, norm_of
from crafts_server.sum_phases import SumOfPart

_OPTIMIZER = "optimizer."
"""Begins the names of the server state that are the optimizer's; the others are the rule's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Counted:
    """What a member counts for in the sums of a round that were read."""

    weight: float
    max_weight: float
    noise_variance: float
    """Per coordinate of what it adds to the step, before its weight."""


class SumReading(Protocol):
    """How the vectors of a round's sums are to be read."""

    def norm(self, part: SumOfPart) -> float:
        """Of a sum that nobody is missing from."""
        ...

    def bounds(self, part: SumOfPart) -> NormBounds:
        """Which norms agree with what its members declare."""
        ...

    def step(self, good: Sequence[SumOfPart], start: RoundState, probe: PublicProbe) -> ServerStep:
        """From sums of which no member is in two to the plan's rule, and on from there."""
        ...

    def counted(self, parts: Sequence[SumOfPart]) -> dict[str, Counted]:
        """Each member of all of them, by name."""
        ...

    def noise_std(self, parts: Sequence[SumOfPart]) -> float:
        """Of each number of the step that they make together, before the rule."""
        ...


def reading_of(opened: OpenRound) -> SumReading:
    """As the plan's trust says."""
    is_distributed = opened.study.plan.privacy.trust == "distributed"
    return OverPatients(opened) if is_distributed else OfUpdates(opened)


class OverPatients:
    """The step that a single site with everybody's patients would have taken.

    Weights and gate need single updates and have no part here: every patient counts the same.
    Norms are in units of max_grad_norm.
    """

    def __init__(self, opened: OpenRound) -> None:
        self._opened = opened
        self._privacy = opened.privacy

    def norm(self, part: SumOfPart) -> float:
        """See :class:`SumReading`."""
        return norm_of(part.opened(), self._privacy)

    def bounds(self, part: SumOfPart) -> NormBounds:
        """See :class:`SumReading`."""
        return bounds_of(part.opened(), self._privacy)

    def step(self, good: Sequence[SumOfPart], start: RoundState, probe: PublicProbe) -> ServerStep:
        """See :class:`SumReading`."""
        opened, factor = self._opened, self._opened.planned.factor
        kept = optimizer_state(opened)
        descent = descend(
            opened.schema,
            added([part.opened() for part in good]),
            self._privacy,
            opened.planned.stage,
            {name.split(".", 1)[1]: kept[name] for name in kept if name.startswith(f"{factor}.")},
        )
        step = opened.rule.move(start, descent.delta, probe)
        moved = {f"{factor}.{name}": tensor for name, tensor in descent.optimizer_state.items()}
        return replace(step, server_state=joined(step.server_state, kept | moved))

    def counted(self, parts: Sequence[SumOfPart]) -> dict[str, Counted]:
        """See :class:`SumReading`. A member counts as its patients say."""
        privacy, stage = self._privacy, self._opened.planned.stage
        noise = {site: own for part in parts for site, own in part.noise_multipliers.items()}
        patients = patients_of(parts)
        total = sum(patients.values())
        found = {}
        for site, number in patients.items():
            deviation = noise[site] * privacy.max_grad_norm / (privacy.sample_rate * total)
            share, variance = number / total, (stage.learning_rate * deviation) ** 2
            found[site] = Counted(weight=share, max_weight=share, noise_variance=variance)
        return found

    def noise_std(self, parts: Sequence[SumOfPart]) -> float:
        """See :class:`SumReading`. A member's noise is in the sum as it is."""
        return math.sqrt(math.fsum(each.noise_variance for each in self.counted(parts).values()))


class OfUpdates:
    """The weighted sum of updates that are private by themselves, as a plain round has it.

    No single update is seen, so nothing is measured of any: the gate of each is neutral. Where a
    bad site is looked for the sums of several sets are added up, each with its members' part of
    everybody's weight.
    """

    def __init__(self, opened: OpenRound) -> None:
        self._opened = opened
        self._num_values = sum(tensor.numel() for tensor in opened.schema.values())

    def norm(self, part: SumOfPart) -> float:
        """See :class:`SumReading`."""
        return float(torch.linalg.vector_norm(self._sum_of(part)))

    def bounds(self, part: SumOfPart) -> NormBounds:
        """See :class:`SumReading`."""
        return self._grid([part]).declared_sum.bounds(self._num_values)

    def step(self, good: Sequence[SumOfPart], start: RoundState, probe: PublicProbe) -> ServerStep:
        """See :class:`SumReading`."""
        shares = self._shares(good)
        total_D = torch.stack(
            [share * self._sum_of(part) for share, part in zip(shares, good, strict=True)]
        ).sum(dim=0)
        schema = self._opened.schema
        names = sorted(schema)
        flat = total_D.float().split([schema[name].numel() for name in names])
        delta: State = {
            name: part_D.reshape(schema[name].shape)
            for name, part_D in zip(names, flat, strict=True)
        }
        return self._opened.rule.move(start, delta, probe)

    def counted(self, parts: Sequence[SumOfPart]) -> dict[str, Counted]:
        """See :class:`SumReading`."""
        everybody = self._grid(parts)
        return {
            site: Counted(
                weight=share * grid.weights[site],
                max_weight=everybody.caps[site],
                noise_variance=grid.declared[site].noise_std ** 2,
            )
            for share, grid in zip(
                self._shares(parts), (self._grid([part]) for part in parts), strict=True
            )
            for site in grid.weights
        }

    def noise_std(self, parts: Sequence[SumOfPart]) -> float:
        """See :class:`SumReading`."""
        counted = self.counted(parts).values()
        return math.sqrt(math.fsum(each.weight**2 * each.noise_variance for each in counted))

    def _sum_of(self, part: SumOfPart) -> Tensor:
        return self._grid([part]).opened(part.total_D)

    def _shares(self, parts: Sequence[SumOfPart]) -> list[float]:
        """How much each set counts; of a single one exactly one."""
        weights = self._grid(parts).weights
        total = math.fsum(weights.values())
        return [math.fsum(weights[site] for site in part.members) / total for part in parts]

    def _grid(self, parts: Sequence[SumOfPart]) -> UpdateGrid:
        words = [ready for part in parts for ready in part.members.values()]
        return UpdateGrid.of(
            self._opened.study.plan,
            self._opened.planned.stage,
            patients_of(parts),
            noise_multiplier=max(ready.noise_multiplier for ready in words),
        )


def patients_of(parts: Sequence[SumOfPart]) -> dict[str, int]:
    """What each member declares, by name."""
    members = {site: ready for part in parts for site, ready in part.members.items()}
    return {site: members[site].declared_patients for site in sorted(members)}


def rule_state(opened: OpenRound) -> State:
    """What the rule goes on with: the optimizer's part is not its business."""
    kept = opened.parent.server_state()
    return opened.rule_state(
        {name: tensor for name, tensor in kept.items() if not name.startswith(_OPTIMIZER)}
    )


def optimizer_state(opened: OpenRound) -> State:
    """Of steps over all patients, per factor, as each has steps of its own; of updates nothing.

    Every stage begins afresh.
    """
    if opened.planned.starts_stage:
        return {}
    kept = opened.parent.server_state()
    return {
        name.removeprefix(_OPTIMIZER): tensor
        for name, tensor in kept.items()
        if name.startswith(_OPTIMIZER)
    }


def joined(rule_state: Mapping[str, Tensor], optimizer_state: Mapping[str, Tensor]) -> State:
    """Both, as a checkpoint keeps them."""
    mine = {_OPTIMIZER + name: tensor for name, tensor in optimizer_state.items()}
    return {**rule_state, **mine}
