"""Squared maximum mean discrepancy between patients, from any kernel.

Shape letters: N images, M real tiles, P patients, B bootstrap samples.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
from scipy import sparse

from crafts_core.evaluation.encoder import Features
from crafts_core.evaluation.resampling import Interval, Patients, Vector, interval_of, repeats


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """The kernel between two sets of tiles, summed for each two patients."""

    sum_PP: Features
    first_P: Vector
    """Tiles of each patient in the first set."""
    second_P: Vector

    @classmethod
    def of(cls, kernel_NM: Features, patient_N: Patients, patient_M: Patients, count: int) -> Self:
        """Sums of a kernel matrix over the tiles of each pair of patients."""
        is_of_PN, is_of_PM = (
            sparse.csr_array(
                (np.ones(len(patient)), (patient, np.arange(len(patient)))),
                shape=(count, len(patient)),
            )
            for patient in (patient_N, patient_M)
        )
        return cls(
            sum_PP=(is_of_PM @ (is_of_PN @ kernel_NM).T).T,
            first_P=np.bincount(patient_N, minlength=count).astype(np.float64),
            second_P=np.bincount(patient_M, minlength=count).astype(np.float64),
        )

    def mean(self, weight_P: Vector, other_P: Vector) -> Vector:
        """Over pairs of tiles of different patients, each as often as its weight in either set.

        Weights may have a leading axis of samples, and so has the result then. A patient's repeats
        in a bootstrap are that patient still, and never paired either.
        """
        own_P = weight_P * other_P
        total = (weight_P @ self.sum_PP * other_P).sum(-1) - own_P @ np.diag(self.sum_PP)
        pairs = (weight_P @ self.first_P) * (other_P @ self.second_P)
        mean: Vector = total / (pairs - own_P @ (self.first_P * self.second_P))
        return mean


@dataclass(frozen=True, slots=True, kw_only=True)
class Discrepancy:
    """Squared MMD (Gretton et al. 2012, eq. 3) between patients, ready to be resampled by patient.

    Tiles of one patient are alike, and an image is like the tile whose caption it was drawn from.
    Pairs of one patient are therefore left out, within either set and across: what is left is an
    unbiased estimate, 0 on average where both sets come from other patients of the same kind,
    however many patients there are and however many tiles each has.
    """

    images: Pairs
    real: Pairs
    across: Pairs

    @classmethod
    def of(
        cls,
        k_NN: Features,
        k_MM: Features,
        k_NM: Features,
        patient_N: Patients,
        patient_M: Patients,
    ) -> Self:
        """From kernel matrices of images and real tiles, and whose each of them is.

        Raises:
            ValueError: a set is of one patient alone.
        """
        if min(len(np.unique(each)) for each in (patient_N, patient_M)) < 2:
            raise ValueError("expected images and tiles of at least two patients each")
        count = int(max(patient_N.max(), patient_M.max())) + 1
        return cls(
            images=Pairs.of(k_NN, patient_N, patient_N, count),
            real=Pairs.of(k_MM, patient_M, patient_M, count),
            across=Pairs.of(k_NM, patient_N, patient_M, count),
        )

    def squared(self, weight_P: Vector | None = None, other_P: Vector | None = None) -> float:
        """The squared MMD of all patients, or of each as often as these weights say.

        Args:
            weight_P: For the images, and for the real tiles unless ``other_P`` is given.
            other_P: For the real tiles.
        """
        weight_P = np.ones(len(self.real.first_P)) if weight_P is None else weight_P
        return float(self._squared(weight_P, weight_P if other_P is None else other_P))

    def interval(self, num_bootstrap: int, seed: int) -> Interval:
        """90 % bootstrap interval over patients."""
        rng = np.random.default_rng(seed)
        weight_BP = np.stack([self._resample(rng) for _ in range(num_bootstrap)])
        return interval_of(self._squared(weight_BP, weight_BP).tolist())

    def _squared(self, weight_P: Vector, other_P: Vector) -> Vector:
        within = self.images.mean(weight_P, weight_P) + self.real.mean(other_P, other_P)
        squared: Vector = within - 2.0 * self.across.mean(weight_P, other_P)
        return squared

    def _resample(self, rng: np.random.Generator) -> Vector:
        """Drawn again where one set is left with one patient: it has no pair to measure."""
        while True:
            weight_P = repeats(rng, len(self.real.first_P))
            sides = (self.images.first_P, self.real.first_P)
            if min(np.count_nonzero(weight_P * each) for each in sides) > 1:
                return weight_P
