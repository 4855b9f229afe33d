"""Finds nuclei again: is what is drawn from a mask what the mask says, nucleus by nucleus?

A pixel classifier in the manner of ilastik (Berg et al. 2019): each pixel is described by its
densities of stain, smoothed, and by their edges and blobs at several scales, in units of its own
tile, so that no stain is an advantage; gradient-boosted trees learn from real tiles with masks
whether it lies in a nucleus. One finder looks at the tiles of every arm, the real ones included:
what it makes of those is the most that anybody can have.

Letters: N tiles, C centres (or channels), H W pixels, P pixels in one row, F features.
"""

from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict
from scipy import ndimage
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

from crafts_core.evaluation.encoder import Images
from crafts_core.evaluation.extras import scikit_learn
from crafts_core.evaluation.resampling import Interval, Patients, mean_interval
from crafts_core.stains import stain_amounts

Floats = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
_SCALES_PX = (1.0, 2.0, 4.0, 8.0)
_PIXELS_A_TILE = 600
_MATCHED_PX = 4.0
"""A centre lies at most so far from the nucleus's own: 4 microns at the foundation's scale, about
the radius of a nucleus."""
_SMALLEST_PX = 6
"""What is found of fewer pixels is no nucleus."""
_FIGURES = ("dice", "found_again", "count_error")
_SMOOTH_PX, _PEAK_PX = 1.5, 7
"""How far depths are smoothed, and the side of the window in which one is a nucleus's deepest."""


class Found(BaseModel):
    """Means over tiles of what a finder sees in them, against masks; 90 % intervals by patient."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    dice: float
    """Of pixels in nuclei."""
    dice_interval: Interval | None
    found_again: float
    """F1 of centres: of the mask's nuclei and of the image's, at most 4 px apart, one to one."""
    found_again_interval: Interval | None
    count_error: float
    """Mean difference of the numbers of nuclei, either way, over their mean number in a mask."""
    count_error_interval: Interval | None


@dataclass(frozen=True, slots=True)
class NucleiFinder:
    """A classifier of pixels."""

    model: Any

    @classmethod
    def teach(cls, images_NHWC: Images, foreground_NHW: Mask, *, seed: int) -> Self:
        """Learn from real tiles whose nuclei are marked.

        Raises:
            ValueError: no pixel that is looked at, or every one, lies in a nucleus.
            NotMeasurableError: scikit-learn is not installed.
        """
        learn = scikit_learn("nuclei found again")
        rng = np.random.default_rng(seed)
        rows, marks = [], []
        for image_HWC, inside_HW in zip(images_NHWC, foreground_NHW, strict=True):
            some = rng.choice(inside_HW.size, min(_PIXELS_A_TILE, inside_HW.size), replace=False)
            rows.append(pixel_features(image_HWC)[some])
            marks.append(inside_HW.ravel()[some])
        mark_P = np.concatenate(marks)
        if mark_P.all() or not mark_P.any():
            raise ValueError("expected tiles with nuclei and with something else")
        model = learn.ensemble.HistGradientBoostingClassifier(random_state=seed)
        return cls(model.fit(np.concatenate(rows), mark_P))

    def nuclei(self, image_HWC: Images) -> Mask:
        """Where it sees nuclei, (H, W)."""
        chance_P = self.model.predict_proba(pixel_features(image_HWC))[:, 1]
        smooth_HW = ndimage.gaussian_filter(chance_P.reshape(image_HWC.shape[:2]), 1.0)
        pieces_HW, count = ndimage.label(smooth_HW > 0.5)
        sizes = np.bincount(pieces_HW.ravel(), minlength=count + 1)
        keeps = sizes >= _SMALLEST_PX
        keeps[0] = False
        inside_HW: Mask = keeps[pieces_HW]
        return inside_HW

    def see(self, images_NHWC: Images) -> Mask:
        """Where it sees nuclei in each, (N, H, W)."""
        return np.stack([self.nuclei(image_HWC) for image_HWC in images_NHWC])


def compared(
    seen_NHW: Mask,
    condition_NCHW: Floats,
    patient_N: Patients,
    *,
    num_bootstrap: int = 500,
    seed: int = 0,
) -> Found:
    """Nuclei that are seen in images, against their conditions of nuclei.

    Masks without a nucleus do not count.

    Raises:
        ValueError: no mask has a nucleus.
    """
    own = [centres_of_condition(each_CHW) for each_CHW in condition_NCHW]
    rows = [row for row, centres_C in enumerate(own) if len(centres_C)]
    if not rows:
        raise ValueError("no mask has a nucleus")
    mean_count = sum(len(own[row]) for row in rows) / len(rows)
    told = []
    for row in rows:
        seen_HW, inside_HW, own_C = seen_NHW[row], condition_NCHW[row, 0] > 0.5, own[row]
        seen_C = centres_of_foreground(seen_HW)
        both = int((seen_HW & inside_HW).sum())
        dice = 2 * both / (int(seen_HW.sum()) + int(inside_HW.sum()))
        f1 = 2 * num_matched(own_C, seen_C) / (len(own_C) + len(seen_C))
        told.append((dice, f1, abs(len(seen_C) - len(own_C)) / mean_count))
    values: dict[str, Any] = {}
    for name, value_N in zip(_FIGURES, np.transpose(told), strict=True):
        values[name] = float(value_N.mean())
        values[f"{name}_interval"] = mean_interval(
            value_N, patient_N[rows], num_bootstrap=num_bootstrap, seed=seed
        )
    return Found(**values)


def pixel_features(image_HWC: Images) -> Floats:
    """(P, F): each stain at each scale with its edges and blobs, in deviations of the tile."""
    stain_HWS = stain_amounts(image_HWC.astype(np.float64))[..., :2]
    flat_HWS = (stain_HWS - stain_HWS.mean((0, 1))) / (stain_HWS.std((0, 1)) + 1e-6)
    features = []
    for stain_HW in np.moveaxis(flat_HWS, -1, 0):
        features.append(stain_HW)
        for scale in _SCALES_PX:
            features.append(ndimage.gaussian_filter(stain_HW, scale))
            features.append(ndimage.gaussian_gradient_magnitude(stain_HW, scale) * scale)
            features.append(ndimage.gaussian_laplace(stain_HW, scale) * scale**2)
    rows_PF: Floats = np.stack([each.ravel() for each in features], axis=1).astype(np.float32)
    return rows_PF


def centres_of_foreground(inside_HW: Mask) -> Floats:
    """(C, 2): the deepest places of a mask, which is one of each nucleus though they touch."""
    deep_HW = ndimage.gaussian_filter(ndimage.distance_transform_edt(inside_HW), _SMOOTH_PX)
    highest_HW = ndimage.maximum_filter(deep_HW, _PEAK_PX)
    return _middles(inside_HW & (deep_HW == highest_HW), touching=8)


def centres_of_condition(condition_CHW: Floats) -> Floats:
    """(C, 2): the middle of each nucleus of a condition (foreground, boundary, distance).

    Its inside is what is left without the boundary, which parts nuclei that touch; of one that is
    all boundary nothing is left, and its foreground stands for it.
    """
    inside_HW = condition_CHW[0] > 0.5
    core_HW = inside_HW & (condition_CHW[1] < 0.5)
    pieces_HW, count = ndimage.label(inside_HW, structure=np.ones((3, 3)))
    has_core = np.zeros(count + 1, dtype=bool)
    has_core[np.unique(pieces_HW[core_HW])] = True
    without_HW = inside_HW & ~has_core[pieces_HW]
    return np.concatenate([_middles(core_HW, touching=4), _middles(without_HW, touching=8)])


def num_matched(first_C: Floats, second_C: Floats, most_px: float = _MATCHED_PX) -> int:
    """The most pairs, one to one, that lie at most ``most_px`` apart."""
    if not len(first_C) or not len(second_C):
        return 0
    near = cdist(first_C, second_C) <= most_px
    rows, columns = linear_sum_assignment(near, maximize=True)
    return int(near[rows, columns].sum())


def _middles(marked_HW: Mask, *, touching: Literal[4, 8]) -> Floats:
    """Of each piece of marked pixels, which hang together by so many neighbours."""
    structure = ndimage.generate_binary_structure(2, 1 if touching == 4 else 2)
    pieces_HW, count = ndimage.label(marked_HW, structure=structure)
    places = ndimage.center_of_mass(marked_HW, pieces_HW, range(1, count + 1))
    middles_C: Floats = np.asarray(places, dtype=np.float32).reshape(-1, 2)
    return middles_C
