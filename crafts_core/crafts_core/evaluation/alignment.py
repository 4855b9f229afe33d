"""Does an image say what its caption says? Asked of the foundation's image-text aligner.

*Correlation*: an image and a caption are each told by how they agree with the captions of the
public prompt bank (their profiles), and two profiles by Pearson's correlation. Beside it stands
what an image scores under the other captions. *Retrieval*: is an image's own caption among the
nearest k of all distinct captions, and is one of the nearest k images of a caption one that has it?
Beside it stands what chance gives.

The stage of alignment trains towards this aligner: a generator may learn to please it. The examiner
of drift is the one that no training saw.

Letters: N images, U distinct captions, K anchors, D embedding.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from scipy import stats

from crafts_core.aligner import Aligner
from crafts_core.evaluation.encoder import Features, Images, unit_rows
from crafts_core.evaluation.extras import NotMeasurableError
from crafts_core.evaluation.resampling import Interval, Patients, Vector, mean_interval
from crafts_core.foundation import Foundation
from crafts_core.pixels import channels_first

RANKS = (1, 5, 10)
_BATCH = 64


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Recall(_Record):
    """How often the right one is among the nearest ``k``."""

    k: int
    share: float
    interval: Interval | None
    chance: float


class Alignment(_Record):
    """Images and their captions, as the aligner sees them."""

    images: int
    captions: int
    """Distinct."""
    correlation: float
    """Of an image's profile with its own caption's, mean over the images."""
    correlation_interval: Interval | None
    correlation_chance: float
    """With the other captions'."""
    image_to_text: tuple[Recall, ...]
    text_to_image: tuple[Recall, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Matcher:
    """A foundation's aligner and anchors."""

    aligner: Aligner
    anchors_KD: torch.Tensor

    @classmethod
    def of(cls, foundation: Foundation) -> Self:
        return cls(aligner=foundation.aligner, anchors_KD=foundation.anchors_KD)

    def embed(self, images_NHWC: Images, captions: Sequence[str]) -> tuple[Features, Features]:
        """Unit embeddings of images (N, D) and captions (U, D)."""
        images_NCHW = channels_first(images_NHWC)
        image_ND = torch.cat([self.aligner.embed_images(x) for x in images_NCHW.split(_BATCH)])
        starts = range(0, len(captions), _BATCH)
        text_UD = torch.cat(
            [self.aligner.embed_captions(list(captions[i : i + _BATCH])) for i in starts]
        )
        return _numpy(image_ND), _numpy(text_UD)

    def correlations(self, image_ND: Features, text_UD: Features) -> Features:
        """Pearson correlation (N, U) of every image's profile with every caption's."""
        anchors_KD = _numpy(self.anchors_KD)
        image_NK, text_UK = (_standard(each @ anchors_KD.T) for each in (image_ND, text_UD))
        correlation_NU: Features = image_NK @ text_UK.T
        return correlation_NU


def measure_alignment(
    matcher: Matcher,
    images_NHWC: Images,
    captions: Sequence[str],
    patient_N: Patients,
    *,
    num_bootstrap: int,
    seed: int,
) -> Alignment:
    """How well images and their captions find each other.

    Args:
        matcher: What sees both.
        images_NHWC: The images.
        captions: What each was drawn from, or says.
        patient_N: Whose each is: they are resampled; the other images and captions stay.
        num_bootstrap: Resamples.
        seed: Of them.

    Raises:
        NotMeasurableError: fewer than two distinct captions.
    """
    distinct, place_N = np.unique(np.asarray(captions), return_inverse=True)
    if len(distinct) < 2 or "" in distinct:
        raise NotMeasurableError("alignment: needs images with at least two different captions")
    image_ND, text_UD = matcher.embed(images_NHWC, [str(caption) for caption in distinct])

    def interval(value_N: Vector) -> Interval | None:
        return mean_interval(value_N, patient_N, num_bootstrap=num_bootstrap, seed=seed)

    correlation_NU = matcher.correlations(image_ND, text_UD)
    own_N = correlation_NU[np.arange(len(place_N)), place_N]
    others_N = (correlation_NU.sum(axis=1) - own_N) / (len(distinct) - 1)
    cosine_NU = image_ND @ text_UD.T
    return Alignment(
        images=len(image_ND),
        captions=len(distinct),
        correlation=float(own_N.mean()),
        correlation_interval=interval(own_N),
        correlation_chance=float(others_N.mean()),
        image_to_text=_recalls(*caption_ranks(cosine_NU, place_N), len(distinct), interval),
        text_to_image=_recalls(*image_ranks(cosine_NU, place_N), len(image_ND), interval),
    )


def caption_ranks(cosine_NU: Features, place_N: Patients) -> tuple[Vector, Vector]:
    """Rank from 0 of each image's own caption among all; and how many captions are right."""
    rows_N = np.arange(len(place_N))
    others_NU = cosine_NU.copy()
    others_NU[rows_N, place_N] = -np.inf
    return _rank(others_NU, cosine_NU[rows_N, place_N]), np.ones(len(place_N))


def image_ranks(cosine_NU: Features, place_N: Patients) -> tuple[Vector, Vector]:
    """For the caption of each image, the rank of the best image that has it; and how many have."""
    is_of_UN = place_N == np.arange(cosine_NU.shape[1])[:, None]
    best_U = np.where(is_of_UN, cosine_NU.T, -np.inf).max(axis=1)
    rank_U = _rank(np.where(is_of_UN, -np.inf, cosine_NU.T), best_U)
    return rank_U[place_N], is_of_UN.sum(axis=1)[place_N].astype(np.float64)


def _rank(wrong_QG: Features, right_Q: Vector) -> Vector:
    """How many wrong ones score at least as high: what tells nothing apart finds nothing."""
    rank_Q: Vector = (wrong_QG >= right_Q[:, None]).sum(axis=1).astype(np.float64)
    return rank_Q


def _recalls(
    rank_Q: Vector, right_Q: Vector, gallery: int, interval: Callable[[Vector], Interval | None]
) -> tuple[Recall, ...]:
    """R@k for each k below the number of those that are asked for."""
    found = []
    for k in (k for k in RANKS if k < gallery):
        is_hit_Q = (rank_Q < k).astype(np.float64)
        found.append(
            Recall(
                k=k,
                share=float(is_hit_Q.mean()),
                interval=interval(is_hit_Q),
                chance=chance_of_recall(right_Q, gallery, k),
            )
        )
    return tuple(found)


def chance_of_recall(right_Q: Vector, gallery: int, k: int) -> float:
    """R@k of who draws k of a gallery at random, in which ``right_Q`` are right for each query."""
    none_Q = stats.hypergeom.pmf(0, gallery, right_Q.astype(int), k)
    return float(1.0 - none_Q.mean())


def _numpy(tensor: torch.Tensor) -> Features:
    return tensor.cpu().double().numpy()


def _standard(rows: Features) -> Features:
    """Rows of mean 0 and length 1, so that products are correlations; a constant row is 0."""
    return unit_rows(rows - rows.mean(axis=1, keepdims=True))
