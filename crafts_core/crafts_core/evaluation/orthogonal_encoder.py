"""An encoder without training: fixed random orthogonal convolutions as image features.

It is arithmetic on a published seed, so every party computes the same numbers offline. It sees
colour and local texture and is nearly blind to larger structure.

Shape letters: N images, C H W channels and pixels, D features, O outputs.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from crafts_core.evaluation.encoder import Features, Images, resized, to_tensor

CHANNELS = (32, 40, 53)
_SEED = 20131104
_BATCH = 128


@dataclass(frozen=True)
class OrthogonalEncoder:
    """256 features of an image: mean and spread of its colours and of three texture stages."""

    name: str = "embedded-orthogonal-256"
    input_px: int = 64
    mpp: float | None = None

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
    def embed(self, images_NHWC: Images, *, mpp: float | None = None) -> Features:  # noqa: ARG002
        """Features (N, 256) of images of any scale and size, reduced or enlarged to 64 px.

        Raises:
            ValueError: not uint8 RGB images, or smaller than 32 pixels.
        """
        chunks = to_tensor(images_NHWC).split(_BATCH)
        return np.concatenate([self._features(chunk) for chunk in chunks])

    def _features(self, images_NCHW: Tensor) -> Features:
        side_px = self.input_px
        maps_NCHW = resized(images_NCHW.float() / 127.5 - 1.0, side_px, side_px)
        parts = [_mean_and_spread(maps_NCHW)]
        for kernel in self.weights:
            maps_NCHW = functional.relu(functional.conv2d(maps_NCHW, kernel, padding=1))
            parts.append(_mean_and_spread(maps_NCHW))
            maps_NCHW = functional.avg_pool2d(maps_NCHW, 2) * 2.0
        features: Features = torch.cat(parts, dim=1).double().numpy()
        return features


def _mean_and_spread(maps_NCHW: Tensor) -> Tensor:
    return torch.cat([maps_NCHW.mean((2, 3)), maps_NCHW.std((2, 3))], dim=1)
