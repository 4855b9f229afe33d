"""How far readers agree with themselves and with each other, beyond chance.

Kappa and alpha are 1 for perfect agreement and 0 for what chance gives. Where all answers are the
same there is no chance to compare with, and none of them exists: None.
"""

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import numpy.typing as npt
from sklearn.metrics import cohen_kappa_score
from statsmodels.stats.inter_rater import aggregate_raters, fleiss_kappa

Values = npt.NDArray[np.float64]
"""Readers by images; NaN where there is no answer."""


def cohen(first: Sequence[float], second: Sequence[float], *, is_ordinal: bool) -> float | None:
    """Cohen's kappa of two answers to the same images, with squared weights where order counts."""
    if len(set(first) | set(second)) < 2:
        return None
    codes = {value: code for code, value in enumerate(sorted(set(first) | set(second)))}
    if is_ordinal:
        codes = {value: int(value) for value in codes}
    kappa = cohen_kappa_score(
        [codes[value] for value in first],
        [codes[value] for value in second],
        labels=range(min(codes.values()), max(codes.values()) + 1),
        weights="quadratic" if is_ordinal else None,
    )
    return float(kappa)


def mean_cohen(values_RI: Values) -> float | None:
    """The mean of Cohen's kappa over all pairs of readers, on what both have read."""
    kappas = []
    for one, other in combinations(values_RI, 2):
        both = ~np.isnan(one) & ~np.isnan(other)
        kappas.append(cohen(list(one[both]), list(other[both]), is_ordinal=False))
    known = [kappa for kappa in kappas if kappa is not None]
    return float(np.mean(known)) if known else None


def fleiss(values_RI: Values) -> float | None:
    """Fleiss' kappa on the images that every reader has read."""
    complete_RI = values_RI[:, ~np.isnan(values_RI).any(0)]
    if len(np.unique(complete_RI)) < 2:
        return None
    table, _ = aggregate_raters(complete_RI.T.astype(int))
    return float(fleiss_kappa(table))


def alpha(values_RI: Values, *, is_ordinal: bool) -> float | None:
    """Krippendorff's alpha; answers that are missing are allowed.

    One minus observed over expected disagreement, in values that were paired within an image
    (Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability"). Ours because the library that
    has it is under the GPL.
    """
    found = [image_R[~np.isnan(image_R)] for image_R in values_RI.T]
    pairable = [answers for answers in found if len(answers) >= 2]
    if not pairable or len(codes := np.unique(np.concatenate(pairable))) < 2:
        return None
    count_IK = np.stack([(answers[:, None] == codes).sum(0) for answers in pairable]).astype(float)
    share_I = 1 / (count_IK.sum(1) - 1)
    together_KK = np.einsum("i,ik,il->kl", share_I, count_IK, count_IK)
    together_KK -= np.diag(share_I @ count_IK)
    total_K = count_IK.sum(0)
    apart_KK = _ordinal_distance(total_K) if is_ordinal else 1.0 - np.eye(len(codes))
    expected = float((np.outer(total_K, total_K) * apart_KK).sum()) / (total_K.sum() - 1)
    observed = float((together_KK * apart_KK).sum())
    return 1.0 - observed / float(expected)


def _ordinal_distance(total_K: Values) -> Values:
    """Squared number of answers from one value to another, the two themselves counted half."""
    place_K = total_K.cumsum() - total_K / 2
    return np.asarray((place_K[:, None] - place_K[None, :]) ** 2)
