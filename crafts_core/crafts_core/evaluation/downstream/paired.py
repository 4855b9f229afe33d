"""Marks of several arms in the same exams, compared pair by pair.

An interval is by patients and by splits at once: both are drawn again, the same ones for all arms,
so a difference is between arms that were asked the same. Splits are few, and a bootstrap of few is
too narrow: how often each counts is stretched to what Student's t gives. What is averaged are
groups (the classes, the answers to a question), so that none counts more because it is frequent.

Letters: N questions, P patients, G groups, S splits, B bootstrap samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
from scipy import stats

from crafts_core.evaluation.resampling import Interval, Patients, Vector, interval_of, repeats


@dataclass(frozen=True, slots=True, kw_only=True)
class Marks:
    """One exam: which answers were right, about whom, and what chance gives."""

    is_right_N: npt.NDArray[np.bool_]
    patient_N: Patients
    group_N: npt.NDArray[np.int64]
    chance: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Resamples:
    """How often each patient and each split counts; the first row is the estimate itself."""

    weight_BP: Vector
    weight_BS: Vector

    @classmethod
    def draw(cls, num_patients: int, num_splits: int, *, num_bootstrap: int, seed: int) -> Self:
        """The estimate and so many bootstrap samples."""
        rng = np.random.default_rng(seed)
        patients = [repeats(rng, num_patients) for _ in range(num_bootstrap)]
        splits = rng.multinomial(num_splits, np.full(num_splits, 1 / num_splits), num_bootstrap)
        return cls(
            weight_BP=np.stack([np.ones(num_patients), *patients]),
            weight_BS=np.vstack([np.ones(num_splits), 1.0 + _stretch(num_splits) * (splits - 1.0)]),
        )

    def scores(self, marks: Sequence[Marks]) -> Vector:
        """Share of right answers, mean of the groups and of the splits, in each sample (B,)."""
        share_BS = np.stack([self._shares(each) for each in marks], axis=1)
        weight_BS = np.where(np.isnan(share_BS), 0.0, self.weight_BS)
        total_B = (weight_BS * np.nan_to_num(share_BS)).sum(axis=1)
        return _ratio(total_B, weight_BS.sum(axis=1))

    def _shares(self, marks: Marks) -> Vector:
        """Of one split; NaN in samples that have none of its patients."""
        num_groups = int(marks.group_N.max()) + 1
        shape = (self.weight_BP.shape[1], num_groups)
        cell_N = marks.patient_N * num_groups + marks.group_N
        all_PG, right_PG = (
            np.bincount(cell_N, weights=each, minlength=shape[0] * shape[1]).reshape(shape)
            for each in (None, marks.is_right_N.astype(np.float64))
        )
        share_BG = _ratio(self.weight_BP @ right_PG, self.weight_BP @ all_PG)
        counted_B = (~np.isnan(share_BG)).sum(axis=1).astype(np.float64)
        return _ratio(np.nan_to_num(share_BG).sum(axis=1), counted_B)


def estimate(score_B: Vector) -> tuple[float, Interval]:
    """The estimate and its 90 % interval."""
    return float(score_B[0]), interval_of(score_B[np.isfinite(score_B)].tolist()[1:])


def _stretch(num_splits: int) -> float:
    """How much wider a t interval of a mean is than its bootstrap's; two units at least."""
    t, normal = stats.t.ppf(0.95, num_splits - 1), stats.norm.ppf(0.95)
    return float(np.sqrt(num_splits / (num_splits - 1)) * t / normal)


def _ratio(part: Vector, whole: Vector) -> Vector:
    found: Vector = np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole > 0)
    return found
