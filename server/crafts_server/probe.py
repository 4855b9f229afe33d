"""The public probe of a foundation, as aggregation uses it.

Where sites told anchors and the plan contrasts public tiles with them, alignment steps go down that
loss, on the tiles that were picked: it is about the tissue that the federation has.

The probe's tiles are split: every third one is for the alignment steps, the others for the margin,
so a step is accepted on tiles that it was not fitted to. The margin's noise and timesteps are fixed
for the whole study, which makes the rounds of a receipt comparable; the steps draw anew each round,
from a public seed, which keeps them from fitting one draw. Nothing here depends on a patient.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from crafts_core.alignment_probe import AlignmentProbe
from crafts_core.exchange import state_hash
from crafts_core.foundation import Foundation
from crafts_core.plan_sections import GENERATOR_ONLY, AdapterConfig, Factor, Part
from crafts_core.probe import Probe
from crafts_core.retrieval import PublicLoss
from crafts_core.state import State, generator_state
from crafts_server.aggregation import PublicProbe

ProbeOfRound = Callable[[int], PublicProbe]
ToldLoss = Callable[[Mapping[str, Tensor]], PublicLoss | None]
"""Of a state with what sites told; None where they told nothing that steps are for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeSize:
    """How much a margin costs: ``2 * margin_tiles * margin_draws`` denoiser evaluations.

    Its gradient takes as many with a backward pass, once a round, however many sites there are.
    """

    margin_tiles: int = 32
    margin_draws: int = 2
    step_tiles: int = 16
    step_draws: int = 1
    picked_tiles: int = 48
    """Of a step on picked tiles."""


class FoundationProbe:
    """Margins and alignment gradients of adapter states on one foundation's probe."""

    def __init__(
        self,
        foundation: Foundation,
        adapter: AdapterConfig,
        *,
        seed: int,
        size: ProbeSize,
        parts: Sequence[Part] = GENERATOR_ONLY,
        told_loss: ToldLoss = lambda _: None,
    ) -> None:
        """Prepare the margin.

        Args:
            foundation: Public parts, among them the probe's tiles.
            adapter: The plan's adapter section.
            seed: The plan's public seed.
            size: What each evaluation may cost.
            parts: Of the plan. ControlNets are not measured: no probe tile has a condition.
            told_loss: What alignment steps go down in place of the probe's own loss.

        Raises:
            ValueError: the split leaves a part with fewer than two different captions.
        """
        rows = range(len(foundation.probe.captions))
        step_rows = _spread([row for row in rows if row % 3 == 2], size.step_tiles)
        margin_rows = _spread([row for row in rows if row % 3 != 2], size.margin_tiles)
        self._foundation_of_steps = _with_probe_rows(foundation, step_rows)
        self._adapter = adapter
        self._parts = tuple(part for part in parts if part == "generator")
        self._seed = seed
        self._size = size
        self._margin_probe = AlignmentProbe(
            _with_probe_rows(foundation, margin_rows),
            adapter,
            seed=_public_seed(seed, "margin"),
            num_draws=size.margin_draws,
            parts=self._parts,
        )
        self._told_loss = told_loss
        self._last: tuple[str, float] | None = None

    def for_round(self, number: int) -> PublicProbe:
        """The probe of one round: a fixed margin, fresh draws for its steps."""
        return _RoundProbe(self, number)

    def margin(self, state: Mapping[str, Tensor]) -> float:
        """The margin; the last one is remembered, because a round starts where one ended.

        States that differ in their ControlNets alone have the same margin.
        """
        denoiser = generator_state(state)
        identity = state_hash(denoiser)
        if self._last is None or self._last[0] != identity:
            self._last = (identity, self._margin_probe.margin(denoiser))
        return self._last[1]

    def margin_gradient(self, state: Mapping[str, Tensor], factor: Factor) -> State:
        """The margin's gradient at ``state``, for the tensors of ``factor``."""
        _, gradient = self._margin_probe.margin_gradient(generator_state(state), factor)
        return gradient

    def steps_of(self, number: int) -> AlignmentProbe:
        """What one round's alignment steps are fitted to, where sites told nothing."""
        return AlignmentProbe(
            self._foundation_of_steps,
            self._adapter,
            seed=self.seed_of(number),
            num_draws=self._size.step_draws,
            parts=self._parts,
        )

    def told_gradient(
        self, number: int, state: Mapping[str, Tensor], factor: Factor
    ) -> State | None:
        """The same where they told something."""
        loss = self._told_loss(state)
        if loss is None:
            return None
        return loss.gradient(
            state, factor, num_tiles=self._size.picked_tiles, seed=self.seed_of(number)
        )

    def seed_of(self, number: int) -> int:
        """Of a round's alignment steps: drawn anew, and the same for all steps of it."""
        return _public_seed(self._seed, f"steps of round {number}")


class _RoundProbe:
    def __init__(self, probe: FoundationProbe, number: int) -> None:
        self._probe = probe
        self._number = number
        self._steps: AlignmentProbe | None = None

    def margin(self, state: Mapping[str, Tensor]) -> float:
        return self._probe.margin(state)

    def margin_gradient(self, state: Mapping[str, Tensor], factor: Factor) -> State:
        return self._probe.margin_gradient(state, factor)

    def alignment_gradient(self, state: Mapping[str, Tensor], factor: Factor) -> State:
        told = self._probe.told_gradient(self._number, state, factor)
        if told is not None:
            return told
        if self._steps is None:
            self._steps = self._probe.steps_of(self._number)
        _, gradient = self._steps.gradient(generator_state(state), factor)
        return gradient


def _with_probe_rows(foundation: Foundation, rows: Sequence[int]) -> Foundation:
    probe = foundation.probe
    part = Probe(
        tiles_NCHW=probe.tiles_NCHW[torch.tensor(rows, dtype=torch.long)],
        captions=tuple(probe.captions[row] for row in rows),
    )
    return replace(foundation, probe=part)


def _spread(rows: list[int], count: int) -> list[int]:
    """At most ``count`` of ``rows``, evenly over all of them."""
    if count >= len(rows):
        return rows
    return [rows[index * len(rows) // count] for index in range(count)]


def _public_seed(seed: int, purpose: str) -> int:
    digest = hashlib.sha256(f"{seed}: {purpose}".encode()).digest()
    return int.from_bytes(digest[:7], "big")
