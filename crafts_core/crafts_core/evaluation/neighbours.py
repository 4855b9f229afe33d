"""Do images cover what is real?

Precision and recall (Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020) come from
the library ``prdc``; they ask whether images lie among the real tiles, and whether every kind of
real tile has an image near it. They depend on the numbers of images and tiles.

Letters: N generated images, M real tiles, D features.
"""

import contextlib
import io

import numpy as np
from pydantic import BaseModel, ConfigDict

from crafts_core.evaluation.encoder import Features
from crafts_core.evaluation.extras import NotMeasurableError, optional
from crafts_core.evaluation.resampling import Interval, Patients, mean_interval

NEAREST = 5
"""Which neighbour decides how far a tile's surroundings reach."""


class Coverage(BaseModel):
    """How images and real tiles lie among each other."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    precision: float
    """Share of images that lie in the surroundings of a real tile."""
    recall: float
    """Share of real tiles that lie in the surroundings of an image."""
    density: float
    """In how many surroundings of real tiles an image lies, over ``NEAREST``; about 1 for real."""
    coverage: float
    """Share of real tiles with an image in their surroundings."""


def measure_coverage(real_MD: Features, images_ND: Features) -> Coverage:
    """The four numbers.

    Raises:
        NotMeasurableError: ``prdc`` is not installed, or there are too few images or tiles.
    """
    library = optional("prdc", "precision, recall, density, coverage")
    if min(len(real_MD), len(images_ND)) < NEAREST + 2:
        raise NotMeasurableError(
            f"precision, recall, density, coverage: need {NEAREST + 2} images and tiles"
        )
    with contextlib.redirect_stdout(io.StringIO()):  # it prints the two counts
        found = library.compute_prdc(real_MD, images_ND, nearest_k=NEAREST)
    return Coverage.model_validate({name: float(value) for name, value in found.items()})


def coverage_intervals(
    real_MD: Features,
    images_ND: Features,
    patient_M: Patients,
    patient_N: Patients,
    *,
    num_bootstrap: int,
    seed: int,
) -> dict[str, Interval | None]:
    """90 % bootstrap intervals of the four numbers, by the names of ``Coverage``.

    Precision and density are means over images, recall and coverage over real tiles; their patients
    are drawn, the other side and all surroundings stay. Drawn twice, a tile would have itself as
    its nearest neighbour.

    Raises:
        NotMeasurableError: ``prdc`` is not installed.
    """
    library = optional("prdc.prdc", "precision, recall, density, coverage")
    radius_M, radius_N = (
        library.compute_nearest_neighbour_distances(each, NEAREST) for each in (real_MD, images_ND)
    )
    distance_MN = library.compute_pairwise_distance(real_MD, images_ND)
    is_near_real_MN = distance_MN < radius_M[:, None]
    of_images = {
        "precision": is_near_real_MN.any(axis=0),
        "density": is_near_real_MN.sum(axis=0) / NEAREST,
    }
    of_real = {
        "recall": (distance_MN < radius_N).any(axis=1),
        "coverage": is_near_real_MN.any(axis=1),
    }
    return {
        name: mean_interval(np.asarray(values), patients, num_bootstrap=num_bootstrap, seed=seed)
        for rows, patients in ((of_images, patient_N), (of_real, patient_M))
        for name, values in rows.items()
    }
