"""Bound what one patient can add to the sum, and put it on the grid the noise lives on.

Both functions work in place on one flat float32 gradient (letters: D coordinates), because the
patient loop holds exactly one of them.

Why a grid: floating-point sums depend on their order, so removing one patient could move every
later rounding. Each clipped gradient is therefore rounded *towards zero* to integer multiples of
one step before it is added. Rounding towards zero cannot lengthen a vector and integers add
exactly, so removing one patient moves the sum by at most C: rounding costs no sensitivity.
"""

import math

import torch
from torch import Tensor

CLIP_MARGIN = 1e-6
"""Gradients are clipped to C (1 - margin): float32 rounding (1.2e-7 relative) never exceeds C."""

GRID_BITS = 24
"""C is at least 2**24 grid steps, so the grid is as fine as float32 at full length."""

_CHUNK = {"cpu": 1 << 18, "cuda": 1 << 23}
"""Numbers at a time: what stays in a processor's cache, and what fills a GPU."""


def clip_(grad_D: Tensor, max_grad_norm: float, *, stability: float | None = None) -> Tensor:
    """Scale a flat float32 gradient to L2 norm at most ``max_grad_norm``, in place.

    Guarantee: the norm, in exact arithmetic, is at most C. A gradient that holds NaN or infinity,
    or that is more than 2**126 times too long for float32 to scale exactly, becomes zero.

    Args:
        grad_D: One patient's whole gradient.
        max_grad_norm: Clipping bound C; infinity only removes what is not finite.
        stability: None scales only what is too long. A number is gamma of automatic clipping:
            every gradient is scaled by C / (norm + gamma) (AUTO-S, arXiv 2206.07136), so that C
            is no more than a unit of the learning rate.

    Returns:
        Whether the gradient was usable, as a zero-dimensional boolean tensor on the same device.

    Raises:
        ValueError: ``max_grad_norm`` is not positive, or the gradient is not flat float32.
    """
    if not max_grad_norm > 0:
        raise ValueError(f"expected max_grad_norm > 0, got {max_grad_norm}")
    if grad_D.dtype != torch.float32 or grad_D.ndim != 1:
        raise ValueError(f"expected a flat float32 gradient, got {grad_D.ndim}-d {grad_D.dtype}")
    norm = norm_float64(grad_D)
    bound = max_grad_norm * (1.0 - CLIP_MARGIN)
    scale = (bound / norm).clamp(max=1.0) if stability is None else bound / (norm + stability)
    # Below the smallest normal float32 the scale itself would be rounded coarsely.
    is_usable = norm.isfinite() & (scale >= torch.finfo(torch.float32).tiny)
    scale = torch.where(is_usable, scale, 0.0)
    grad_D.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0).mul_(scale.float())
    return is_usable


def norm_float64(grad_D: Tensor) -> Tensor:
    """L2 norm summed in float64; float32 summation is off by 8e-5 at four million coordinates.

    In chunks, because torch makes a float64 copy of what it is given.
    """
    chunks = [
        torch.linalg.vector_norm(chunk_D, dtype=torch.float64) for chunk_D in chunks_of(grad_D)
    ]
    norm: Tensor = torch.linalg.vector_norm(torch.stack(chunks))
    return norm


def grid_step(max_grad_norm: float, grid_bits: int = GRID_BITS) -> float:
    """The grid's step for clipping bound C: the power of two in (C / 2**25, C / 2**24].

    A power of two, so that dividing a float32 by it is exact. With other ``grid_bits`` C is at
    least 2 to so many steps; a sum of several sites has a coarser grid than a site's own.
    """
    return 2.0 ** (math.floor(math.log2(max_grad_norm)) - grid_bits)


def to_grid_(grad_D: Tensor, step: float) -> Tensor:
    """Express a gradient in whole grid steps, rounded towards zero, in place.

    Guarantee: the norm times ``step`` is at most what it was. The values are integers below
    2**25, so a float64 accumulator adds up to 2**28 patients without any rounding.
    """
    return grad_D.div_(step, rounding_mode="trunc")


def add_float64_(sum_D: Tensor, grad_D: Tensor) -> None:
    """Add float32 to a float64 sum, in place; twice as fast as leaving the types to torch."""
    for sum_chunk_D, chunk_D in zip(chunks_of(sum_D), chunks_of(grad_D), strict=True):
        sum_chunk_D += chunk_D.double()


def chunks_of(flat_D: Tensor) -> tuple[Tensor, ...]:
    """Views of a long vector, for work that makes copies."""
    return torch.split(flat_D, _CHUNK.get(flat_D.device.type, _CHUNK["cpu"]))
