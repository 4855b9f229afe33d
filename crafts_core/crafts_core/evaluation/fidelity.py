"""Distances between sets of images, with intervals that respect patients.

The distance is the squared maximum mean discrepancy on an encoder's features: unbiased, and good
for few images. Features are scaled and the kernel's widths chosen from the *reference* (held-out
real tiles) alone and then kept, so that numbers of one evaluation compare. Tiles of a patient are
alike, so patients are what is counted and resampled.

Shape letters: N images, M real tiles, D features, P patients.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
from scipy.spatial.distance import cdist

from crafts_core.evaluation.discrepancy import Discrepancy, Pairs
from crafts_core.evaluation.encoder import Features
from crafts_core.evaluation.resampling import (
    Interval,
    Patients,
    Rows,
    Vector,
    half_of_patients,
    halves,
    interval_of,
)

Kernel = Callable[[Features, Features], Features]
_CLIP = 5.0
_WIDTHS = (0.25, 0.5, 1.0, 2.0, 4.0)


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
            ValueError: fewer than four patients, so there is nothing to resample; or tiles that are
                nearly all the same, so there is no distance to measure in.
        """
        names, patient_M = np.unique(patients, return_inverse=True)
        if len(names) < 4 or len(features_MD) != len(patient_M):
            raise ValueError(f"expected tiles of at least 4 held-out patients, got {len(names)}")
        low, centre, high = np.quantile(features_MD, [0.25, 0.5, 0.75], axis=0)
        spread = np.maximum((high - low) / 1.349, 1e-3)
        scaled = np.clip((features_MD - centre) / spread, -_CLIP, _CLIP)
        squares = cdist(scaled, scaled, "sqeuclidean")
        median_square = float(np.median(squares[np.triu_indices(len(scaled), 1)]))
        if median_square == 0.0:
            raise ValueError("nearly all held-out tiles look the same; take out blank ones")
        return cls(
            features_MD=scaled,
            patient_M=patient_M.astype(np.int64),
            names=tuple(names.tolist()),
            centre_D=centre,
            spread_D=spread,
            median_square=median_square,
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

    def places_of(self, patients: npt.NDArray[np.str_], *, are_others: bool = False) -> Patients:
        """The number of each of these patients.

        Args:
            patients: Of the reference; or of elsewhere, whose numbers then follow on these.
            are_others: Whether they are of elsewhere.

        Raises:
            ValueError: one of them is not of the reference, or is although it should not.
        """
        place_of = {name: place for place, name in enumerate(self.names)}
        if are_others:
            others = set(patients.tolist())
            if both := others & place_of.keys():
                raise ValueError(f"expected patients of elsewhere, got {min(both)!r}")
            first = len(place_of)
            place_of = {name: first + place for place, name in enumerate(sorted(others))}
        unknown = set(patients.tolist()) - place_of.keys()
        if unknown:
            raise ValueError(f"expected patients of the reference, got {min(unknown)!r}")
        return np.asarray([place_of[name] for name in patients.tolist()], dtype=np.int64)


def mmd_to_reference(
    features_ND: Features,
    patients: npt.NDArray[np.str_],
    reference: Reference,
    *,
    num_bootstrap: int,
    seed: int,
    are_others: bool = False,
) -> tuple[float, Interval]:
    """Squared MMD of images to the held-out tiles, and its bootstrap interval over patients.

    Args:
        features_ND: Of images, or of real tiles that something was done to.
        patients: Of the reference: whose tile each is, or whose caption it was drawn from.
        reference: The held-out tiles.
        num_bootstrap: Resamples.
        seed: Of them.
        are_others: Whether ``patients`` are of elsewhere instead.

    Raises:
        ValueError: a patient is not of the reference, or all images are of one.
    """
    return kernel_distance(
        reference.kernel,
        reference.scale(features_ND),
        reference.features_MD,
        reference.places_of(patients, are_others=are_others),
        reference.patient_M,
        num_bootstrap=num_bootstrap,
        seed=seed,
    )


def kernel_distance(
    kernel: Kernel,
    x_ND: Features,
    y_MD: Features,
    patient_N: Patients,
    patient_M: Patients,
    *,
    num_bootstrap: int,
    seed: int,
) -> tuple[float, Interval]:
    """Squared MMD under any kernel, and its bootstrap interval over patients.

    Raises:
        ValueError: a set is of one patient alone.
    """
    found = Discrepancy.of(
        kernel(x_ND, x_ND), kernel(y_MD, y_MD), kernel(x_ND, y_MD), patient_N, patient_M
    )
    return found.squared(), found.interval(num_bootstrap, seed)


def real_floor(reference: Reference, *, num_splits: int, seed: int) -> tuple[float, Interval]:
    """What real tiles of other patients score: squared MMD between halves of the patients.

    Mean over random splits (0 but for chance, since no patient is paired with itself), and where
    90 % of the splits lie.
    """
    kernel = reference.kernel(reference.features_MD, reference.features_MD)
    return kernel_floor(kernel, reference.patient_M, num_splits=num_splits, seed=seed)


def kernel_floor(
    k_MM: Features, patient_M: Patients, *, num_splits: int, seed: int
) -> tuple[float, Interval]:
    """``real_floor`` under any kernel."""
    whole = Discrepancy.of(k_MM, k_MM, k_MM, patient_M, patient_M)
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(num_splits):
        is_first_P = half_of_patients(int(patient_M.max()) + 1, rng)
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
    pairs = Pairs.of(kernel, reference.patient_M, reference.patient_M, reference.num_patients)
    several = np.flatnonzero(pairs.first_P > 1)
    if len(several) < 2:
        raise ValueError(f"expected two patients with several tiles, got {len(several)}")
    tiles_P, sum_PP = pairs.first_P[several], pairs.sum_PP[np.ix_(several, several)]
    within_P = (np.diag(sum_PP) - tiles_P) / (tiles_P * (tiles_P - 1))  # a kernel's diagonal is 1
    mean_PP = sum_PP / np.outer(tiles_P, tiles_P)
    across = mean_PP[~np.eye(len(several), dtype=np.bool_)].mean()
    return float(2.0 * (within_P.mean() - across))
