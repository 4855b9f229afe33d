"""Where a histogram splits best into two classes (Otsu 1979)."""

import numpy as np
import numpy.typing as npt


def otsu_bin(counts: npt.NDArray[np.integer], levels: npt.NDArray[np.number]) -> int:
    """The last bin of the lower class: the variance between the classes is largest there.

    Args:
        counts: How many values each bin holds.
        levels: What the values of each bin are.
    """
    below = np.cumsum(counts.astype(np.float64))
    above = below[-1] - below
    sum_below = np.cumsum(counts * levels)
    with np.errstate(divide="ignore", invalid="ignore"):
        gap = sum_below / below - (sum_below[-1] - sum_below) / above
        variance = below * above * gap**2
    return int(np.nanargmax(np.nan_to_num(variance, nan=-1.0)))
