"""Distances between sets of images, with intervals that respect patients.

Two distances on an encoder's features: squared maximum mean discrepancy (unbiased, good for few
images, the headline) and the Fréchet distance. Features are scaled and the kernel's widths chosen
from the *reference* (held-out real tiles) alone and then kept, so that numbers of one evaluation
compare. Tiles of a patient are alike, so real tiles are resampled by patient.

Shape letters: N rows of x, M rows of y, D features, G patients.
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
    patient_M: npt.NDArray[np.int64]
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
        return int(self.patient_M.max()) + 1


def mmd_squared(
    k_NN: Features,
    k_MM: Features,
    k_NM: Features,
    weight_N: Vector | None = None,
    weight_M: Vector | None = None,
) -> float:
    """Unbiased squared MMD from kernel matrices (Gretton et al. 2012, eq. 3).

    Weights count repeats in a bootstrap; a row is never paired with itself or its repeats, which
    would bias the distance upwards.
    """
    weight_N = np.ones(len(k_NN)) if weight_N is None else weight_N
    weight_M = np.ones(len(k_MM)) if weight_M is None else weight_M
    across = weight_N @ k_NM @ weight_M / (weight_N.sum() * weight_M.sum())
    return float(_within(k_NN, weight_N) + _within(k_MM, weight_M) - 2.0 * across)


def _within(kernel: Features, weight: Vector) -> float:
    """Weighted mean of the kernel over pairs of different rows."""
    own = np.square(weight)
    pairs = weight @ kernel @ weight - own @ np.diag(kernel)
    return float(pairs / (weight.sum() ** 2 - own.sum()))


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
    reference: Reference,
    *,
    num_bootstrap: int,
    seed: int,
    groups: npt.NDArray[np.str_] | None = None,
) -> tuple[float, Interval]:
    """Squared MMD of images to the held-out tiles, and its bootstrap interval.

    Real tiles are resampled by patient, images one by one, or by ``groups`` where they belong to
    patients, too.
    """
    x_ND = reference.scale(features_ND)
    k_NN, k_MM = (
        reference.kernel(x_ND, x_ND),
        reference.kernel(reference.features_MD, reference.features_MD),
    )
    k_NM = reference.kernel(x_ND, reference.features_MD)
    rng = np.random.default_rng(seed)
    group_N = np.arange(len(x_ND))
    if groups is not None:
        group_N = np.unique(groups, return_inverse=True)[1]

    def resampled() -> float:
        weight_N = repeats(rng, int(group_N.max()) + 1)[group_N]
        weight_M = repeats(rng, reference.num_patients)[reference.patient_M]
        return mmd_squared(k_NN, k_MM, k_NM, weight_N, weight_M)

    return mmd_squared(k_NN, k_MM, k_NM), _interval(resampled, num_bootstrap)


def real_floor(reference: Reference, *, num_splits: int, seed: int) -> tuple[float, Interval]:
    """What real tiles of other patients score: squared MMD between halves of the patients.

    Mean over random splits, and where 90 % of the splits lie. Halves know fewer patients than the
    whole: where patients are few and their tiles many, a good generator may lie below.
    """
    kernel = reference.kernel(reference.features_MD, reference.features_MD)
    rng = np.random.default_rng(seed)

    def split() -> float:
        chosen = rng.permutation(reference.num_patients)[: reference.num_patients // 2]
        first = np.isin(reference.patient_M, chosen)
        return mmd_squared(
            kernel[first][:, first], kernel[~first][:, ~first], kernel[first][:, ~first]
        )

    values = [split() for _ in range(num_splits)]
    return float(np.mean(values)), interval_of(values)


def repeats(rng: np.random.Generator, count: int) -> Vector:
    """How often each of ``count`` units (at least two) is drawn in one bootstrap sample.

    A sample of one unit only has no pair to measure and is drawn again; with four patients that is
    one in 64.
    """
    while True:
        repeats = np.bincount(rng.integers(count, size=count), minlength=count)
        if np.count_nonzero(repeats) > 1:
            return repeats.astype(np.float64)


def _interval(draw: Callable[[], float], count: int) -> Interval:
    return interval_of([draw() for _ in range(count)])


def interval_of(values: list[float]) -> Interval:
    """Where the middle 90 % of resampled values lie."""
    low, high = np.quantile(values, [0.05, 0.95])
    return Interval(float(low), float(high))
