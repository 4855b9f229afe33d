"""Seeded doubles of the privacy randomness. Tests only: a seed voids every guarantee."""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crafts_privacy.noise import add_gaussian_integers_
from crafts_privacy.sampling import poisson_sample


def draws_of(seed: int, step: int, patient: str) -> torch.Generator:
    """What ``Randomness.generator`` gives, made again from a seed."""
    words = hashlib.sha256(f"{seed} {step} {patient}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(words[:7], "little"))


class SeededNoise:
    """The production transform behind reproducible bytes."""

    def __init__(self, seed: int) -> None:
        self._generator = np.random.default_rng(seed)

    def add_(self, grid_sum_D: Tensor, std: float) -> None:
        def stream(num: int) -> Tensor:
            words = self._generator.integers(-(2**63), 2**63, num)
            return torch.from_numpy(words).to(grid_sum_D.device)

        add_gaussian_integers_(grid_sum_D, std, stream)


class NoNoise:
    """Leaves the clipped sum as it is, so that a test can look at it."""

    def add_(self, grid_sum_D: Tensor, std: float) -> None:
        """Nothing."""


class RecordedSums:
    """Keeps every clipped sum, in whole grid steps, and adds nothing."""

    def __init__(self) -> None:
        self.sums: list[Tensor] = []

    def add_(self, grid_sum_D: Tensor, std: float) -> None:
        self.sums.append(grid_sum_D.clone())


class SeededSampler:
    """Poisson sampling from reproducible bytes."""

    def __init__(self, seed: int) -> None:
        self._bytes = np.random.default_rng(seed).bytes

    def sample(self, num_patients: int, sample_rate: float) -> NDArray[np.int64]:
        return poisson_sample(num_patients, sample_rate, self._bytes)


class FixedSampler:
    """Always the same patients, whatever the rate; all of them by default."""

    def __init__(self, patients: Sequence[int] | None = None) -> None:
        self._patients = patients

    def sample(self, num_patients: int, sample_rate: float) -> NDArray[np.int64]:
        chosen = range(num_patients) if self._patients is None else self._patients
        return np.array(list(chosen), dtype=np.int64)
