"""Images as arrays, and as what networks take.

Shape letters: N or B images, C H W channels and pixels.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def channels_first(images_NHWC: npt.NDArray[np.uint8]) -> Tensor:
    """The same numbers, (N, C, H, W)."""
    return torch.from_numpy(np.ascontiguousarray(images_NHWC)).permute(0, 3, 1, 2)


def to_pixels(images_BHWC: npt.NDArray[np.uint8]) -> Tensor:
    """uint8 images to float (B, 3, H, W) in [-1, 1]."""
    return channels_first(images_BHWC).float() / 127.5 - 1.0


def to_uint8(pixels_BCHW: Tensor) -> npt.NDArray[np.uint8]:
    """Back to (B, H, W, 3)."""
    levels_BCHW = ((pixels_BCHW + 1.0) * 127.5).round().clamp(0, 255).byte()
    return levels_BCHW.permute(0, 2, 3, 1).cpu().numpy()
