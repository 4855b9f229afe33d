"""The embedded encoder: sees the structure of tissue, hardly its stain.

Its network (``tissue_network``) was trained on open tiles (``tissue_training``); weights, sources
and licences lie in ``assets/encoders/tissue``.

Shape letters: N images, C H W channels and pixels, D features.
"""

from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path

import numpy as np
import torch

from crafts_core.evaluation.encoder import (
    SMALLEST_PX,
    Features,
    Images,
    resized,
    to_tensor,
)
from crafts_core.evaluation.tissue_network import TissueNetwork
from crafts_core.foundation_manifest import sha256_of
from crafts_core.pretrained import fill, read_weights

WEIGHTS = "tissue.safetensors"
_BATCH = 64


@dataclass(frozen=True)
class TissueEncoder:
    """Means over the image of what the network's last three stages find; 312 features."""

    path: Path
    """Of the weights."""
    name: str = "embedded-tissue-312"
    input_px: int = 128
    mpp: float | None = 1.0

    @classmethod
    def embedded(cls) -> "TissueEncoder":
        """With the weights in this package."""
        package = resources.files("crafts_core") / "assets" / "encoders" / "tissue"
        return cls(path=Path(str(package)) / WEIGHTS)

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the weights' file."""
        return sha256_of(self.path)

    @cached_property
    def network(self) -> TissueNetwork:
        """Half-precision weights, widened.

        Raises:
            FoundationError: the file is missing, damaged or of another network.
        """
        network = TissueNetwork(is_trained=True)
        weights = read_weights(self.path)
        fill(network, {name: each.float() for name, each in weights.items()}, self.path)
        return network.eval().requires_grad_(False)

    @torch.no_grad()
    def embed(self, images_NHWC: Images, *, mpp: float) -> Features:
        """Features (N, 312), each image brought to one micron per pixel and seen whole.

        Raises:
            ValueError: not uint8 RGB images, or smaller than 32 px at either scale.
        """
        images_NCHW = to_tensor(images_NHWC)
        assert self.mpp is not None
        height_px, width_px = (round(side * mpp / self.mpp) for side in images_NCHW.shape[-2:])
        if min(height_px, width_px) < SMALLEST_PX:
            raise ValueError(
                f"expected images of at least {SMALLEST_PX} microns, got {height_px} x {width_px}"
            )
        parts = [
            self.network(resized(part.float(), height_px, width_px)).double().numpy()
            for part in images_NCHW.split(_BATCH)
        ]
        return np.concatenate(parts)
