"""Semantic drift, by an examiner that no training ever saw.

The examiner learns from real tiles of one half of the held-out patients to say what a tile's
caption is (ridge regression from features to words), and is asked about the other half and about
generated images. Its *mark* of an image under a caption is the cosine between the words that it
expects and the words that are there. Drift is told relative to real tiles::

    D = (own - mark of the images under their prompts) / (own - wrong)

where ``own`` is the mark of the other half's tiles under their own captions and ``wrong`` under
other tiles'. So D is 0 for real tiles and 1 for real tiles under wrong captions. Where the two do
not separate (the gate), an examiner cannot tell right from wrong, and there is no D.

It sees grey tiles: stain is no content.

Letters: N images, D features, W words, U distinct captions, P patients.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from crafts_core.evaluation.encoder import Features, unit_rows
from crafts_core.evaluation.extras import NotMeasurableError, scikit_learn
from crafts_core.evaluation.resampling import Interval, half_of_patients, interval_of, repeats

Vector = npt.NDArray[np.float64]
_FEWEST_PATIENTS = 8
_PENALTIES = np.logspace(0, 6, 13)
_GATE = (0.005, 0.995)


class Gate(BaseModel):
    """Whether the examiner tells real tiles under their own captions from the same under others."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    own: float
    """Mean mark of real tiles under their own captions."""
    wrong: float
    """Under the captions of other tiles that say something else."""
    difference_interval: Interval
    """99 %, over patients."""
    patients: int
    """Asked; as many others taught the examiner."""

    @property
    def is_passed(self) -> bool:
        return self.difference_interval.low > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reader:
    """Features to expected words, and captions to words."""

    words: Any
    centre_W: Vector
    regression: Any

    @classmethod
    def fit(cls, features_ND: Features, captions: Sequence[str]) -> Self:
        learn = scikit_learn("drift")
        words = learn.feature_extraction.text.TfidfVectorizer(analyzer=_words)
        words_NW = words.fit_transform(captions).toarray()
        centre_W = words_NW.mean(axis=0)
        regression = learn.pipeline.make_pipeline(
            learn.preprocessing.StandardScaler(),
            learn.linear_model.RidgeCV(alphas=_PENALTIES),
        )
        regression.fit(features_ND, words_NW - centre_W)
        return cls(words=words, centre_W=centre_W, regression=regression)

    def marks(self, features_ND: Features, captions: Sequence[str]) -> Features:
        """Mark of every image under every caption."""
        expected_NW = np.asarray(self.regression.predict(features_ND)).reshape(len(features_ND), -1)
        said_UW = self.words.transform(captions).toarray() - self.centre_W
        marks: Features = unit_rows(expected_NW) @ unit_rows(said_UW).T
        return marks


def _words(caption: str) -> list[str]:
    return re.findall(r"\w+", caption.lower()) or [caption]


@dataclass(frozen=True, slots=True, kw_only=True)
class Examiner:
    """One that has been taught, with what it says of the real tiles that it was not taught."""

    reader: _Reader
    asked_patients: tuple[str, ...]
    """Whose real tiles it was asked about, and not taught with; ``patient_N`` points here."""
    asked_captions: tuple[str, ...]
    """Theirs, each once."""
    patient_N: npt.NDArray[np.int64]
    own_N: Vector
    wrong_N: Vector
    gate: Gate
    num_bootstrap: int
    seed: int

    @classmethod
    def teach(
        cls,
        features_ND: Features,
        captions: Sequence[str],
        patients: npt.NDArray[np.str_],
        *,
        num_bootstrap: int,
        seed: int,
    ) -> Self:
        """Teach on a random half of the patients and ask about the others.

        Args:
            features_ND: Of real tiles of held-out patients.
            captions: Theirs.
            patients: Whose they are.
            num_bootstrap: Resamples of every interval.
            seed: Of the halves and the resamples.

        Raises:
            NotMeasurableError: too few patients or captions, or scikit-learn is not installed.
        """
        names, patient_N = np.unique(patients, return_inverse=True)
        if len(names) < _FEWEST_PATIENTS:
            raise NotMeasurableError(
                f"drift: needs {_FEWEST_PATIENTS} held-out patients, got {len(names)}"
            )
        rng = np.random.default_rng(seed)
        is_asked_P = half_of_patients(len(names), rng)
        taught_N, asked_N = (
            np.flatnonzero(rows_N).tolist()
            for rows_N in (~is_asked_P[patient_N], is_asked_P[patient_N])
        )
        for rows in (taught_N, asked_N):
            if len({captions[row] for row in rows}) < 2:
                raise NotMeasurableError(
                    "drift: needs held-out tiles with at least two different captions"
                )
        reader = _Reader.fit(features_ND[taught_N], [captions[row] for row in taught_N])
        asked_captions = [captions[row] for row in asked_N]
        own_N, wrong_N = _own_and_wrong(reader, features_ND[asked_N], asked_captions)
        asked_patient_N = np.unique(patient_N[asked_N], return_inverse=True)[1]
        gate = _gate(own_N, wrong_N, asked_patient_N, max(num_bootstrap, 200), rng)
        return cls(
            reader=reader,
            asked_patients=tuple(names[is_asked_P].tolist()),
            asked_captions=tuple(sorted(set(asked_captions))),
            patient_N=asked_patient_N,
            own_N=own_N,
            wrong_N=wrong_N,
            gate=gate,
            num_bootstrap=num_bootstrap,
            seed=seed,
        )

    def drift(
        self,
        features_ND: Features,
        prompts: Sequence[str],
        patients: npt.NDArray[np.str_],
        *,
        are_others: bool = False,
    ) -> tuple[float, Interval]:
        """D of images that were drawn from ``prompts``, one each, and its interval over patients.

        Only images of the patients that it was asked about count: of the others it knows the
        captions by heart. Of images from elsewhere those count that have a caption of theirs.

        Args:
            features_ND: Of the images, or of real tiles.
            prompts: What each was drawn from, or its caption.
            patients: Whose tile each is, or whose caption it was drawn from.
            are_others: Whether these are no held-out patients.

        Raises:
            NotMeasurableError: the examiner does not tell right from wrong, or no image counts.
        """
        if not self.gate.is_passed:
            raise NotMeasurableError(
                f"drift: not measurable here: real tiles score {self.gate.own:.3f} under their own "
                f"captions and {self.gate.wrong:.3f} under others'"
            )
        if are_others:
            rows = np.flatnonzero(np.isin(np.asarray(prompts), self.asked_captions))
            names = np.unique(patients[rows])
        else:
            rows = np.flatnonzero(np.isin(patients, self.asked_patients))
            names = np.asarray(self.asked_patients)
        if len(rows) == 0 or len(names) < 2:
            raise NotMeasurableError(
                "drift: too few images whose caption is one that held-out tiles have"
                if are_others
                else "drift: no image of a patient that the examiner is asked about"
            )
        marks_N = _own_marks(
            self.reader, features_ND[rows], [prompts[row] for row in rows.tolist()]
        )
        place_N = np.searchsorted(names, patients[rows])
        rng = np.random.default_rng(self.seed)
        resampled: list[float] = []
        while len(resampled) < self.num_bootstrap:
            weight_P = repeats(rng, len(self.asked_patients))
            weight_N = (repeats(rng, len(names)) if are_others else weight_P)[place_N]
            if weight_N.any():
                resampled.append(self._relative(marks_N, weight_N, weight_P))
        ones_P, ones_N = np.ones(len(self.asked_patients)), np.ones(len(rows))
        return self._relative(marks_N, ones_N, ones_P), interval_of(resampled)

    def _relative(self, marks_N: Vector, weight_N: Vector, weight_P: Vector) -> float:
        weight_M = weight_P[self.patient_N]
        own, wrong = (np.average(part, weights=weight_M) for part in (self.own_N, self.wrong_N))
        # A resample in which right and wrong meet says "no drift can be told", not infinity.
        scale = max(own - wrong, 1e-3)
        return float((own - np.average(marks_N, weights=weight_N)) / scale)


def _own_marks(reader: _Reader, features_ND: Features, captions: Sequence[str]) -> Vector:
    distinct = sorted(set(captions))
    marks_NU = reader.marks(features_ND, distinct)
    place_N = np.searchsorted(distinct, captions)
    own_N: Vector = marks_NU[np.arange(len(captions)), place_N]
    return own_N


def _own_and_wrong(
    reader: _Reader, features_ND: Features, captions: Sequence[str]
) -> tuple[Vector, Vector]:
    """Mark of each tile under its own caption, and its mean mark under all that differ."""
    distinct, place_N, count_U = np.unique(captions, return_inverse=True, return_counts=True)
    marks_NU = reader.marks(features_ND, [str(caption) for caption in distinct])
    own_N = marks_NU[np.arange(len(place_N)), place_N]
    others_N = len(place_N) - count_U[place_N]
    wrong_N = (marks_NU @ count_U - count_U[place_N] * own_N) / others_N
    return own_N, wrong_N


def _gate(
    own_N: Vector,
    wrong_N: Vector,
    patient_N: npt.NDArray[np.int64],
    num_bootstrap: int,
    rng: np.random.Generator,
) -> Gate:
    num_patients = int(patient_N.max()) + 1
    differences = [
        float(np.average(own_N - wrong_N, weights=repeats(rng, num_patients)[patient_N]))
        for _ in range(num_bootstrap)
    ]
    low, high = np.quantile(differences, _GATE)
    return Gate(
        own=float(own_N.mean()),
        wrong=float(wrong_N.mean()),
        difference_interval=Interval(float(low), float(high)),
        patients=num_patients,
    )
