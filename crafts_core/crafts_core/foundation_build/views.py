"""How public tiles are varied while a foundation is trained: turned, flipped, stained anew.

Shape letters: B tiles, C H W channels and pixels.
"""

import numpy as np
import torch
from torch import Tensor


def cropped(pixels_BCHW: Tensor, side_px: int, rng: np.random.Generator) -> Tensor:
    """A square of ``side_px`` out of each tile, at a place of its own; small tiles are kept."""
    height, width = pixels_BCHW.shape[-2:]
    if min(height, width) <= side_px:
        return pixels_BCHW
    tops, lefts = (
        rng.integers(side - side_px + 1, size=len(pixels_BCHW)) for side in (height, width)
    )
    squares = [
        tile[:, top : top + side_px, left : left + side_px]
        for tile, top, left in zip(pixels_BCHW, tops, lefts, strict=True)
    ]
    return torch.stack(squares)


def turned(pixels_BCHW: Tensor, rng: np.random.Generator) -> Tensor:
    """One random flip and quarter turn for the whole batch: tissue has no up."""
    rotated = torch.rot90(pixels_BCHW, int(rng.integers(4)), dims=(2, 3))
    return rotated.flip(3) if rng.random() < 0.5 else rotated


def other_stains(pixels_BCHW: Tensor, *, strength: float = 1.0, grey: float = 0.0) -> Tensor:
    """Each tile (in [-1, 1]) as another stain and scanner might show it: densities mixed.

    Args:
        pixels_BCHW: Tiles.
        strength: 1 is what laboratories do; more is further than any of them.
        grey: Share of tiles whose three densities are replaced by their mean.
    """
    density_BCHW = -torch.log((pixels_BCHW + 1.0) / 2.0 * 0.996 + 0.004)
    count = len(pixels_BCHW)
    mixing_BCC = torch.eye(3) + 0.12 * strength * torch.randn(count, 3, 3)
    mixing_BCC = mixing_BCC * torch.exp(0.25 * strength * torch.randn(count, 3, 1))
    if grey > 0:
        is_grey_B11 = (torch.rand(count) < grey)[:, None, None]
        mixing_BCC = torch.where(is_grey_B11, torch.full((3, 3), 1 / 3), mixing_BCC)
    mixed_BCHW = torch.einsum("bdc,bchw->bdhw", mixing_BCC, density_BCHW).clamp(0.0, 6.0)
    return torch.exp(-mixed_BCHW) * 2.0 - 1.0
