"""How well readers tell synthetic images from real ones: signal detection from counts.

The signal is *synthetic*: sensitivity is the share of synthetic images that were called synthetic,
specificity the share of real ones that were called real. Everything is a function of how often each
score was given to each kind, so that a bootstrap is one product of matrices.

Shape letters: R readers, I images, K kinds (real, synthetic), L scores, B resamples.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import norm

from crafts_core.study.questions import FIRST_SYNTHETIC, SCORES

Array = npt.NDArray[np.float64]
_LEVELS = len(SCORES)
_CUT = FIRST_SYNTHETIC - 1
NUM_RESAMPLES = 2000
LEVEL = 0.95


def sensitivity(counts_KL: Array) -> Array:
    """Share of synthetic images called synthetic; NaN without any. Leading axes are kept."""
    return _share(counts_KL[..., 1, _CUT:].sum(-1), counts_KL[..., 1, :].sum(-1))


def specificity(counts_KL: Array) -> Array:
    """Share of real images called real."""
    return _share(counts_KL[..., 0, :_CUT].sum(-1), counts_KL[..., 0, :].sum(-1))


def balanced_accuracy(counts_KL: Array) -> Array:
    """Mean of both: 0.5 is what guessing gives, whatever the numbers of each kind."""
    return (sensitivity(counts_KL) + specificity(counts_KL)) / 2


def d_prime(counts_KL: Array) -> Array:
    """z(hit rate) - z(false alarm rate), with the log-linear correction (Hautus 1995).

    Answers are added in proportion to each kind's images, half a one to each of the four numbers
    where there are as many real as synthetic: a reader who is never wrong has a finite d', and one
    who says *real* as often of both kinds has 0, however many were read of each. NaN where a kind
    was not read.
    """
    hits, alarms = _corrected_rates(counts_KL)
    result: Array = norm.ppf(hits) - norm.ppf(alarms)
    return result


def criterion(counts_KL: Array) -> Array:
    """-(z(hit rate) + z(false alarm rate)) / 2: above 0 a reader says *real* too readily."""
    hits, alarms = _corrected_rates(counts_KL)
    result: Array = -(norm.ppf(hits) + norm.ppf(alarms)) / 2
    return result


def area(counts_KL: Array) -> Array:
    """Area under the ROC curve of the six scores.

    How often, of a random pair, the synthetic image has the higher one; ties count half.
    """
    real, synthetic = counts_KL[..., 0, :], counts_KL[..., 1, :]
    below = np.cumsum(real, -1) - real
    wins = (synthetic * (below + real / 2)).sum(-1)
    return _share(wins, real.sum(-1) * synthetic.sum(-1))


MEASURES: Mapping[str, Callable[[Array], Array]] = {
    "balanced_accuracy": balanced_accuracy,
    "sensitivity": sensitivity,
    "specificity": specificity,
    "d_prime": d_prime,
    "area": area,
    "criterion": criterion,
}


@dataclass(frozen=True, slots=True)
class Resampling:
    """How often each image, and each reader, is in a resample."""

    images_BI: Array
    readers_BR: Array

    @classmethod
    def draw(
        cls, is_synthetic_I: npt.NDArray[np.bool_], num_readers: int, seed: int
    ) -> "Resampling":
        """Draw images with replacement within each kind, and readers among all.

        Within, because a study fixes how many there are of each kind.
        """
        rng = np.random.default_rng(seed)
        images_BI = np.zeros((NUM_RESAMPLES, len(is_synthetic_I)))
        for kind in (False, True):
            own = np.flatnonzero(is_synthetic_I == kind)
            if len(own):
                chance = np.full(len(own), 1 / len(own))
                images_BI[:, own] = rng.multinomial(len(own), chance, NUM_RESAMPLES)
        chance = np.full(num_readers, 1 / num_readers)
        readers_BR = rng.multinomial(num_readers, chance, NUM_RESAMPLES).astype(float)
        return cls(images_BI, readers_BR)


def counts_of(score_RI: Array, is_synthetic_I: npt.NDArray[np.bool_], weight_BI: Array) -> Array:
    """How often each reader gave each score to each kind, in each resample: (B, R, K, L).

    Args:
        score_RI: 1 to 6; NaN where the reader gave no answer.
        is_synthetic_I: The truth.
        weight_BI: How often an image counts; ones for the study itself.
    """
    given_RIL = (score_RI[:, :, None] == np.arange(1, _LEVELS + 1)).astype(float)
    kind_IK = np.stack([~is_synthetic_I, is_synthetic_I], -1).astype(float)
    counts: Array = np.einsum("bi,ik,ril->brkl", weight_BI, kind_IK, given_RIL, optimize=True)
    return counts


def mean_of(value_RI: Array, weight_BI: Array) -> Array:
    """Each reader's mean over the images that they judged (NaN: not), in each resample: (B, R)."""
    there_RI = ~np.isnan(value_RI)
    total_BR = weight_BI @ np.where(there_RI, value_RI, 0.0).T
    return _share(total_BR, weight_BI @ there_RI.T.astype(float))


def over_readers(value_BR: Array, weight_BR: Array | None = None) -> Array:
    """The mean reader; those for whom there is no value (NaN) do not count."""
    there_BR = ~np.isnan(value_BR)
    weights = there_BR if weight_BR is None else weight_BR * there_BR
    return _share((np.where(there_BR, value_BR, 0.0) * weights).sum(-1), weights.sum(-1))


def interval(values_B: Array) -> tuple[float, float] | None:
    """Where 95 % of resamples lie; None if there is a value in fewer than half of them."""
    there = values_B[~np.isnan(values_B)]
    if len(there) < len(values_B) / 2:
        return None
    low, high = np.quantile(there, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _corrected_rates(counts_KL: Array) -> tuple[Array, Array]:
    called = counts_KL[..., _CUT:].sum(-1)
    number = counts_KL.sum(-1)
    share = _share(number, np.broadcast_to(number.sum(-1, keepdims=True), number.shape))
    rates = _share(called + share, number + 2 * share)
    return rates[..., 1], rates[..., 0]


def _share(part: Any, whole: Any) -> Array:
    whole = np.asarray(whole, dtype=float)
    share: Array = np.divide(part, whole, out=np.full(whole.shape, np.nan), where=whole > 0)
    return share
