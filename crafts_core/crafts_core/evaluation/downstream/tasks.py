"""Four things that people do with tiles, each learnt from a lesson and examined on other patients.

Letters: R rows of the pool, T tiles that are asked about, L rows of a lesson, U distinct captions,
Q questions, N pairs of a row and a question, D features, E embedding.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from crafts_core.evaluation.alignment import (
    RANKS,
    caption_ranks,
    chance_of_recall,
    image_ranks,
)
from crafts_core.evaluation.downstream.figures import TaskName
from crafts_core.evaluation.downstream.paired import Marks
from crafts_core.evaluation.downstream.pool import REAL, Arm, Kind, Lesson, Pool, Split, lesson
from crafts_core.evaluation.downstream.pretraining import features, pretrained
from crafts_core.evaluation.downstream.questions import NO, UNKNOWN, YES, Answers
from crafts_core.evaluation.encoder import Features, unit_rows
from crafts_core.evaluation.extras import scikit_learn
from crafts_core.evaluation.judges import Judge, Verdicts
from crafts_core.evaluation.resampling import Rows, Vector

Shots = Sequence[int | None]
MAIN_MEASURE: dict[TaskName, str] = {
    "classification": "balanced accuracy",
    "retrieval": "caption of an image, R@1",
    "pretraining": "balanced accuracy",
    "questions": "balanced accuracy",
}
"""What the verdict on a task goes by."""
_PENALTIES = (0.001, 0.01, 0.1, 1.0, 10.0)
"""Of the ridge regression; each lesson chooses its own."""
_MAX_FOLDS = 5
_WORDS = ("no", "yes")
"""At ``NO`` and ``YES``."""


class Exam(NamedTuple):
    """What one arm got in one split."""

    shot: int | None
    measure: str
    marks: Marks


class Task(Protocol):
    """Learns and is examined, once for each number of patients."""

    @property
    def name(self) -> TaskName: ...

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """Arms that say something here."""
        ...

    def sit(self, split: Split, arm: Arm, shots: Shots) -> Iterator[Exam]:
        """Learn from what the arm has, and answer about patients of the other side."""
        ...


@dataclass(frozen=True, kw_only=True)
class Classification:
    """Which class is this tile of? A linear probe of an encoder's features."""

    pool: Pool
    features_RD: Features
    name: TaskName = "classification"
    kinds: tuple[Kind, ...] = ("real", "augmented", "synthetic", "both")

    def sit(self, split: Split, arm: Arm, shots: Shots) -> Iterator[Exam]:
        """See ``Task``."""
        for shot in shots:
            learnt = lesson(self.pool, split, arm, shot)
            yield _classified(self, split, learnt, self.features_RD, shot)


@dataclass(frozen=True, kw_only=True)
class Pretraining:
    """The same, seen by a network that saw the arm's images without labels, and no others.

    All patients who teach give it tiles; the probe then learns from real tiles with labels.
    """

    pool: Pool
    steps: int
    seed: int
    name: TaskName = "pretraining"
    kinds: tuple[Kind, ...] = ("untrained", "real", "synthetic", "both")

    def sit(self, split: Split, arm: Arm, shots: Shots) -> Iterator[Exam]:
        """See ``Task``."""
        seen = lesson(self.pool, split, arm, None)
        network = pretrained(
            self.pool.images_RHWC[seen.rows],
            seen.weight_L,
            steps=self.steps if len(seen.rows) else 0,
            seed=self.seed + split.number,
        )
        real = self.pool.real_rows
        found_ND = features(network, self.pool.images_RHWC[real])
        features_RD = np.zeros((len(self.pool.source_R), found_ND.shape[1]))
        features_RD[real] = found_ND
        for shot in shots:
            yield _classified(self, split, lesson(self.pool, split, REAL, shot), features_RD, shot)


def _classified(
    task: Classification | Pretraining,
    split: Split,
    learnt: Lesson,
    features_RD: Features,
    shot: int | None,
) -> Exam:
    pool, tested = task.pool, split.tested_rows(task.pool)
    judge = Judge.train(
        "shape",
        features_RD[learnt.rows],
        pool.class_R[learnt.rows].tolist(),
        pool.classes,
        learnt.weight_L,
    )
    said = pool.class_R[tested]
    marks = Marks(
        is_right_N=judge.verdicts(features_RD[tested], said.tolist()),
        patient_N=pool.patient_R[tested],
        group_N=np.searchsorted(pool.classes, said),
        chance=1 / len(pool.classes),
    )
    return Exam(shot, MAIN_MEASURE[task.name], marks)


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """Do images and captions find each other? A ridge regression from image to text embedding."""

    pool: Pool
    image_RE: Features
    text_RE: Features
    """Of each row's caption."""
    name: TaskName = "retrieval"
    kinds: tuple[Kind, ...] = ("untrained", "real", "augmented", "synthetic", "both")

    def sit(self, split: Split, arm: Arm, shots: Shots) -> Iterator[Exam]:
        """See ``Task``. Untrained, the aligner's own embeddings are compared."""
        tested = split.tested_rows(self.pool)
        for shot in shots:
            learnt = lesson(self.pool, split, arm, shot)
            found_TE = self.image_RE[tested]
            if len(learnt.rows):
                found_TE = self._mapped(found_TE, learnt)
            for measure, is_right_T, chance in self._found(found_TE, tested):
                marks = Marks(
                    is_right_N=is_right_T,
                    patient_N=self.pool.patient_R[tested],
                    group_N=np.zeros(len(tested), dtype=np.int64),
                    chance=chance,
                )
                yield Exam(shot, measure, marks)

    def _mapped(self, found_TE: Features, learnt: Lesson) -> Features:
        """Image embeddings where a lesson says that their captions lie."""
        taught = (self.image_RE[learnt.rows], self.text_RE[learnt.rows])
        penalty = fitting_penalty(*taught, learnt.weight_L, self.pool.patient_R[learnt.rows])
        ridge = scikit_learn("retrieval").linear_model.Ridge(penalty)
        mapped_TE: Features = ridge.fit(*taught, learnt.weight_L).predict(found_TE)
        return mapped_TE

    def _found(self, found_TE: Features, tested: Rows) -> Iterator[tuple[str, Verdicts, float]]:
        """Measure, whether each tile's query found what it should, and chance."""
        _, first_U, place_T = np.unique(
            self.pool.caption_R[tested], return_index=True, return_inverse=True
        )
        unit_TE = unit_rows(found_TE)
        cosine_TU = unit_TE @ self.text_RE[tested][first_U].T
        ways: tuple[tuple[str, Callable[[Features, Rows], tuple[Vector, Vector]], int], ...] = (
            ("caption of an image", caption_ranks, len(first_U)),
            ("image of a caption", image_ranks, len(tested)),
        )
        for told, ranks, gallery in ways:
            rank_T, right_T = ranks(cosine_TU, place_T)
            for k in (k for k in RANKS if k < gallery):
                yield f"{told}, R@{k}", rank_T < k, chance_of_recall(right_T, gallery, k)


def fitting_penalty(
    image_LE: Features, text_LE: Features, weight_L: Vector, patient_L: Rows
) -> float:
    """Which ridge regression errs least about patients that it did not learn from.

    Tiles of one patient are alike: a tile left out alone is as good as learnt. Synthetic images
    (patient -1) are nobody's, each its own. Of one patient alone the largest penalty.
    """
    learn = scikit_learn("retrieval")
    group_L = np.where(patient_L < 0, patient_L.max() + 1 + np.arange(len(patient_L)), patient_L)
    folds = min(_MAX_FOLDS, len(np.unique(group_L)))
    if folds < 2:
        return max(_PENALTIES)
    by_patient = learn.model_selection.GroupKFold(folds)

    def error(penalty: float) -> float:
        said_LE = learn.model_selection.cross_val_predict(
            learn.linear_model.Ridge(penalty),
            image_LE,
            text_LE,
            groups=group_L,
            cv=by_patient,
            params={"sample_weight": weight_L},
        )
        return float(weight_L @ ((said_LE - text_LE) ** 2).sum(axis=1))

    return min(_PENALTIES, key=error)


@dataclass(frozen=True, kw_only=True)
class Questions:
    """Yes or no? A logistic regression of the product of a tile's and a question's embeddings.

    Every answer to every question counts the same, in the lesson and in the exam: who always says
    yes to one question and no to another is right half of the time.
    """

    pool: Pool
    image_RE: Features
    question_QE: Features
    answer_RQ: Answers
    name: TaskName = "questions"
    kinds: tuple[Kind, ...] = ("real", "augmented", "synthetic", "both")

    def sit(self, split: Split, arm: Arm, shots: Shots) -> Iterator[Exam]:
        """See ``Task``. Where no question has both answers, nothing is asked."""
        asked = self._pairs(split.tested_rows(self.pool))
        for shot in shots if len(asked.row_N) else ():
            marks = Marks(
                is_right_N=self._answered(asked, lesson(self.pool, split, arm, shot)),
                patient_N=self.pool.patient_R[asked.row_N],
                group_N=asked.groups,
                chance=0.5,
            )
            yield Exam(shot, MAIN_MEASURE[self.name], marks)

    def _answered(self, asked: "_Pairs", learnt: Lesson) -> Verdicts:
        """Which of the questions are answered rightly after a lesson."""
        taught = self._pairs(learnt.rows)
        if not len(taught.row_N):
            return np.equal(asked.answer_N, YES)  # it can but guess: right half of the time
        weight_N = learnt.weight_L[taught.place_N]
        even_N = weight_N / np.bincount(taught.groups, weights=weight_N)[taught.groups]
        judge = Judge.train(
            "shape",
            self._products(taught),
            taught.answers,
            _WORDS,
            even_N * weight_N.sum() / even_N.sum(),
        )
        return judge.verdicts(self._products(asked), asked.answers)

    def _products(self, pairs: "_Pairs") -> Features:
        products_NE: Features = self.image_RE[pairs.row_N] * self.question_QE[pairs.question_N]
        return products_NE

    def _pairs(self, rows: Rows) -> "_Pairs":
        """Of those questions that some rows answer with yes and some with no."""
        found = self.answer_RQ[rows]
        has_both_Q = (found == YES).any(axis=0) & (found == NO).any(axis=0)
        place_N, question_N = np.nonzero((found != UNKNOWN) & has_both_Q)
        return _Pairs(
            place_N=place_N,
            row_N=rows[place_N],
            question_N=question_N,
            answer_N=found[place_N, question_N].astype(np.int64),
        )


@dataclass(frozen=True, kw_only=True)
class _Pairs:
    """Questions about rows, and the right answers."""

    place_N: Rows
    """Of the row among those that were given."""
    row_N: Rows
    question_N: Rows
    answer_N: Rows

    @property
    def groups(self) -> Rows:
        return 2 * self.question_N + self.answer_N

    @property
    def answers(self) -> list[str]:
        return [_WORDS[answer] for answer in self.answer_N.tolist()]
