"""Does an image show what its prompt says? Drift on the prompt bank, and the rank of its type.

Drift is ``D = 1 - mean r(profile of the generated image, profile of its prompt)`` over the public
prompt bank (design section 6). The rank asks which of the 30 cancer types the frozen aligner would
name first for the image: 1 is right, 15.5 is chance.

Shape letters: N images, D embedding, K anchors, T types.
"""

from collections.abc import Sequence

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from crafts_core.aligner import pearson, profile
from crafts_core.evaluation.encoder import Images
from crafts_core.foundation import Foundation
from crafts_core.vocabulary import Prompt


class PromptAgreement(BaseModel):
    """How images of the prompt bank agree with their prompts."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    n: int
    drift: float
    """D in [0, 2]; 0 is perfect agreement."""
    mean_rank: float
    """Mean rank of the right cancer type among all types of the bank."""
    top5: float
    """Share of images whose type is among the five best."""


def prompt_agreement(
    foundation: Foundation, images_NHWC: Images, prompts: Sequence[Prompt]
) -> PromptAgreement:
    """Drift and ranks of images that were drawn from ``prompts``, one each.

    Raises:
        ValueError: images and prompts differ in number.
    """
    if len(images_NHWC) != len(prompts):
        raise ValueError(f"expected {len(prompts)} images, got {len(images_NHWC)}")
    aligner, anchors_KD = foundation.aligner, foundation.anchors_KD
    pixels = torch.from_numpy(np.ascontiguousarray(images_NHWC)).permute(0, 3, 1, 2)
    images_ND = torch.cat([aligner.embed_images(part) for part in pixels.split(128)])
    captions_ND = aligner.embed_captions([prompt.text for prompt in prompts])
    r_N = pearson(profile(images_ND, anchors_KD), profile(captions_ND, anchors_KD))
    rank_N = type_ranks(images_ND @ _type_directions(foundation).T, _codes(foundation), prompts)
    return PromptAgreement(
        n=len(prompts),
        drift=float(1.0 - r_N.mean()),
        mean_rank=float(rank_N.double().mean()),
        top5=float((rank_N <= 5).double().mean()),
    )


def type_ranks(score_NT: Tensor, codes: Sequence[str], prompts: Sequence[Prompt]) -> Tensor:
    """Rank (1 is best) of each prompt's own type in its image's scores; ties count against it."""
    own_N = torch.tensor([codes.index(prompt.cancer_code) for prompt in prompts])
    own_score_N1 = score_NT.gather(1, own_N[:, None].to(score_NT.device))
    return (score_NT >= own_score_N1).sum(dim=1)


def _codes(foundation: Foundation) -> list[str]:
    return sorted({prompt.cancer_code for prompt in foundation.prompt_bank})


def _type_directions(foundation: Foundation) -> Tensor:
    """Mean caption embedding of each type, (T, D), in the order of the codes."""
    members = [
        [i for i, prompt in enumerate(foundation.prompt_bank) if prompt.cancer_code == code]
        for code in _codes(foundation)
    ]
    return torch.stack([foundation.anchors_KD[rows].mean(dim=0) for rows in members])
