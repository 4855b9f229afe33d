"""Colour of tiles taken apart from their structure.

Stain is optical density (Beer-Lambert), so colour is told, matched and removed there: as statistics
of a tile's density, as the affine map that carries one set's colours onto another's, and as a grey
picture of a tile that keeps where it is dense and forgets in which colour.

Shape letters: N images, H W pixels, P pixels of one image, C colours, D features.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
from scipy import linalg

from crafts_core.evaluation.encoder import Features, Images
from crafts_core.stains import from_density, optical_density

Vector = npt.NDArray[np.float64]
Matrix = npt.NDArray[np.float64]

_QUANTILES = (0.05, 0.5, 0.95)
_GREY_QUANTILES = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)
_LEAST_STD = 1e-3
_NOISE = 1e-5
"""Variance added to a covariance of densities: a set of one colour has a finite map, too."""
_GREY_MEAN, _GREY_STD = 0.6, 0.25
"""Mean and spread of a grey picture's density, as ordinary H&E has them."""
_BATCH = 256


def colour_statistics(images_NHWC: Images) -> Features:
    """Mean and log standard deviation of each colour's density, (N, 6): what a stain is."""
    return _by_batch(images_NHWC, _mean_and_spread)


def colour_features(images_NHWC: Images) -> Features:
    """``colour_statistics`` with covariances and quantiles, (N, 21): all that colour can tell."""

    def features(images: Images) -> Features:
        density_NPC = (
            optical_density(images, np.float32).reshape(len(images), -1, 3).astype(np.float64)
        )
        centred_NPC = density_NPC - density_NPC.mean(axis=1, keepdims=True)
        covariance_NCC = centred_NPC.transpose(0, 2, 1) @ centred_NPC / density_NPC.shape[1]
        upper = np.triu_indices(3)
        quantiles_NQ = np.quantile(density_NPC, _QUANTILES, axis=1).swapaxes(0, 1)
        return np.concatenate(
            [
                _mean_and_spread(images),
                covariance_NCC[:, upper[0], upper[1]],
                quantiles_NQ.reshape(len(images), -1),
            ],
            axis=1,
        )

    return _by_batch(images_NHWC, features)


def _mean_and_spread(images_NHWC: Images) -> Features:
    density_NPC = (
        optical_density(images_NHWC, np.float32).reshape(len(images_NHWC), -1, 3).astype(np.float64)
    )
    spread_NC = np.maximum(density_NPC.std(axis=1), _LEAST_STD)
    return np.concatenate([density_NPC.mean(axis=1), np.log(spread_NC)], axis=1)


def _by_batch(images_NHWC: Images, features: Callable[[Images], Features]) -> Features:
    starts = range(0, len(images_NHWC), _BATCH)
    return np.concatenate([features(images_NHWC[start : start + _BATCH]) for start in starts])


def grey_structure(images_NHWC: Images) -> Images:
    """Each tile in grey: its density along its own main axis of colour, at one mean and contrast.

    An affine change of a tile's colours along that axis changes nothing here, so what looks at
    these pictures cannot go by stain.
    """
    return np.stack([_grey(image) for image in images_NHWC])


def grey_levels(grey_NHWC: Images) -> Features:
    """How the densities of pictures in grey are spread, (N, 9): quantiles of their pixels."""
    levels_NP = grey_NHWC[..., 0].reshape(len(grey_NHWC), -1)
    levels: Features = np.quantile(levels_NP, _GREY_QUANTILES, axis=1).T
    return levels


def _grey(image_HWC: Images) -> Images:
    density_PC = optical_density(image_HWC, np.float32).reshape(-1, 3).astype(np.float64)
    centred_PC = density_PC - density_PC.mean(axis=0)
    axis_C = np.linalg.eigh(centred_PC.T @ centred_PC)[1][:, -1]
    amount_P = centred_PC @ (axis_C * np.sign(axis_C.sum() or 1.0))
    amount_P /= max(float(amount_P.std()), _LEAST_STD)
    grey_HW = (_GREY_MEAN + _GREY_STD * amount_P).reshape(image_HWC.shape[:2])
    return from_density(np.repeat(grey_HW[:, :, None], 3, axis=2).astype(np.float32))


@dataclass(frozen=True, slots=True, kw_only=True)
class ColourMoments:
    """Mean and covariance of the densities of all pixels of a set of tiles."""

    mean_C: Vector
    covariance_CC: Matrix

    @classmethod
    def of(cls, images_NHWC: Images) -> Self:
        """Over every pixel of every tile.

        Raises:
            ValueError: there is no tile.
        """
        if len(images_NHWC) == 0:
            raise ValueError("expected at least one tile to take colours from")
        total_C, squares_CC, count = np.zeros(3), np.zeros((3, 3)), 0
        for start in range(0, len(images_NHWC), _BATCH):
            batch_NHWC = images_NHWC[start : start + _BATCH]
            density_PC = optical_density(batch_NHWC, np.float32).reshape(-1, 3).astype(np.float64)
            total_C += density_PC.sum(axis=0)
            squares_CC += density_PC.T @ density_PC
            count += len(density_PC)
        mean_C = total_C / count
        return cls(mean_C=mean_C, covariance_CC=squares_CC / count - np.outer(mean_C, mean_C))

    @property
    def statistics(self) -> Vector:
        """What ``colour_statistics`` would tell of all tiles as one."""
        spread_C = np.sqrt(np.maximum(np.diag(self.covariance_CC), _LEAST_STD**2))
        return np.concatenate([self.mean_C, np.log(spread_C)])


@dataclass(frozen=True, slots=True, kw_only=True)
class ColourMap:
    """An affine map of optical densities: 12 numbers, the same for every pixel of a set."""

    matrix_CC: Matrix
    shift_C: Vector

    @classmethod
    def between(cls, source: ColourMoments, target: ColourMoments) -> Self:
        """The affine map that gives the source the target's mean and covariance and moves it least.

        It is optimal transport between Gaussians (Knott and Smith 1984): symmetric, and the
        identity where the colours are the same.
        """
        root = _power(source.covariance_CC, 0.5)
        back = _power(source.covariance_CC, -0.5)
        middle = _power(root @ (target.covariance_CC + _NOISE * np.eye(3)) @ root, 0.5, noise=0.0)
        matrix_CC = back @ middle @ back
        return cls(matrix_CC=matrix_CC, shift_C=target.mean_C - source.mean_C @ matrix_CC)

    def __call__(self, images_NHWC: Images) -> Images:
        """The tiles in other colours, clipped to what a pixel can be."""
        matrix_CC, shift_C = self.matrix_CC.astype(np.float32), self.shift_C.astype(np.float32)
        images: Images = np.empty_like(images_NHWC)
        for start in range(0, len(images_NHWC), _BATCH):
            part = slice(start, start + _BATCH)
            images[part] = from_density(
                optical_density(images_NHWC[part], np.float32) @ matrix_CC + shift_C
            )
        return images


def in_colours_of(images_NHWC: Images, target: ColourMoments) -> Images:
    """A set of tiles, mapped as one onto the target's colours."""
    return ColourMap.between(ColourMoments.of(images_NHWC), target)(images_NHWC)


def _power(symmetric_CC: Matrix, exponent: float, *, noise: float = _NOISE) -> Matrix:
    values_C, basis_CC = linalg.eigh(symmetric_CC)
    powers_C = np.clip(values_C, 0.0, None) + noise
    matrix: Matrix = basis_CC * powers_C**exponent @ basis_CC.T
    return matrix
