"""What an image file says about its pixels that Pillow passes over without a word.

A turned picture is given as it is stored, sixteen bits of colour as their upper eight, samples that
have no name not at all. Whoever takes numbers from a picture asks here first.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image, ImageOps

Size = tuple[int, int]
_BITS_PER_SAMPLE, _SAMPLES_PER_PIXEL = 258, 277
_ON_ITS_SIDE = (5, 6, 7, 8)
_WHITE = (255, 255, 255)


@contextmanager
def opened(path: Path, formats: tuple[str, ...]) -> Iterator[Image.Image]:
    """An image that Pillow reads: a file that it maps into memory and turns comes out scrambled."""
    with path.open("rb") as file, Image.open(file, formats=formats) as image:
        yield image


def upright_size(image: Image.Image) -> Size:
    """Width and height as a viewer shows the picture, from the header alone.

    A PNG that says only after its pixels how it is turned is found out by ``upright``.
    """
    if image.format == "TIFF":  # Pillow turns these itself, the size at once
        return image.size
    if image.format == "PNG" and "exif" not in image.info:  # asking would decode it
        return image.size
    turned = image.getexif().get(ExifTags.Base.Orientation) in _ON_ITS_SIDE
    return (image.height, image.width) if turned else image.size


def upright(image: Image.Image) -> Image.Image:
    """The picture as every viewer shows it: decoded, and turned as its EXIF says."""
    return ImageOps.exif_transpose(image)


def opaque(image: Image.Image) -> Image.Image:
    """RGB as a viewer shows it on white: upright, and without transparency."""
    shown = upright(image)
    if "A" not in shown.getbands() and "transparency" not in shown.info:
        return shown.convert("RGB")
    layered = shown.convert("RGBA")
    backdrop = Image.new("RGB", layered.size, _WHITE)
    backdrop.paste(layered, mask=layered.getchannel("A"))
    return backdrop


def bits_per_sample(image: Image.Image) -> int:
    """Of an image that was opened and not yet decoded: what the file has, not what Pillow gives."""
    tags: Mapping[int, Any] = getattr(image, "tag_v2", {})
    if tags:
        return int(max(tags.get(_BITS_PER_SAMPLE, (1,))))
    is_deep = image.format == "PNG" and any(
        ";16" in str(tile) for tile in getattr(image, "tile", ())
    )
    return 16 if is_deep else 8


def num_lost_samples(image: Image.Image) -> int:
    """How many samples a TIFF has that Pillow drops, because they are neither colour nor alpha."""
    tags: Mapping[int, Any] = getattr(image, "tag_v2", {})
    return max(0, int(tags.get(_SAMPLES_PER_PIXEL, 0)) - len(image.getbands()))
