"""Judges, examiner, aligner and coverage of one comparison, taught once, asked about every row.

Letters: N images, M held-out tiles, T training tiles, D features.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import numpy as np

from crafts_core.evaluation.alignment import Matcher, measure_alignment
from crafts_core.evaluation.baselines import ArmImages
from crafts_core.evaluation.colour import colour_features, grey_levels, grey_structure
from crafts_core.evaluation.encoder import Features, Images
from crafts_core.evaluation.examiner import Examiner, Gate
from crafts_core.evaluation.extras import NotMeasurableError
from crafts_core.evaluation.fidelity import Reference
from crafts_core.evaluation.judges import (
    Judge,
    Sight,
    agreement,
    agreement_by_class,
    judged_classes,
)
from crafts_core.evaluation.neighbours import coverage_intervals, measure_coverage
from crafts_core.evaluation.real_tiles import RealTiles
from crafts_core.evaluation.resampling import Rows, halves

_SIGHTS: tuple[Sight, ...] = ("shape", "colour")
T = TypeVar("T")
_NO_TRAINING = (
    "colour maps, class agreement: need real tiles of training patients "
    "(crafts evaluate --training)"
)


class Panel:
    """Whoever is asked about images beside the distances."""

    def __init__(
        self,
        held_out: RealTiles,
        training: RealTiles | None,
        reference: Reference,
        embed: Callable[[Images], Features],
        matcher: Matcher,
        *,
        num_images: int,
        num_bootstrap: int,
        seed: int,
    ) -> None:
        """Teach them.

        Args:
            held_out: Real tiles of patients that nobody trained on.
            training: Real tiles of patients that were trained on.
            reference: The held-out tiles in the encoder's features.
            embed: The encoder, at the tiles' scale.
            matcher: What sees images and captions.
            num_images: At most so many of a row are matched with their captions, and half as many
                looked for among real tiles: both depend on how many there are.
            num_bootstrap: Resamples of every interval.
            seed: Of everything random.
        """
        self._reference = reference
        self._embed, self._matcher, self._num_images = embed, matcher, num_images
        self._num_bootstrap, self._seed = num_bootstrap, seed
        self._reasons: dict[str, None] = {}
        self._judges: dict[Sight, Judge | None] = {}
        self.classes: tuple[str, ...] = ()
        if training is None:
            self._reasons[_NO_TRAINING] = None
        else:
            classes = judged_classes(training, held_out)
            for sight in _SIGHTS:
                self._judges[sight] = self._tried(partial(self._taught, sight, training, classes))
            if any(self._judges.values()):
                self.classes = classes
        self._examiner = self._tried(
            lambda: Examiner.teach(
                self._seen("shape", held_out.images_NHWC),
                held_out.captions,
                held_out.patients,
                num_bootstrap=num_bootstrap,
                seed=seed,
            )
        )

    @property
    def gate(self) -> Gate | None:
        return None if self._examiner is None else self._examiner.gate

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why figures are missing, each reason once."""
        return tuple(self._reasons)

    def leave_out(self, reason: str) -> None:
        """Keep why others leave something out, beside the panel's own reasons."""
        self._reasons[reason] = None

    def figures(self, arm: ArmImages, features_ND: Features) -> dict[str, Any]:
        """What is said of one row beside its distances, by the names of ``figures.Arm``."""
        seen_ND = {sight: self._seen(sight, arm.images_NHWC) for sight in _SIGHTS}
        found: dict[str, Any] = {}
        for sight, judge in self._judges.items():
            if judge is not None:
                found |= self._agreement(sight, judge, arm, seen_ND[sight])
        found |= self._drift(arm, seen_ND["shape"])
        return found | self._coverage(arm, features_ND) | self._alignment(arm)

    def _taught(self, sight: Sight, training: RealTiles, classes: tuple[str, ...]) -> Judge:
        """Shape is learnt from mirrored tiles, too; colour is the same in a mirror."""
        views = [training.images_NHWC]
        if sight == "shape":
            views += [views[0][:, ::-1], views[0].swapaxes(1, 2)]
        seen_TD = np.concatenate([self._seen(sight, view_NHWC) for view_NHWC in views])
        return Judge.train(sight, seen_TD, training.classes * len(views), classes)

    def _seen(self, sight: Sight, images_NHWC: Images) -> Features:
        if sight == "colour":
            return colour_features(images_NHWC)
        grey_NHWC = grey_structure(images_NHWC)
        return np.concatenate([self._embed(grey_NHWC), grey_levels(grey_NHWC)], axis=1)

    def _agreement(
        self, sight: Sight, judge: Judge, arm: ArmImages, seen_ND: Features
    ) -> dict[str, Any]:
        verdict_N = judge.verdicts(seen_ND, arm.classes)
        how: dict[str, Any] = {
            "classes": self.classes,
            "patients": arm.patients,
            "num_bootstrap": self._num_bootstrap,
            "seed": self._seed,
        }
        told = self._tried(lambda: agreement(verdict_N, arm.classes, **how))
        if told is None:
            return {}
        found = {f"{sight}_agreement": told[0], f"{sight}_agreement_interval": told[1]}
        if sight == "shape":
            found["shape_by_class"] = agreement_by_class(verdict_N, arm.classes, **how)
        return found

    def _coverage(self, arm: ArmImages, features_ND: Features) -> dict[str, Any]:
        """Images of one half of the patients among real tiles of the other half, in every row."""
        reference = self._reference
        rng = np.random.default_rng(self._seed)
        first, second = halves(reference.patient_M, rng)
        patient_N = reference.places_of(arm.patients, are_others=arm.are_others)
        if arm.are_others:
            rows = _some(len(patient_N), self._num_images // 2, rng)
        else:
            rows = np.flatnonzero(np.isin(patient_N, reference.patient_M[first]))
        real_MD, images_ND = reference.features_MD[second], reference.scale(features_ND[rows])

        def told() -> dict[str, Any]:
            found: dict[str, Any] = measure_coverage(real_MD, images_ND).model_dump()
            intervals = coverage_intervals(
                real_MD,
                images_ND,
                reference.patient_M[second],
                patient_N[rows],
                num_bootstrap=self._num_bootstrap,
                seed=self._seed,
            )
            return found | {f"{name}_interval": each for name, each in intervals.items()}

        return self._tried(told) or {}

    def _alignment(self, arm: ArmImages) -> dict[str, Any]:
        rows = _some(len(arm.captions), self._num_images, np.random.default_rng(self._seed))
        told = self._tried(
            lambda: measure_alignment(
                self._matcher,
                arm.images_NHWC[rows],
                [arm.captions[row] for row in rows.tolist()],
                np.unique(arm.patients[rows], return_inverse=True)[1],
                num_bootstrap=self._num_bootstrap,
                seed=self._seed,
            )
        )
        return {} if told is None else {"alignment": told}

    def _drift(self, arm: ArmImages, seen_ND: Features) -> dict[str, Any]:
        examiner = self._examiner
        if examiner is None:
            return {}
        told = self._tried(
            lambda: examiner.drift(seen_ND, arm.captions, arm.patients, are_others=arm.are_others)
        )
        return {} if told is None else {"drift": told[0], "drift_interval": told[1]}

    def _tried(self, measure: Callable[[], T]) -> T | None:
        """What is measured, or None with the reason kept."""
        try:
            return measure()
        except NotMeasurableError as error:
            self._reasons[str(error)] = None
            return None


def _some(count: int, most: int, rng: np.random.Generator) -> Rows:
    """Rows of all, or a random choice of so many."""
    rows: Rows = np.sort(rng.permutation(count)[:most])
    return rows
