"""Changes of real tiles that a ruler of tissue should, or should not, mind.

The stain changes are as large as those between laboratories: over the cases of the open tiles, the
mean optical density of a colour has a standard deviation of 0.2 to 0.3.

Shape letters: N images, H W pixels, C colours, S stains, P patches.
"""

import numpy as np
from scipy.ndimage import gaussian_filter

from crafts_core.evaluation.encoder import Images
from crafts_core.stains import from_density, optical_density, stained_otherwise

_MIXING_CC = np.array([[1.15, 0.10, -0.05], [-0.05, 0.80, 0.10], [0.05, -0.10, 1.25]])
_SHIFT_C = np.array([0.06, 0.00, 0.10])
_STAIN_SCALE_S = np.array([0.70, 1.35, 1.00])
BLUR_UM = 0.7
"""Standard deviation of the blur."""
PATCHES_PX = (8, 16, 32)


def recoloured(images_NHWC: Images) -> Images:
    """One affine change of optical density for all: colours mixed, paler green, denser blue."""
    density_NHWC = optical_density(images_NHWC, np.float64)
    return from_density(density_NHWC @ _MIXING_CC.T + _SHIFT_C)


def restained(images_NHWC: Images) -> Images:
    """Less hematoxylin and more eosin, each along its own colour."""
    return stained_otherwise(images_NHWC, scale_S=_STAIN_SCALE_S, shift_S=np.zeros(3))


def blurred(images_NHWC: Images, *, mpp: float) -> Images:
    """Out of focus by ``BLUR_UM``."""
    sigma_px = BLUR_UM / mpp
    found: Images = np.rint(
        gaussian_filter(images_NHWC.astype(np.float32), (0, sigma_px, sigma_px, 0), mode="nearest")
    ).astype(np.uint8)
    return found


def shuffled(images_NHWC: Images, patch_px: int, rng: np.random.Generator) -> Images:
    """The square patches of each tile in random order; what does not fill a patch is cut off.

    Raises:
        ValueError: a tile holds fewer than four patches.
    """
    num, height, width, channels = images_NHWC.shape
    rows, columns = height // patch_px, width // patch_px
    if min(rows, columns) < 2:
        raise ValueError(f"expected tiles of at least two patches of {patch_px} px, got {width} px")
    cut = images_NHWC[:, : rows * patch_px, : columns * patch_px]
    grid = cut.reshape(num, rows, patch_px, columns, patch_px, channels).swapaxes(2, 3)
    patches_NPHWC = grid.reshape(num, rows * columns, patch_px, patch_px, channels)
    order_NP = rng.permuted(np.tile(np.arange(rows * columns), (num, 1)), axis=1)
    mixed = np.take_along_axis(patches_NPHWC, order_NP[:, :, None, None, None], axis=1)
    return mixed.reshape(grid.shape).swapaxes(2, 3).reshape(cut.shape)
