"""Judges: does an image show the class that its caption asks for?

A judge is a small classifier that learns from real tiles of *training* patients and is asked about
held-out ones, about their reconstructions by the VAE (what nobody with this VAE can pass) and about
generated images. One judges *shape*: it sees tiles in grey, so no stain can please it. The other
judges *colour*: it sees statistics of a tile's colours and no arrangement at all. A generator that
wins only the second has learnt to stain.

Letters: N images, D features, K classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from crafts_core.evaluation.encoder import Features
from crafts_core.evaluation.extras import NotMeasurableError, scikit_learn
from crafts_core.evaluation.real_tiles import RealTiles
from crafts_core.evaluation.resampling import Interval, Vector, interval_of, mean_interval, repeats

Sight = Literal["shape", "colour"]
"""What a judge goes by."""
Verdicts = npt.NDArray[np.bool_]
_FEWEST_PATIENTS = 2
_INVERSE_PENALTY: dict[Sight, float] = {"shape": 0.1, "colour": 10.0}
"""An encoder has many features that repeat each other; colour has few."""
_MOST_ITERATIONS = 2000
_WEIGHTS = ("standardscaler__sample_weight", "logisticregression__sample_weight")


def judged_classes(training: RealTiles, held_out: RealTiles) -> tuple[str, ...]:
    """Classes with at least two patients on each side: of one, a judge learns the patient."""
    shared = set.intersection(
        *(
            {
                name
                for name in set(side.classes) - {""}
                if _num_patients(side, name) >= _FEWEST_PATIENTS
            }
            for side in (training, held_out)
        )
    )
    return tuple(sorted(shared))


def _num_patients(tiles: RealTiles, name: str) -> int:
    return len(set(tiles.patients[np.asarray(tiles.classes) == name].tolist()))


@dataclass(frozen=True, slots=True)
class Judge:
    """A classifier of features."""

    classes: tuple[str, ...]
    model: Any

    @classmethod
    def train(
        cls,
        sight: Sight,
        features_ND: Features,
        labels: Sequence[str],
        classes: tuple[str, ...],
        weight_N: Vector | None = None,
    ) -> Self:
        """Learn ``classes`` from the features of training tiles; others are left out.

        Args:
            sight: What the judge goes by.
            features_ND: Of the tiles.
            labels: What each shows.
            classes: Those to learn.
            weight_N: How much each counts; all the same if None.

        Raises:
            NotMeasurableError: there are fewer than two classes, or scikit-learn is not installed.
        """
        if len(classes) < 2:
            raise NotMeasurableError(
                "class agreement: needs two classes (labels, or captions) with at least two "
                "training and two held-out patients each"
            )
        learn = scikit_learn("class agreement")
        rows = np.flatnonzero(np.isin(labels, classes))
        model = learn.pipeline.make_pipeline(
            learn.preprocessing.StandardScaler(),
            learn.linear_model.LogisticRegression(
                C=_INVERSE_PENALTY[sight], max_iter=_MOST_ITERATIONS
            ),
        )
        # The scale too: few real tiles beside many images would be put on the images' scale.
        weights = {} if weight_N is None else dict.fromkeys(_WEIGHTS, weight_N[rows])
        return cls(classes, model.fit(features_ND[rows], np.asarray(labels)[rows], **weights))

    def verdicts(self, features_ND: Features, labels: Sequence[str]) -> Verdicts:
        """Whether each image is taken for what its label says."""
        found: Verdicts = self.model.predict(features_ND) == np.asarray(labels)
        return found


class ClassShare(NamedTuple):
    """Share of one class's images in which it is found."""

    share: float
    interval: Interval | None
    """None where all images are of one patient's captions."""


def agreement_by_class(
    is_right_N: Verdicts,
    labels: Sequence[str],
    *,
    classes: Sequence[str],
    patients: npt.NDArray[np.str_],
    num_bootstrap: int,
    seed: int,
) -> dict[str, ClassShare]:
    """What ``agreement`` is the mean of: the same arguments. A class without images is left out."""
    label_N, patient_N = np.asarray(labels), np.unique(patients, return_inverse=True)[1]
    found = {}
    for name in classes:
        rows = np.flatnonzero(label_N == name)
        if len(rows):
            interval = mean_interval(
                is_right_N[rows], patient_N[rows], num_bootstrap=num_bootstrap, seed=seed
            )
            found[name] = ClassShare(float(is_right_N[rows].mean()), interval)
    return found


def agreement(
    is_right_N: Verdicts,
    labels: Sequence[str],
    *,
    classes: Sequence[str],
    patients: npt.NDArray[np.str_],
    num_bootstrap: int,
    seed: int,
) -> tuple[float, Interval]:
    """Balanced accuracy over ``classes``: the mean of each class's share of right verdicts.

    Args:
        is_right_N: The verdicts.
        labels: What each image should show.
        classes: Those that the judge knows; other images do not count.
        patients: Whose tile each is, or whose caption it was drawn from.
        num_bootstrap: Resamples.
        seed: Of them.

    Raises:
        NotMeasurableError: no image is of a class that the judge knows.
    """
    place_of = {name: place for place, name in enumerate(classes)}
    known = np.asarray([label in place_of for label in labels])
    if not known.any():
        raise NotMeasurableError("class agreement: no image shows a class that the judge knows")
    class_N = np.asarray([place_of[label] for label in np.asarray(labels)[known]])
    patient_N = np.unique(patients[known], return_inverse=True)[1]
    right_N = is_right_N[known].astype(np.float64)
    num_patients = int(patient_N.max()) + 1

    def balanced(weight_N: npt.NDArray[np.float64]) -> float:
        all_K = np.bincount(class_N, weights=weight_N, minlength=len(classes))
        right_K = np.bincount(class_N, weights=weight_N * right_N, minlength=len(classes))
        return float((right_K[all_K > 0] / all_K[all_K > 0]).mean())

    rng = np.random.default_rng(seed)
    resampled = [
        balanced(
            repeats(rng, num_patients)[patient_N] if num_patients > 1 else np.ones(len(patient_N))
        )
        for _ in range(num_bootstrap)
    ]
    return balanced(np.ones(len(patient_N))), interval_of(resampled)
