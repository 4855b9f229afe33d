"""Sums of site trust: each member adds its own private update, weighted, as integers on one grid.

An update carries all the noise of its own site's promise before it comes here, so nothing in this
module protects a patient. Masks keep the coordinator from seeing one update alone; nobody counts
on that.

Weights and grid follow from the plan and from who the members are. Every member computes them for
itself: a coordinator that chose weights could ask for a sum that consists of one site.

Letters: D all coordinates of the trained factor, tensor after tensor in the order of their names.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn, Self

import torch
from torch import Tensor

from crafts_core.plan import Plan
from crafts_core.plan_sections import StageConfig
from crafts_core.weighting import agreed_weights
from crafts_privacy.declared_noise import (
    DeclaredDelta,
    declared_delta,
    noise_variance,
    weighted_sum_of,
)
from crafts_privacy.secure_aggregation.fixed_point import TAIL_Z, from_group, to_group
from crafts_privacy.secure_aggregation.masking import Group, add_masks_

_SUM_BITS = 30
"""The longest sum is at most 2 to this number of grid steps: a sign and a spare bit are left."""
_ROUNDING = 1e-9
"""Of weights: a cap of exactly ``MOST_WEIGHT`` is kept."""

MOST_WEIGHT = 0.6
"""A site adds to no sum in which it counts more, as the sum would be little but its own update.
Plans cap weights at this unless they say otherwise, and plans are the coordinator's to write."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Member:
    """What a member declares: the plan's mechanism, for its own number of patients."""

    noise_multiplier: float
    max_grad_norm: float
    sample_rate: float
    steps: int
    declared_patients: int


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateGrid:
    """How much each member's update counts in their sum, and the grid that the sum lies on."""

    weights: dict[str, float]
    """By site, summing to one."""
    caps: dict[str, float]
    """The most that each could have counted."""
    declared: dict[str, DeclaredDelta]
    """What each member's update consists of."""
    step: float
    """A power of two."""

    @classmethod
    def of(
        cls, plan: Plan, stage: StageConfig, patients: Mapping[str, int], *, noise_multiplier: float
    ) -> Self:
        """Of a round's sum.

        The step is the finest with which no sum of these members passes the group's signed
        numbers: each update's coordinate is at most its signal and ``TAIL_Z`` deviations of its
        noise.

        Args:
            plan: The study's.
            stage: The round's.
            patients: What each member declares, by site.
            noise_multiplier: Of every member's update, as they announced it.
        """
        privacy, sites = plan.privacy_of(stage), sorted(patients)
        members = [
            _Member(
                noise_multiplier=noise_multiplier,
                max_grad_norm=privacy.max_grad_norm,
                sample_rate=privacy.sample_rate,
                steps=stage.local_steps,
                declared_patients=patients[site],
            )
            for site in sites
        ]
        agreed = agreed_weights(
            plan.aggregation_of(stage),
            [member.declared_patients for member in members],
            [noise_variance(member, stage) for member in members],
        )
        declared = [declared_delta(member, stage) for member in members]
        longest = math.fsum(map(_longest, agreed.weights, declared))
        return cls(
            weights=dict(zip(sites, agreed.weights, strict=True)),
            caps=dict(zip(sites, agreed.caps, strict=True)),
            declared=dict(zip(sites, declared, strict=True)),
            step=2.0 ** (math.ceil(math.log2(longest)) - _SUM_BITS),
        )

    @property
    def heaviest(self) -> str | None:
        """The site that counts more than ``MOST_WEIGHT``, if one does."""
        site = max(self.weights, key=self.weights.__getitem__)
        return site if self.weights[site] > MOST_WEIGHT + _ROUNDING else None

    @property
    def declared_sum(self) -> DeclaredDelta:
        """What the sum consists of."""
        return weighted_sum_of([(self.weights[site], self.declared[site]) for site in self.weights])

    def part_of(self, site: str, update_D: Tensor) -> Group:
        """A member's weighted update in whole steps.

        A coordinate beyond what the declared mechanism gives is cut, so that no sum wraps.
        """
        longest = _longest(self.weights[site], self.declared[site])
        most = math.floor(longest / self.step)
        whole_D = update_D.double().mul_(self.weights[site] / self.step).round_()
        return to_group(whole_D.clamp_(-most, most))

    def opened(self, sum_D: Group) -> Tensor:
        """The weighted sum of the members' updates, once all masks are gone; float64."""
        return from_group(sum_D) * self.step


class HeldUpdate:
    """A private update that waits to know its sum's members. It leaves in one sum or never.

    Of one that left in two sums over different members their difference would show single sites.
    """

    __slots__ = ("_update_D",)

    def __init__(self, update: Mapping[str, Tensor]) -> None:
        flat = [update[name].reshape(-1) for name in sorted(update)]
        self._update_D: Tensor | None = torch.cat(flat)

    def __reduce__(self) -> NoReturn:
        """It goes to no file and to no other process."""
        raise TypeError("a held update is in memory only")

    def release(self, grid: UpdateGrid, site: str, pairs: Sequence[tuple[bytes, bool]]) -> Group:
        """The weighted update with all of the site's masks. After it the update is gone.

        Args:
            grid: Of exactly the members that ``pairs`` are of.
            site: This one.
            pairs: Of ``MaskKey.pair_keys``.

        Raises:
            ValueError: it has left already, or would leave without masks.
        """
        update_D, self._update_D = self._update_D, None
        if update_D is None:
            raise ValueError("a held update leaves once")
        if not pairs:
            raise ValueError("a held update leaves with masks")
        vector_D = grid.part_of(site, update_D)
        add_masks_(vector_D, pairs)
        return vector_D

    def forget(self) -> None:
        """Overwrite the update; nothing can leave any more."""
        update_D, self._update_D = self._update_D, None
        if update_D is not None:
            update_D.zero_()


def _longest(weight: float, declared: DeclaredDelta) -> float:
    """The most that any coordinate of a weighted update is away from zero."""
    return weight * (declared.longest_signal + TAIL_Z * declared.noise_std)
