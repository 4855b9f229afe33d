"""What sees tiles for us: an encoder turns images into features that distances are measured in.

Numbers compare within one encoder only, so its name and the hash of its weights go into every
result, and results of different encoders are not put side by side.

Shape letters: N images, C H W channels and pixels, D features.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor
from torch.nn import functional

from crafts_core.errors import CraftsError
from crafts_core.pixels import channels_first

Images = npt.NDArray[np.uint8]
Features = npt.NDArray[np.float64]

SMALLEST_PX = 32


def unit_rows(rows_ND: Features) -> Features:
    """Each row at length 1; a row of nothing stays one."""
    unit_ND: Features = rows_ND / np.maximum(np.linalg.norm(rows_ND, axis=1, keepdims=True), 1e-12)
    return unit_ND


class EncoderError(CraftsError):
    """An encoder cannot be loaded, or results of two encoders were to be compared."""


class Encoder(Protocol):
    """Images to features, frozen."""

    @property
    def name(self) -> str:
        """For people; two encoders may share it."""
        ...

    @property
    def hash(self) -> str:
        """SHA-256 of what decides the features; the identity."""
        ...

    @property
    def input_px(self) -> int:
        """Side of the images that it was made for."""
        ...

    @property
    def mpp(self) -> float | None:
        """Microns per pixel that it was made for; None where an image is taken at any scale."""
        ...

    def embed(self, images_NHWC: Images, *, mpp: float) -> Features:
        """Features (N, D), float64, of uint8 RGB images that have ``mpp`` microns per pixel.

        Raises:
            ValueError: not uint8 RGB images, or smaller than 32 pixels.
        """
        ...


class Measured(Protocol):
    """Any result that says by which encoder it was measured."""

    @property
    def encoder(self) -> str: ...

    @property
    def encoder_hash(self) -> str: ...


def load_encoder(spec: str) -> Encoder:
    """The encoder that ``spec`` names.

    Args:
        spec: ``embedded``, trained on open tissue; ``orthogonal``, random convolutions from a
            published seed; ``imagenet``, from an optional package; or a local path
            (``local_encoder`` says which layouts).

    Raises:
        EncoderError: there is none of that name or at that path, or a package is not installed.
        FoundationError: its files are damaged, or hold more than weights.
    """
    # Each kind has libraries of its own, which only its users should wait for.
    if spec == "embedded":
        from crafts_core.evaluation.tissue_encoder import TissueEncoder

        return TissueEncoder.embedded()
    if spec == "orthogonal":
        from crafts_core.evaluation.orthogonal_encoder import OrthogonalEncoder

        return OrthogonalEncoder()
    if spec == "imagenet":
        from crafts_core.evaluation.imagenet_encoder import load_imagenet

        return load_imagenet()
    if Path(spec).exists():
        from crafts_core.evaluation.local_encoder import load_local

        return load_local(Path(spec))
    raise EncoderError(
        f"no encoder {spec!r}; expected embedded, orthogonal, imagenet, or a path that exists"
    )


def require_one_encoder(results: Iterable[Measured]) -> None:
    """Refuse to set numbers of different encoders side by side.

    Raises:
        EncoderError: names two that differ.
    """
    seen: dict[str, str] = {}
    for result in results:
        seen.setdefault(result.encoder_hash, result.encoder)
    if len(seen) > 1:
        (hash_, name), (other_hash, other_name) = list(seen.items())[:2]
        raise EncoderError(
            f"results of two encoders do not compare: {name} ({hash_[:12]}) and {other_name} "
            f"({other_hash[:12]}); measure all with one (--encoder)"
        )


def to_tensor(images_NHWC: Images) -> Tensor:
    """Checked images as uint8 (N, C, H, W).

    Raises:
        ValueError: not uint8 RGB images, or smaller than 32 pixels.
    """
    if images_NHWC.dtype != np.uint8 or images_NHWC.ndim != 4 or images_NHWC.shape[3] != 3:
        raise ValueError(f"expected uint8 images (N, H, W, 3), got {images_NHWC.shape}")
    if min(images_NHWC.shape[1:3]) < SMALLEST_PX:
        raise ValueError(
            f"expected images of at least {SMALLEST_PX} px, got {images_NHWC.shape[1:3]}"
        )
    return channels_first(images_NHWC)


def resized(images_NCHW: Tensor, height_px: int, width_px: int) -> Tensor:
    """Float images of another size, without aliasing."""
    if images_NCHW.shape[-2:] == (height_px, width_px):
        return images_NCHW
    return functional.interpolate(
        images_NCHW, (height_px, width_px), mode="bilinear", antialias=True, align_corners=False
    )
