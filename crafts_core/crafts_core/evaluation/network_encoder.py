"""An encoder that is somebody's trained network: images of one size in, one row of numbers out.

Shape letters: N images, C H W channels and pixels, D features.
"""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from crafts_core.evaluation.encoder import (
    Encoder,
    EncoderError,
    Features,
    Images,
    resized,
    to_tensor,
)
from crafts_core.foundation_manifest import sha256_of

_BATCH = 64
_Positive = Annotated[float, Field(gt=0)]


class Preparation(BaseModel):
    """How images are made ready for a network. Pixels are 0 to 1 before ``mean`` and ``std``."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    input_px: Annotated[int, Field(ge=32, le=4096)]
    mean: tuple[float, float, float]
    std: tuple[_Positive, _Positive, _Positive]


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkEncoder:
    """A frozen network behind its preparation; whole images are brought to ``input_px``."""

    name: str
    hash: str
    preparation: Preparation
    network: Callable[[Tensor], Tensor]
    """Prepared images (N, C, H, W) to features (N, D)."""
    mpp: float | None = None
    is_clip: bool = False
    """Whether it was trained with text, as CLIP is."""

    @property
    def input_px(self) -> int:
        return self.preparation.input_px

    @torch.no_grad()
    def embed(self, images_NHWC: Images, *, mpp: float) -> Features:  # noqa: ARG002
        """Features (N, D) of images of any scale.

        Raises:
            ValueError: not uint8 RGB images, or smaller than 32 pixels.
            EncoderError: the network gives no row of finite numbers for each image.
        """
        parts = [self._features(part) for part in to_tensor(images_NHWC).split(_BATCH)]
        return np.concatenate(parts)

    def _features(self, images_NCHW: Tensor) -> Features:
        mean_C11, std_C11 = (
            torch.tensor(each)[:, None, None]
            for each in (self.preparation.mean, self.preparation.std)
        )
        unit_NCHW = resized(images_NCHW.float() / 255.0, self.input_px, self.input_px)
        found = self.network((unit_NCHW - mean_C11) / std_C11)
        is_rows = isinstance(found, Tensor) and found.ndim == 2 and len(found) == len(images_NCHW)
        if not is_rows or not bool(found.isfinite().all()):
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise EncoderError(
                f"{self.name}: expected a row of finite numbers for each of {len(images_NCHW)} "
                f"images, got {shape}"
            )
        features: Features = found.double().numpy()
        return features


def identity(weights: Iterable[Path], *prepared_by: str) -> str:
    """SHA-256 over the hashes of the weights' files, in order, and what else decides features."""
    parts = [*(sha256_of(path) for path in weights), *prepared_by]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def is_clip(encoder: Encoder) -> bool:
    """Whether an encoder was trained with text, as CLIP is."""
    return isinstance(encoder, NetworkEncoder) and encoder.is_clip
