"""Images of a study that show one picture again: stored anew, recoloured, turned, hardly moved.

Of such a pair readers know the second once they have seen the first, and intervals take the two for
independent images.

Letters: I images, H W C their thumbnails, P all values of one.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image

Thumbnails = npt.NDArray[np.float32]
_SIDE_PX = 8
_ALIKE = 0.9
"""Correlation of thumbnails. Of 520,000 pairs of real tiles (1,020 of 256 px), turned and mirrored,
none has 0.84; a tile and itself as a JPEG of quality 20 have 0.96, moved by 4 pixels 0.93."""
_TOLD = 3


def thumbnail(image: Image.Image) -> Thumbnails:
    """8 by 8 means of an RGB image, less the mean of each colour, at length 1; 0 if it is flat."""
    small = image.resize((_SIDE_PX, _SIDE_PX), Image.Resampling.BOX)
    values_HWC: Thumbnails = np.asarray(small, dtype=np.float32)
    values_HWC = values_HWC - values_HWC.mean(axis=(0, 1))
    return values_HWC / (float(np.linalg.norm(values_HWC)) or 1.0)


def lookalikes(thumbnails_IHWC: Thumbnails) -> list[tuple[int, int]]:
    """Pairs of images that are alike, however turned or mirrored."""
    count = len(thumbnails_IHWC)
    values_IP = thumbnails_IHWC.reshape(count, -1)
    are_alike_II = np.zeros((count, count), dtype=np.bool_)
    for seen_IHWC in _turned(thumbnails_IHWC):
        are_alike_II |= values_IP @ seen_IHWC.reshape(count, -1).T > _ALIKE
    first, second = np.nonzero(np.triu(are_alike_II, k=1))
    return list(zip(first.tolist(), second.tolist(), strict=True))


def thumbnails_of(images_NHWC: npt.NDArray[np.uint8]) -> Thumbnails:
    """Of many RGB images."""
    return np.stack([thumbnail(Image.fromarray(np.asarray(image))) for image in images_NHWC])


def alike_to(thumbnails_IHWC: Thumbnails, others_JHWC: Thumbnails) -> npt.NDArray[np.int64]:
    """Places of the images that are alike to any of the others, however turned or mirrored."""
    count, others_JP = len(thumbnails_IHWC), others_JHWC.reshape(len(others_JHWC), -1)
    are_alike_I = np.zeros(count, dtype=np.bool_)
    for seen_IHWC in _turned(thumbnails_IHWC):
        are_alike_I |= (seen_IHWC.reshape(count, -1) @ others_JP.T > _ALIKE).any(axis=1)
    return np.flatnonzero(are_alike_I)


def _turned(thumbnails_IHWC: Thumbnails) -> Iterator[Thumbnails]:
    """In the eight ways to turn and mirror a square."""
    for turns in range(4):
        turned_IHWC = np.rot90(thumbnails_IHWC, turns, axes=(1, 2))
        yield from (turned_IHWC, turned_IHWC[:, :, ::-1])


def sentence_on(pairs: Sequence[tuple[str, str]]) -> Iterator[str]:
    """A sentence on images that are alike, by their names, if there are any."""
    if pairs:
        names = ", ".join(f"{one} and {other}" for one, other in pairs[:_TOLD])
        more = "" if len(pairs) <= _TOLD else f" and {len(pairs) - _TOLD} more"
        yield (
            f"pairs of images that look alike: {names}{more}; who has seen one knows the other, "
            "and intervals take them for two: remove one of each, or name other folders"
        )
