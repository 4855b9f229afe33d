"""Distances between sets of images, with intervals that respect patients.

Two distances on an encoder's features: squared maximum mean discrepancy (unbiased, good for few
images, the headline) and the Fréchet distance. Features are scaled and the kernel's widths chosen
from the *reference* (held-out real tiles) alone and then kept, so that numbers of one evaluation
compare. Tiles of a patient are alike, so patients are what is counted and resampled.

Shape letters: N images, M real tiles, D features, P patients.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt
from scipy import linalg
from scipy.spatial.distance import cdist

from crafts_core.evaluation.encoder import Features

Vector = npt.NDArray[np.float64]
Rows = npt.NDArray[np.int64]
Patients = npt.NDArray[np.int64]
"""For each row the number of its patient."""
_CLIP = 5.0
_WIDTHS = (0.25, 0.5, 1.0, 2.0, 4.0)
_SHRINKAGE = 0.2


class Interval(NamedTuple):
    """A 90 % interval."""

    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """Held-out real tiles as the fixed measure: features, patients, scale and kernel widths."""

    features_MD: Features
    """Scaled."""
    patient_M: Patients
    names: tuple[str, ...]
    """Of the patients."""
    centre_D: Vector
    spread_D: Vector
    median_square: float

    @classmethod
    def fit(cls, features_MD: Features, patients: npt.NDArray[np.str_]) -> Self:
        """Median and interquartile range as scale, median distance as kernel width.

        Raises:
            ValueError: fewer than four patients; there is nothing to resample.
        """
        names, patient_M = np.unique(patients, return_inverse=True)
        if len(names) < 4 or len(features_MD) != len(patient_M):
            raise ValueError(f"expected tiles of at least 4 held-out patients, got {len(names)}")
        low, centre, high = np.quantile(features_MD, [0.25, 0.5, 0.75], axis=0)
        spread = np.maximum((high - low) / 1.349, 1e-3)
        scaled = np.clip((features_MD - centre) / spread, -_CLIP, _CLIP)
        squares = cdist(scaled, scaled, "sqeuclidean")
        return cls(
            features_MD=scaled,
            patient_M=patient_M.astype(np.int64),
            names=tuple(names.tolist()),
            centre_D=centre,
            spread_D=spread,
            median_square=float(np.median(squares[np.triu_indices(len(scaled), 1)])),
        )

    def scale(self, features_ND: Features) -> Features:
        """Other features in the reference's scale, clipped so that no feature explodes."""
        scaled: Features = np.clip((features_ND - self.centre_D) / self.spread_D, -_CLIP, _CLIP)
        return scaled

    def kernel(self, x_ND: Features, y_MD: Features) -> Features:
        """Mean of five Gaussian kernels around the reference's median squared distance."""
        squares = cdist(x_ND, y_MD, "sqeuclidean") / (2.0 * self.median_square)
        kernel: Features = np.mean([np.exp(-squares / width) for width in _WIDTHS], axis=0)
        return kernel

    @property
    def num_patients(self) -> int:
        return len(self.names)

    def places_of(self, patients: npt.NDArray[np.str_]) -> Patients:
        """The number of each of these patients.

        Raises:
            ValueError: one of them is not of the reference.
        """
        place_of = {name: place for place, name in enumerate(self.names)}
        unknown = set(patients.tolist()) - place_of.keys()
        if unknown:
            raise ValueError(f"expected patients of the reference, got {min(unknown)!r}")
        return np.asarray([place_of[name] for name in patients.tolist()], dtype=np.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pairs:
    """The kernel between two sets of tiles, summed for each two patients."""

    sum_PP: Features
    first_P: Vector
    """Tiles of each patient in the first set."""
    second_P: Vector

    @classmethod
    def of(cls, kernel_NM: Features, patient_N: Patients, patient_M: Patients, count: int) -> Self:
        is_of_NP, is_of_MP = (
            (patient[:, None] == np.arange(count)).astype(np.float64)
            for patient in (patient_N, patient_M)
        )
        return cls(
            sum_PP=is_of_NP.T @ kernel_NM @ is_of_MP,
            first_P=is_of_NP.sum(axis=0),
            second_P=is_of_MP.sum(axis=0),
        )

    def mean(self, weight_P: Vector, other_P: Vector) -> float:
        """Over pairs of tiles of different patients, each as often as its weight in either set.

        A patient's repeats in a bootstrap are that patient still, and never paired either.
        """
        own_P = weight_P * other_P
        total = weight_P @ self.sum_PP @ other_P - own_P @ np.diag(self.sum_PP)
        pairs = (weight_P @ self.first_P) * (other_P @ self.second_P)
        return float(total / (pairs - own_P @ (self.first_P * self.second_P)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Discrepancy:
    """Squared MMD (Gretton et al. 2012, eq. 3) between patients, ready to be resampled by patient.

    Tiles of one patient are alike, and an image is like the tile whose caption it was drawn from.
    Pairs of one patient are therefore left out, within either set and across: what is left is an
    unbiased estimate, 0 on average where both sets come from other patients of the same kind,
    however many patients there are and however many tiles each has.
    """

    images: _Pairs
    real: _Pairs
    across: _Pairs

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
            images=_Pairs.of(k_NN, patient_N, patient_N, count),
            real=_Pairs.of(k_MM, patient_M, patient_M, count),
            across=_Pairs.of(k_NM, patient_N, patient_M, count),
        )

    def squared(self, weight_P: Vector | None = None, other_P: Vector | None = None) -> float:
        """The squared MMD of all patients, or of each as often as these weights say.

        Args:
            weight_P: For the images, and for the real tiles unless ``other_P`` is given.
            other_P: For the real tiles.
        """
        weight_P = np.ones(len(self.real.first_P)) if weight_P is None else weight_P
        other_P = weight_P if other_P is None else other_P
        within = self.images.mean(weight_P, weight_P) + self.real.mean(other_P, other_P)
        return within - 2.0 * self.across.mean(weight_P, other_P)

    def interval(self, num_bootstrap: int, seed: int) -> Interval:
        """90 % bootstrap interval over patients."""
        rng = np.random.default_rng(seed)
        return interval_of([self.squared(self._resample(rng)) for _ in range(num_bootstrap)])

    def _resample(self, rng: np.random.Generator) -> Vector:
        """Drawn again where one set is left with one patient: it has no pair to measure."""
        while True:
            weight_P = repeats(rng, len(self.real.first_P))
            sides = (self.images.first_P, self.real.first_P)
            if min(np.count_nonzero(weight_P * each) for each in sides) > 1:
                return weight_P


def frechet_distance(x_ND: Features, y_MD: Features) -> float:
    """Fréchet distance of two Gaussians fitted with shrunk covariances (Heusel et al. 2017).

    With fewer images than features a covariance is singular; a fifth of it is moved onto its
    diagonal, for both sets alike.
    """
    mean_gap = x_ND.mean(axis=0) - y_MD.mean(axis=0)
    first, second = _shrunk_covariance(x_ND), _shrunk_covariance(y_MD)
    scale_D, basis_DD = linalg.eigh(first)
    root = basis_DD * np.sqrt(np.clip(scale_D, 0.0, None)) @ basis_DD.T
    middle = linalg.eigvalsh(root @ second @ root)
    overlap = np.sqrt(np.clip(middle, 0.0, None)).sum()
    return float(mean_gap @ mean_gap + np.trace(first) + np.trace(second) - 2.0 * overlap)


def _shrunk_covariance(x_ND: Features) -> Features:
    covariance = np.cov(x_ND, rowvar=False)
    shrunk: Features = (1 - _SHRINKAGE) * covariance + _SHRINKAGE * np.diag(np.diag(covariance))
    return shrunk


def mmd_to_reference(
    features_ND: Features,
    patients: npt.NDArray[np.str_],
    reference: Reference,
    *,
    num_bootstrap: int,
    seed: int,
) -> tuple[float, Interval]:
    """Squared MMD of images to the held-out tiles, and its bootstrap interval over patients.

    Args:
        features_ND: Of images, or of real tiles that something was done to.
        patients: Of the reference: whose tile each is, or whose caption it was drawn from.
        reference: The held-out tiles.
        num_bootstrap: Resamples.
        seed: Of them.

    Raises:
        ValueError: a patient is not of the reference, or all images are of one.
    """
    x_ND = reference.scale(features_ND)
    found = Discrepancy.of(
        reference.kernel(x_ND, x_ND),
        reference.kernel(reference.features_MD, reference.features_MD),
        reference.kernel(x_ND, reference.features_MD),
        reference.places_of(patients),
        reference.patient_M,
    )
    return found.squared(), found.interval(num_bootstrap, seed)


def real_floor(reference: Reference, *, num_splits: int, seed: int) -> tuple[float, Interval]:
    """What real tiles of other patients score: squared MMD between halves of the patients.

    Mean over random splits (0 but for chance, since no patient is paired with itself), and where
    90 % of the splits lie.
    """
    kernel = reference.kernel(reference.features_MD, reference.features_MD)
    patient_M = reference.patient_M
    whole = Discrepancy.of(kernel, kernel, kernel, patient_M, patient_M)
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(num_splits):
        is_first_P = _half(reference.num_patients, rng)
        first_P, second_P = (part.astype(np.float64) for part in (is_first_P, ~is_first_P))
        values.append(whole.squared(first_P, second_P))
    return float(np.mean(values)), interval_of(values)


def matched_floor(
    reference: Reference,
    matched: Callable[[Rows, Rows], Features],
    *,
    num_splits: int,
    seed: int,
) -> tuple[float, Interval]:
    """``real_floor`` where one half is first brought to the other, as images are.

    Args:
        reference: The held-out tiles.
        matched: Features of the tiles in some rows, brought to those in other rows.
        num_splits: How many.
        seed: Of them.
    """
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(num_splits):
        first, second = halves(reference.patient_M, rng)
        x_ND, y_MD = reference.scale(matched(first, second)), reference.features_MD[second]
        values.append(
            Discrepancy.of(
                reference.kernel(x_ND, x_ND),
                reference.kernel(y_MD, y_MD),
                reference.kernel(x_ND, y_MD),
                reference.patient_M[first],
                reference.patient_M[second],
            ).squared()
        )
    return float(np.mean(values)), interval_of(values)


def between_patients(reference: Reference) -> float:
    """How far one patient's tiles lie from another's: mean squared MMD over pairs of patients.

    Of patients with at least two tiles each. It grows neither with the number of patients nor with
    that of tiles, so other distances can be told in it.

    Raises:
        ValueError: fewer than two such patients.
    """
    kernel = reference.kernel(reference.features_MD, reference.features_MD)
    pairs = _Pairs.of(kernel, reference.patient_M, reference.patient_M, reference.num_patients)
    several = np.flatnonzero(pairs.first_P > 1)
    if len(several) < 2:
        raise ValueError(f"expected two patients with several tiles, got {len(several)}")
    tiles_P, sum_PP = pairs.first_P[several], pairs.sum_PP[np.ix_(several, several)]
    within_P = (np.diag(sum_PP) - tiles_P) / (tiles_P * (tiles_P - 1))  # a kernel's diagonal is 1
    mean_PP = sum_PP / np.outer(tiles_P, tiles_P)
    across = mean_PP[~np.eye(len(several), dtype=np.bool_)].mean()
    return float(2.0 * (within_P.mean() - across))


def halves(patient_M: Patients, rng: np.random.Generator) -> tuple[Rows, Rows]:
    """Rows of a random half of the patients, and of the others."""
    is_first = _half(int(patient_M.max()) + 1, rng)[patient_M]
    return np.flatnonzero(is_first), np.flatnonzero(~is_first)


def _half(count: int, rng: np.random.Generator) -> npt.NDArray[np.bool_]:
    """Which of so many patients are in a random half of them."""
    is_first_P = np.zeros(count, dtype=np.bool_)
    is_first_P[rng.permutation(count)[: count // 2]] = True
    return is_first_P


def repeats(rng: np.random.Generator, count: int) -> Vector:
    """How often each of ``count`` units (at least two) is drawn in one bootstrap sample.

    A sample of one unit only has no pair to measure and is drawn again; with four patients that is
    one in 64.
    """
    while True:
        repeats = np.bincount(rng.integers(count, size=count), minlength=count)
        if np.count_nonzero(repeats) > 1:
            return repeats.astype(np.float64)


def interval_of(values: list[float]) -> Interval:
    """Where the middle 90 % of resampled values lie."""
    low, high = np.quantile(values, [0.05, 0.95])
    return Interval(float(low), float(high))
