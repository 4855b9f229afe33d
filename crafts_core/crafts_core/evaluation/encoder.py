"""The embedded encoder: fixed random orthogonal convolutions as image features.

Trained encoders for pathology are gated or downloaded; this one is arithmetic on a published seed,
so every party computes the same numbers offline. It sees colour and local texture, ranks
histology sensibly, and is weak on large structure: distances compare only within one encoder,
hence its name and hash go into every result.

Shape letters: N images, C H W channels and pixels, D features, O outputs.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

Images = npt.NDArray[np.uint8]
Features = npt.NDArray[np.float64]

SIDE_PX = 64
CHANNELS = (32, 40, 53)
_SEED = 20131104
_BATCH = 128


@dataclass(frozen=True)
class EmbeddedEncoder:
    """256 features of an image: mean and spread of its colours and of three texture stages."""

    name: str = "embedded-orthogonal-256"

    @cached_property
    def weights(self) -> tuple[Tensor, ...]:
        """Kernels (O, C, 3, 3) with orthonormal rows or columns, from a seeded Philox generator."""
        rng = np.random.Generator(np.random.Philox(_SEED))
        kernels, channels = [], 3
        for outputs in CHANNELS:
            gaussian = rng.standard_normal((max(outputs, channels * 9), min(outputs, channels * 9)))
            basis = np.linalg.qr(gaussian)[0]
            matrix = basis if outputs >= channels * 9 else basis.T
            kernels.append(torch.from_numpy(matrix.reshape(outputs, channels, 3, 3)).float())
            channels = outputs
        return tuple(kernels)

    @property
    def hash(self) -> str:
        """SHA-256 of the kernels, rounded so that a machine's last bit does not matter."""
        digest = hashlib.sha256(self.name.encode())
        for kernel in self.weights:
            digest.update((kernel * 2**16).round().to(torch.int32).numpy().tobytes())
        return digest.hexdigest()

    @torch.no_grad()
    def __call__(self, images_NHWC: Images) -> Features:
        """Features (N, 256) of uint8 RGB images of any size; larger ones are reduced to 64 px.

        Raises:
            ValueError: not uint8 RGB images, or smaller than 32 pixels.
        """
        if images_NHWC.dtype != np.uint8 or images_NHWC.ndim != 4 or images_NHWC.shape[3] != 3:
            raise ValueError(f"expected uint8 images (N, H, W, 3), got {images_NHWC.shape}")
        if min(images_NHWC.shape[1:3]) < 32:
            raise ValueError(f"expected images of at least 32 px, got {images_NHWC.shape[1:3]}")
        chunks = torch.from_numpy(np.ascontiguousarray(images_NHWC)).split(_BATCH)
        return np.concatenate([self._features(chunk) for chunk in chunks])

    def _features(self, images_NHWC: Tensor) -> Features:
        maps_NCHW = images_NHWC.permute(0, 3, 1, 2).float() / 127.5 - 1.0
        if maps_NCHW.shape[-2:] != (SIDE_PX, SIDE_PX):
            maps_NCHW = functional.interpolate(
                maps_NCHW, (SIDE_PX, SIDE_PX), mode="bilinear", antialias=True, align_corners=False
            )
        parts = [_mean_and_spread(maps_NCHW)]
        for kernel in self.weights:
            maps_NCHW = functional.relu(functional.conv2d(maps_NCHW, kernel, padding=1))
            parts.append(_mean_and_spread(maps_NCHW))
            maps_NCHW = functional.avg_pool2d(maps_NCHW, 2) * 2.0
        features: Features = torch.cat(parts, dim=1).double().numpy()
        return features


def _mean_and_spread(maps_NCHW: Tensor) -> Tensor:
    return torch.cat([maps_NCHW.mean((2, 3)), maps_NCHW.std((2, 3))], dim=1)
