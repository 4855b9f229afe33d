"""Many synthetic hospitals from a few lines: size, case mix, laboratory and scanner are drawn.

::

    [hospitals]
    num_sites = 100
    patients = [20, 400]
"""

import math
from typing import Annotated, Any, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from crafts_core.vocabulary import CANCER_TYPES, NORMAL_ORGANS
from crafts_simulations.hospital import round_size

Count = Annotated[int, Field(ge=2, le=100_000)]
_LEAST_SHARE = 0.02
"""Rarer types of a hospital's mix are left out: it has a handful, as hospitals do."""


class HospitalsDraw(BaseModel):
    """What hospitals are drawn from. ``sites`` writes each out as a ``[[site]]`` would."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    num_sites: Annotated[int, Field(ge=1, le=1000)]
    patients: tuple[Count, Count]
    """Of the smallest and the largest site; the logarithm is uniform between."""
    alpha: Annotated[float, Field(gt=0)] = 0.1
    """Dirichlet concentration of the 30 types and the normal organs: small makes specialists."""
    mpp: Annotated[tuple[Annotated[float, Field(gt=0, le=10)], ...], Field(min_length=1)] = (
        0.25, 0.5,
    )  # fmt: skip
    """Scanners' scales, equally likely."""
    slide_um: Annotated[float, Field(ge=64, le=32_768)] = 256.0
    """Side of a slide."""
    heldout_fraction: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Further patients of each site, for the test set, in units of its patients; two at least."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0

    @model_validator(mode="after")
    def _sizes_are_in_order(self) -> Self:
        if self.patients[0] > self.patients[1]:
            raise ValueError("patients: name the smallest site first, then the largest")
        return self

    def sites(self) -> list[dict[str, Any]]:
        """Values of one ``[[site]]`` each; more sites leave the first ones as they were."""
        return [self._site(number) for number in range(1, self.num_sites + 1)]

    def _site(self, number: int) -> dict[str, Any]:
        rng = np.random.default_rng([self.seed, number])
        low, high = (math.log(count) for count in self.patients)
        num_patients = round(math.exp(rng.uniform(low, high)))
        mpp = float(rng.choice(self.mpp))
        return {
            "name": f"site-{number:03d}",
            "num_patients": num_patients,
            "declared_patients": round_size(num_patients),
            "heldout_patients": max(2, round(self.heldout_fraction * num_patients)),
            "slide_px": round(self.slide_um / mpp),
            "mpp": mpp,
            "cancer_mix": self._case_mix(rng),
            "stain_seed": int(rng.integers(2**31)),
            "seed": int(rng.integers(2**31 - 2_000_000)),
        }

    def _case_mix(self, rng: np.random.Generator) -> dict[str, float]:
        labels = [cancer.code for cancer in CANCER_TYPES] + [f"normal {o}" for o in NORMAL_ORGANS]
        share_K = rng.dirichlet(np.full(len(labels), self.alpha))
        return {
            label: round(float(share), 4)
            for label, share in zip(labels, share_K, strict=True)
            if share >= _LEAST_SHARE
        }
