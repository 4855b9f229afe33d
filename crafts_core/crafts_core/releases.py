"""What sites tell once, before training: where their tissue lies, and its colour.

Each release is a noised sum over patients of one short vector each, at most one long: a step of
patient-level DP-SGD from zero, whose loss is linear. This module says what a patient's vector is,
and what an aggregated sum means. It knows nothing of privacy: bounds and noise are the engine's.

*Anchors*: for each of the study's captions the mean of the patient's tile embeddings in the
aligner's frozen image space. Only directions are used, so no number of patients is told: how long
the sum is beside its noise says how well its direction is known.

*Colour*: mean and log standard deviation of the optical density of each colour, over the patient's
tiles, within wide public bounds; beside them a one, whose sum is the number of patients. A patient
far from the middle of the bounds is cut with that one, so it counts less and pulls nothing inwards.

Shape letters: B tiles, K classes, D embedding, V a patient's vector, Q numbers of colour, H W C.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from crafts_core.evaluation.colour import colour_statistics
from crafts_core.evaluation.encoder import Images
from crafts_core.foundation import Foundation
from crafts_core.plan import Plan
from crafts_core.plan_sections import RELEASES, Factor, ReleaseName
from crafts_core.state import State, release_name

ANCHORS, COLOUR = release_name("anchors"), release_name("colour")
NUM_COLOUR = 6
_COLOUR_LOW = np.array([0.0, 0.0, 0.0, -3.5, -3.5, -3.5])
_COLOUR_HIGH = np.array([1.6, 1.6, 1.6, 0.0, 0.0, 0.0])
"""Public tiles of open slides lie within 0.18 to 1.24, and -2.6 to -0.4."""
_COLOUR_LENGTH = 1.6
"""What a patient's numbers and its one are divided by: public tiles are 1.2 to 1.6 long, and a
length that nobody could pass (the root of seven) would be noise for nothing."""
LEAST_SIGNAL = 1.0
"""Of a direction: its sum's squared length without the noise, over that of the noise. Below one the
anchor would point more than 45 degrees away from where the tissue lies; noise alone, of 64 numbers,
comes as far four times in a million (ADR 14)."""
_LEAST_COUNT = 5.0
"""Of colour: the noised number of patients, over the deviation of its noise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoded:
    """What a release came to."""

    values: Tensor
    """In the shape that travels: anchors (K, D) of unit length, or colour (1, Q)."""
    signal: tuple[float, ...]
    """How far each row stands out of its noise, in the units of its limit."""
    is_public: tuple[bool, ...]
    """Rows that too few patients have; public data stands in for them."""


def release_schema(plan: Plan, foundation: Foundation) -> State:
    """What the plan's releases add to the state that travels, before anything is known: zeros."""
    shapes: dict[ReleaseName, tuple[int, int]] = {
        "anchors": (len(plan.study.captions), foundation.aligner.embedding_dim),
        "colour": (1, NUM_COLOUR + 1),
    }
    told = [name for name in RELEASES if name in {stage.name for stage in plan.releases}]
    return {release_name(name): torch.zeros(shapes[name]) for name in told}


def anchor_vector(embedding_BD: Tensor, class_B: Tensor, num_classes: int) -> Tensor:
    """One patient's (V,): for each class the mean of its tiles' embeddings, zero without any.

    A patient of several classes is cut as a whole, so it counts less in each.
    """
    member_KB = functional.one_hot(class_B + 1, num_classes + 1)[:, 1:].T.to(embedding_BD)
    mean_KD = member_KB @ embedding_BD / member_KB.sum(dim=1, keepdim=True).clamp(min=1.0)
    return mean_KD.flatten()


def colour_vector(images_BHWC: Images) -> Tensor:
    """One patient's (V,): one, then its numbers within the bounds; all zero without a tile."""
    if not len(images_BHWC):
        return torch.zeros(NUM_COLOUR + 1)
    scaled_Q = 2.0 * (_colour_of(images_BHWC) - _COLOUR_LOW) / (_COLOUR_HIGH - _COLOUR_LOW) - 1.0
    vector_V = np.concatenate([[1.0], scaled_Q.clip(-1.0, 1.0)]) / _COLOUR_LENGTH
    return torch.from_numpy(vector_V).float()


def decoded(
    factor: Factor, mean: Tensor, noise_std: float, foundation: Foundation, plan: Plan
) -> Decoded:
    """What the aggregated release ``mean`` says, whose every number has noise of that deviation.

    Post-processing of noised sums.
    """
    if factor == "colour":
        return decoded_colour(mean, noise_std, foundation)
    text_KD = foundation.aligner.embed_captions(list(plan.study.captions)).cpu()
    return decoded_anchors(mean, noise_std, text_KD)


def decoded_anchors(mean_KD: Tensor, noise_std: float, text_KD: Tensor) -> Decoded:
    """Unit anchors; the text's embedding where the noise is longer than the tissue's part."""
    noise_power = max(noise_std, torch.finfo(torch.float32).tiny) ** 2 * mean_KD.shape[1]
    signal_K = mean_KD.double().square().sum(dim=1) / noise_power - 1.0
    is_public_K = ~(signal_K >= LEAST_SIGNAL)
    values_KD = torch.where(is_public_K[:, None], text_KD, functional.normalize(mean_KD, dim=1))
    return Decoded(
        values=values_KD.float(),
        signal=tuple(signal_K.tolist()),
        is_public=tuple(is_public_K.tolist()),
    )


def decoded_colour(mean_1V: Tensor, noise_std: float, foundation: Foundation) -> Decoded:
    """One and the six numbers of colour; those of the foundation's probe where nobody shows."""
    count, scaled_Q = float(mean_1V[0, 0]), mean_1V[0, 1:].double().numpy()
    signal = count / max(noise_std, torch.finfo(torch.float32).tiny)
    is_public = not signal >= _LEAST_COUNT  # NaN must not pass
    if not is_public:
        unit_Q = (scaled_Q / count).clip(-1.0, 1.0) / 2.0 + 0.5
        colour_Q = _COLOUR_LOW + unit_Q * (_COLOUR_HIGH - _COLOUR_LOW)
    else:
        colour_Q = _colour_of(foundation.probe.tiles_NCHW.permute(0, 2, 3, 1).numpy())
    return Decoded(
        values=torch.from_numpy(np.concatenate([[1.0], colour_Q])[None]).float(),
        signal=(signal,),
        is_public=(is_public,),
    )


def class_anchors(
    foundation: Foundation, captions: tuple[str, ...], state: Mapping[str, Tensor]
) -> Tensor:
    """What stage alignment contrasts, (K, D) of unit length: as released, or the captions' text."""
    if ANCHORS not in state:
        return foundation.aligner.embed_captions(list(captions))
    return functional.normalize(state[ANCHORS].to(foundation.device), dim=1)


def _colour_of(images_BHWC: Images) -> npt.NDArray[np.float64]:
    """Of all pixels of some tiles together."""
    count, height, width, _ = images_BHWC.shape
    numbers_1Q = colour_statistics(images_BHWC.reshape(1, count * height, width, 3))
    return numbers_1Q.reshape(NUM_COLOUR)
