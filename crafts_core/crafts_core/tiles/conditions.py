"""What steers a generator besides its text: where nuclei are, or what fluoresces.

A condition is a small image over one tile, kept as 8-bit channels so that a store, a cache and a
stock diffusers pipeline read the very same numbers:

* ``nuclei``: red, green, blue of an RGB image are *foreground*, *boundary* and *distance* of an
  instance-label image (``nuclei_condition``);
* ``fluorescence``: up to four channels, each normalised by its own tile alone; what a channel does
  not have is told by a presence mask (``fluorescence_condition``).

Everything here is a function of one tile: nothing is fitted on a cohort, so nothing of it has to be
accounted for. Shape letters: C channels of a condition, M channels of a file, H W pixels.
"""

import contextlib
import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from crafts_core.errors import CraftsError
from crafts_core.picture_facts import (
    bits_per_sample,
    num_lost_samples,
    opened,
    upright,
    upright_size,
)
from crafts_core.plan_sections import Modality

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

FORMATS = ("PNG", "TIFF")
MAX_FLUORESCENCE_CHANNELS = 4
LOW_QUANTILE, HIGH_QUANTILE = 0.01, 0.995
"""Of a fluorescence channel: what becomes 0 and 1."""
_LABEL_MODES = ("L", "P", "I", "I;16", "I;16B")
_OPAQUE = 255
_BINARY_PIECES = 4
_PHOTOMETRIC, _WHITE_IS_ZERO = 262, 0
"""Tag of TIFF. Pillow turns such 8-bit numbers round, so that the background becomes a nucleus."""
_SAMPLE_FORMAT, _UNSIGNED = 339, 1
"""Tag of TIFF, and what it is where it is missing."""
_STORED_MODES: dict[Modality, str] = {"nuclei": "RGB", "fluorescence": "RGBA"}
STORED_CHANNELS: dict[Modality, int] = {"nuclei": 3, "fluorescence": MAX_FLUORESCENCE_CHANNELS}
"""Of the image that is stored."""
NUM_CHANNELS: dict[Modality, int] = {"nuclei": 3, "fluorescence": 2 * MAX_FLUORESCENCE_CHANNELS}
"""Of the float condition that a ControlNet takes."""


class ConditionError(CraftsError):
    """An image cannot be used as a condition; the message says why and what it should be."""


def nuclei_condition(labels_HW: npt.NDArray[Any]) -> Floats:
    """Foreground, boundary and distance of an instance map, float32 (3, H, W) in [0, 1].

    * foreground: 1 on every pixel with a label above 0;
    * boundary: 1 on foreground pixels of which a pixel above, below, left or right has another
      label or none. The image's own edge is no boundary;
    * distance: how far, from centre to centre, the nearest pixel is that is not of this nucleus,
      divided by the largest such distance in the nucleus. One that fills the whole image is 1.

    Which number a nucleus has makes no difference.
    """
    labels = np.asarray(labels_HW)
    if labels.ndim != 2 or not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0:
        raise ValueError(f"expected labels (H, W) from 0, got {labels.dtype} {labels.shape}")
    inside = labels > 0
    differs = np.zeros(labels.shape, dtype=bool)
    across, down = labels[:, 1:] != labels[:, :-1], labels[1:] != labels[:-1]
    differs[:, 1:] |= across
    differs[:, :-1] |= across
    differs[1:] |= down
    differs[:-1] |= down
    return np.stack([inside, inside & differs, _distance(labels)]).astype(np.float32)


def _distance(labels_HW: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    from scipy import ndimage  # to open a store of tiles needs none of it

    distance_HW = np.zeros(labels_HW.shape)
    # Consecutive numbers: find_objects makes a list as long as the largest one.
    numbers_HW = np.unique(labels_HW, return_inverse=True)[1].reshape(labels_HW.shape)
    if labels_HW.min() > 0:
        numbers_HW = numbers_HW + 1
    for number, box in enumerate(ndimage.find_objects(numbers_HW), start=1):
        # One pixel more on each side holds the nearest stranger of every pixel of the nucleus.
        wide = tuple(slice(max(0, side.start - 1), side.stop + 1) for side in box)
        own = numbers_HW[wide] == number
        if own.all():
            distance_HW[wide] = 1.0
            continue
        far = ndimage.distance_transform_edt(own)
        distance_HW[wide][own] = (far / far.max())[own]
    return distance_HW


def fluorescence_condition(channels_MHW: Sequence[npt.NDArray[Any]]) -> Floats:
    """Four normalised channels, then the presence mask of each, float32 (8, H, W) in [0, 1].

    A channel becomes ``clip((x - lo) / (hi - lo), 0, 1)`` with its 1 % and 99.5 % quantiles over
    the tile (its least and largest value where these are equal; all zero where those are, too). A
    channel that the file lacks, or that is zero everywhere, was not measured: presence 0.

    Raises:
        ValueError: there is no channel, more than four, or one is not finite.
    """
    if not 1 <= len(channels_MHW) <= MAX_FLUORESCENCE_CHANNELS:
        raise ValueError(
            f"expected 1 to {MAX_FLUORESCENCE_CHANNELS} channels, got {len(channels_MHW)}"
        )
    shape = np.asarray(channels_MHW[0]).shape
    condition_CHW = np.zeros((2 * MAX_FLUORESCENCE_CHANNELS, *shape), dtype=np.float32)
    for place, channel in enumerate(channels_MHW):
        values_HW = np.asarray(channel, dtype=np.float64)
        if not np.isfinite(values_HW).all():
            raise ValueError("a channel holds NaN or infinity")
        if values_HW.any():
            condition_CHW[place] = _normalised(values_HW)
            condition_CHW[MAX_FLUORESCENCE_CHANNELS + place] = 1.0
    return condition_CHW


def _normalised(values_HW: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    low, high = np.quantile(values_HW, [LOW_QUANTILE, HIGH_QUANTILE])
    if low == high:
        low, high = values_HW.min(), values_HW.max()
    if low == high:
        return np.zeros_like(values_HW)
    scaled: npt.NDArray[np.float64] = np.clip((values_HW - low) / (high - low), 0.0, 1.0)
    return scaled


# ---- as it is stored -------------------------------------------------------------------------


def to_bytes(condition_CHW: Floats, modality: Modality) -> Bytes:
    """The channels that are stored, uint8: three of nuclei, four of fluorescence.

    Nuclei are rounded to 255ths. A present fluorescence channel is 1 to 255 and an absent one 0,
    so that the presence mask needs no channels of its own.
    """
    if modality == "nuclei":
        return np.rint(condition_CHW * 255).astype(np.uint8)
    values, is_present = np.split(condition_CHW, 2)
    return np.where(is_present > 0, 1 + np.rint(values * 254), 0).astype(np.uint8)


def to_floats(stored_CHW: Bytes, modality: Modality) -> Floats:
    """What a ControlNet takes, of stored channels (..., C, H, W): the inverse of ``to_bytes``."""
    if modality == "nuclei":
        return (stored_CHW / 255).astype(np.float32)
    is_present = stored_CHW > 0
    values = np.where(is_present, (stored_CHW.astype(np.float32) - 1) / 254, 0)
    return np.concatenate([values, is_present], axis=-3).astype(np.float32)


def encode_condition(stored_CHW: Bytes, modality: Modality) -> bytes:
    """A PNG of the stored channels, with nothing in it but pixels."""
    buffer = io.BytesIO()
    pixels_HWC = np.ascontiguousarray(np.moveaxis(stored_CHW, 0, -1))
    Image.fromarray(pixels_HWC, _STORED_MODES[modality]).save(buffer, "PNG")
    return buffer.getvalue()


def decode_condition(png: bytes, modality: Modality, tile_px: int) -> Bytes:
    """Stored channels (C, tile_px, tile_px).

    Raises:
        ConditionError: the bytes are not what ``encode_condition`` writes.
    """
    try:
        with Image.open(io.BytesIO(png), formats=("PNG",)) as image:
            # The header first: a forged size would be allocated.
            if (image.size, image.mode) != ((tile_px, tile_px), _STORED_MODES[modality]):
                raise ConditionError(f"a stored {modality} image has another size or format")
            return np.moveaxis(np.asarray(image), -1, 0)
    except ConditionError:
        raise
    except Exception as error:  # Pillow answers damage with any kind of exception
        raise ConditionError(f"a stored {modality} image is not readable") from error


# ---- as it is given --------------------------------------------------------------------------


def check_condition_file(path: Path, modality: Modality, size: tuple[int, int]) -> None:
    """Look at a file's header only.

    Args:
        path: An instance-label image, or a fluorescence image.
        modality: Which of them.
        size: Width and height that it must have, in pixels.

    Raises:
        ConditionError: what is wrong with it.
    """
    with _opened(path, modality) as image:
        _check_header(image, modality, path.name)
        width, height = upright_size(image)
        if (width, height) != size:
            raise ConditionError(
                f"{modality} image {path.name} has {width}x{height} pixels, its tile "
                f"{size[0]}x{size[1]}"
            )


def read_condition(
    path: Path,
    modality: Modality,
    *,
    tile_px: int,
    box: tuple[float, float, float, float] | None = None,
    size: tuple[int, int] | None = None,
) -> Bytes:
    """Stored channels (C, tile_px, tile_px) of a given file, as a viewer shows it.

    Args:
        path: Instance labels (8, 16 or 32-bit integers in one channel, 0 = background), or 1 to 4
            channels of fluorescence (bands, or pages of a TIFF). Opaque alpha is no channel.
        modality: Which of them.
        tile_px: Side of the result. Labels are resampled to the nearest pixel, then measured;
            fluorescence is resampled as tiles are, then normalised.
        box: Left, top, right, bottom of the square that becomes the tile; else the central one.
        size: Width and height that the file must have.

    Raises:
        ConditionError: what is wrong with it.
    """
    if size is not None:
        check_condition_file(path, modality, size)
    with _opened(path, modality) as image:
        _check_header(image, modality, path.name)
        square = box or _central_square(image)
        if modality == "nuclei":
            labels_HW = _labels(image, path, square, tile_px)
            return to_bytes(nuclei_condition(labels_HW), modality)
        channels = [_resampled(channel, square, tile_px) for channel in _channels(image, path)]
        return to_bytes(fluorescence_condition(channels), modality)


def read_labels(path: Path, *, tile_px: int) -> npt.NDArray[np.int64]:
    """The numbered nuclei (tile_px, tile_px) that ``read_condition`` makes a condition of.

    Raises:
        ConditionError: what is wrong with the file.
    """
    with _opened(path, "nuclei") as image:
        _check_header(image, "nuclei", path.name)
        return _labels(image, path, _central_square(image), tile_px)


def _labels(
    image: Image.Image, path: Path, square: tuple[float, float, float, float], tile_px: int
) -> npt.NDArray[np.int64]:
    # Big-endian files give numbers that scipy does not take.
    whole_HW = _checked_labels(np.asarray(upright(image)).astype(np.int64), path)
    return _nearest(whole_HW, square, tile_px)


def _central_square(image: Image.Image) -> tuple[float, float, float, float]:
    width, height = upright_size(image)
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


@contextlib.contextmanager
def _opened(path: Path, modality: Modality) -> Iterator[Image.Image]:
    """The open image. Pillow answers damage with any kind of exception, at any time."""
    with contextlib.ExitStack() as closing:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                image = closing.enter_context(opened(path, FORMATS))
        except Exception as error:
            raise ConditionError(
                f"{modality} image {path.name} is not a readable image ({', '.join(FORMATS)}), or "
                "far too large"
            ) from error
        try:
            yield image
        except ConditionError:
            raise
        except Exception as error:
            raise ConditionError(f"{modality} image {path.name} is damaged: {error}") from error


def _check_header(image: Image.Image, modality: Modality, name: str) -> None:
    tags: Mapping[int, Any] = getattr(image, "tag_v2", {})
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        raise ConditionError(
            f"{modality} image {name} counts from white: its numbers would be read the wrong way "
            "round; save it with 0 as black (in ImageJ: without an inverting LUT)"
        )
    num_pages = getattr(image, "n_frames", 1)
    if modality == "nuclei":
        if image.mode not in _LABEL_MODES or num_pages > 1:
            raise ConditionError(
                f"nuclei image {name} is not an integer label image: expected one channel of 8, 16 "
                f"or 32-bit integers, got mode {image.mode} in {num_pages} pages"
            )
        return
    first = (image.size, image.mode)
    for page in range(min(num_pages, MAX_FLUORESCENCE_CHANNELS)):
        image.seek(page)
        if (image.size, image.mode) != first:
            raise ConditionError(
                f"page {page + 1} of fluorescence image {name} is {image.width}x{image.height} "
                f"(mode {image.mode}), the first {first[0][0]}x{first[0][1]} (mode {first[1]}): "
                "every page is a channel of the same place"
            )
        is_colour = len(image.getbands()) > 1
        if num_lost_samples(image) or (is_colour and bits_per_sample(image) > 8):
            raise ConditionError(
                f"fluorescence image {name} has {bits_per_sample(image)}-bit pixels of several "
                "samples, which are not read whole; save each channel as a grey page of a TIFF"
            )
    image.seek(0)
    num_channels = num_pages * len(_measured(image))
    if image.mode == "P" or not 1 <= num_channels <= MAX_FLUORESCENCE_CHANNELS:
        raise ConditionError(
            f"fluorescence image {name} has {num_channels} channels (mode {image.mode}), expected "
            f"1 to {MAX_FLUORESCENCE_CHANNELS}"
        )


def _measured(image: Image.Image) -> tuple[str, ...]:
    """The bands that hold numbers of a microscope; alpha, the last, says how to show a picture."""
    return tuple(band for band in image.getbands() if band != "A")


def _channels(image: Image.Image, path: Path) -> list[npt.NDArray[np.float32]]:
    """All measured bands of all pages."""
    channels = []
    for page in range(getattr(image, "n_frames", 1)):
        image.seek(page)
        tags: Mapping[int, Any] = getattr(image, "tag_v2", {})
        shown = upright(image)
        if "A" in shown.getbands() and np.asarray(shown.getchannel("A")).min() < _OPAQUE:
            raise ConditionError(
                f"fluorescence image {path.name} is transparent in places; save what is measured "
                "as channels without alpha, or each channel as a page of a TIFF"
            )
        counts = np.asarray(shown)
        if counts.dtype == np.int32 and tags.get(_SAMPLE_FORMAT, (_UNSIGNED,))[0] == _UNSIGNED:
            counts = counts.view(np.uint32)  # Pillow knows no other: what is bright came out dark
        pixels = np.atleast_3d(counts.astype(np.float32))
        channels += [pixels[..., band] for band in range(len(_measured(shown)))]
    return channels


def _checked_labels(labels_HW: npt.NDArray[Any], path: Path) -> npt.NDArray[Any]:
    from scipy import ndimage

    if labels_HW.min() < 0:
        raise ConditionError(f"nuclei image {path.name} holds negative labels")
    names = np.unique(labels_HW[labels_HW > 0])
    if len(names) == 1 and ndimage.label(labels_HW)[1] >= _BINARY_PIECES:
        raise ConditionError(
            f"nuclei image {path.name} is a binary mask: all nuclei have label {names[0]}; number "
            "them one by one"
        )
    return labels_HW


def _nearest(
    values_HW: npt.NDArray[Any], box: tuple[float, float, float, float], tile_px: int
) -> npt.NDArray[Any]:
    """The pixel under the centre of each pixel of the tile."""
    left, top, right, bottom = box
    steps = (np.arange(tile_px) + 0.5) / tile_px
    rows = (top + steps * (bottom - top)).astype(np.int64).clip(0, values_HW.shape[0] - 1)
    columns = (left + steps * (right - left)).astype(np.int64).clip(0, values_HW.shape[1] - 1)
    nearest_HW: npt.NDArray[Any] = values_HW[rows[:, None], columns[None, :]]
    return nearest_HW


def _resampled(
    channel_HW: npt.NDArray[np.float32], box: tuple[float, float, float, float], tile_px: int
) -> Floats:
    whole = Image.fromarray(channel_HW)
    return np.asarray(whole.resize((tile_px, tile_px), Image.Resampling.HAMMING, box=box))
