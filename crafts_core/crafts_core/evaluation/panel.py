"""Judges, examiner and coverage of one comparison, taught once and asked about every row.

Letters: N images, M held-out tiles, T training tiles, D features.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import numpy as np

from crafts_core.evaluation.baselines import ArmImages
from crafts_core.evaluation.colour import colour_features, grey_levels, grey_structure
from crafts_core.evaluation.encoder import Features, Images
from crafts_core.evaluation.examiner import Examiner, Gate
from crafts_core.evaluation.extras import NotMeasurableError
from crafts_core.evaluation.fidelity import Reference, halves
from crafts_core.evaluation.judges import Judge, Sight, agreement, judged_classes
from crafts_core.evaluation.neighbours import measure_coverage
from crafts_core.evaluation.real_tiles import RealTiles

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
        *,
        num_bootstrap: int,
        seed: int,
    ) -> None:
        """Teach them.

        Args:
            held_out: Real tiles of patients that nobody trained on.
            training: Real tiles of patients that were trained on.
            reference: The held-out tiles in the encoder's features.
            embed: The encoder, at the tiles' scale.
            num_bootstrap: Resamples of every interval.
            seed: Of everything random.
        """
        self._reference = reference
        self._embed = embed
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

    def figures(self, arm: ArmImages, features_ND: Features) -> dict[str, Any]:
        """What is said of one row beside its distances, by the names of ``figures.Arm``."""
        seen_ND = {sight: self._seen(sight, arm.images_NHWC) for sight in _SIGHTS}
        found: dict[str, Any] = {}
        for sight, judge in self._judges.items():
            if judge is not None:
                found |= self._agreement(sight, judge, arm, seen_ND[sight])
        found |= self._drift(arm, seen_ND["shape"])
        return found | self._coverage(arm, features_ND)

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
        told = self._tried(
            lambda: agreement(
                judge.verdicts(seen_ND, arm.classes),
                arm.classes,
                classes=self.classes,
                patients=arm.patients,
                num_bootstrap=self._num_bootstrap,
                seed=self._seed,
            )
        )
        if told is None:
            return {}
        return {f"{sight}_agreement": told[0], f"{sight}_agreement_interval": told[1]}

    def _coverage(self, arm: ArmImages, features_ND: Features) -> dict[str, Any]:
        """Images of one half of the patients among real tiles of the other half, in every row."""
        reference = self._reference
        first, second = halves(reference.patient_M, np.random.default_rng(self._seed))
        is_first_N = np.isin(reference.places_of(arm.patients), reference.patient_M[first])
        images_ND = reference.scale(features_ND[is_first_N])
        told = self._tried(lambda: measure_coverage(reference.features_MD[second], images_ND))
        return {} if told is None else told.model_dump()

    def _drift(self, arm: ArmImages, seen_ND: Features) -> dict[str, Any]:
        examiner = self._examiner
        if examiner is None:
            return {}
        told = self._tried(lambda: examiner.drift(seen_ND, arm.captions, arm.patients))
        return {} if told is None else {"drift": told[0], "drift_interval": told[1]}

    def _tried(self, measure: Callable[[], T]) -> T | None:
        """What is measured, or None with the reason kept."""
        try:
            return measure()
        except NotMeasurableError as error:
            self._reasons[str(error)] = None
            return None
