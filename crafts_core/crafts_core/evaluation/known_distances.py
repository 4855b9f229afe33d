"""Distances that others report, so that figures can be set beside theirs.

* the Fréchet distance (Heusel et al. 2017), with shrunk covariances;
* KID (Bińkowski et al. 2018): squared MMD under a cubic polynomial kernel;
* CMMD (Jayasumana et al. 2024): squared MMD under a Gaussian kernel on CLIP embeddings, in
  thousandths.

All are of the chosen encoder's features, not of Inception's or of one CLIP's: they compare within
an encoder. The two MMDs leave out pairs of one patient, as all of ours do.

Shape letters: N images, M real tiles, D features, P patients, G groups of patients.
"""

import numpy as np
from scipy import linalg, stats
from scipy.spatial.distance import cdist

from crafts_core.evaluation.encoder import Features, unit_rows
from crafts_core.evaluation.resampling import Interval, Patients

_SHRINKAGE = 0.2
_GROUPS = 10
_CMMD_WIDTH, _CMMD_SCALE = 10.0, 1000.0


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


def frechet_interval(
    x_ND: Features, y_MD: Features, patient_N: Patients, patient_M: Patients, *, seed: int
) -> Interval | None:
    """90 % interval by a jackknife over ten groups of patients.

    A bootstrap repeats tiles, and the distance grows where there are fewer different ones: its
    interval would lie above the estimate.

    Returns:
        None where a group holds all images, or all tiles, but one.
    """
    count = int(max(patient_N.max(), patient_M.max())) + 1
    groups = min(_GROUPS, count)
    group_P = np.random.default_rng(seed).permutation(count) % groups
    without = []
    for group in range(groups):
        kept_N, kept_M = (group_P[patient] != group for patient in (patient_N, patient_M))
        if min(kept_N.sum(), kept_M.sum()) < 2:
            return None
        without.append(frechet_distance(x_ND[kept_N], y_MD[kept_M]))
    error = np.sqrt((groups - 1) * np.var(without))
    reach = float(stats.t.ppf(0.95, groups - 1) * error)
    found = frechet_distance(x_ND, y_MD)
    return Interval(max(0.0, found - reach), found + reach)


def kid_kernel(x_ND: Features, y_MD: Features) -> Features:
    """``(x y / D + 1) ^ 3`` (Bińkowski et al. 2018, section 4)."""
    kernel: Features = (x_ND @ y_MD.T / x_ND.shape[1] + 1.0) ** 3
    return kernel


def cmmd_kernel(x_ND: Features, y_MD: Features) -> Features:
    """Gaussian of width 10 between embeddings of unit length, times 1000."""
    squares = cdist(unit_rows(x_ND), unit_rows(y_MD), "sqeuclidean")
    kernel: Features = _CMMD_SCALE * np.exp(-squares / (2.0 * _CMMD_WIDTH**2))
    return kernel
