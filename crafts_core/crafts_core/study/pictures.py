"""Images of two folders, made alike in all but what they show.

What a page sends is written anew from pixels alone: one format, one size, no metadata. It is not
compressed, so that not even its length says how smooth an image is.
"""

import hashlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

from crafts_core.provenance import Provenance, ProvenanceError, read_provenance
from crafts_core.study.lookalikes import Thumbnails, thumbnail
from crafts_core.study.questions import StudyError
from crafts_core.tissue_types import read_type
from crafts_core.vocabulary import CANCER_TYPES, NORMAL_ORGANS, VocabularyError, compose_caption

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")
Fit = Literal["crop", "scale"]
_COLOUR_MODES = ("RGB", "RGBA", "P")
_DATASET_IMAGES = "imagefolder"
"""Where ``crafts dataset`` puts images; masks lie beside it."""
_CAPTIONS = {
    **{compose_caption(cancer, None): cancer.code for cancer in CANCER_TYPES},
    **{compose_caption(None, None, organ=organ): f"normal {organ}" for organ in NORMAL_ORGANS},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """A file that was chosen."""

    path: Path
    source: str
    """Relative to its folder."""
    type: str | None
    format: str
    size: tuple[int, int]
    thumbnail: Thumbnails = field(compare=False, repr=False)


def choose_pictures(
    folder: Path, count: int, rng: np.random.Generator, *, is_synthetic: bool, seen: set[bytes]
) -> list[Picture]:
    """A random choice of the images of a folder and the folders in it.

    Contact sheets and pictures of masks are passed over, and so is what shows the same pixels as an
    image that was chosen before.

    Args:
        folder: As ``crafts sample`` or ``crafts dataset`` write it, or any other.
        count: How many.
        rng: Chooses.
        is_synthetic: What the folder is said to hold.
        seen: Hashes of pixels; those of the chosen are added.

    Raises:
        StudyError: there are fewer, one cannot be read or has no colours, or a folder of real
            images holds one that says that it is synthetic.
    """
    root = folder / _DATASET_IMAGES if (folder / _DATASET_IMAGES).is_dir() else folder
    files = sorted(path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES)
    chosen: list[Picture] = []
    for place in rng.permutation(len(files)):
        if len(chosen) == count:
            break
        path = files[place]
        source = path.relative_to(folder).as_posix()
        try:
            source.encode()
        except UnicodeEncodeError as error:
            raise StudyError(f"{source!a} in {folder} is no UTF-8 text; rename it") from error
        said = _provenance(path)
        if said is not None and not is_synthetic:
            raise StudyError(f"{path} says that it is synthetic; expected real images in {folder}")
        if said is not None and said.kind != "image":
            continue
        image, written = _read(path)
        pixels = hashlib.sha256(image.tobytes()).digest()
        if pixels not in seen:
            seen.add(pixels)
            kind = _type_of(path.relative_to(folder), said)
            chosen.append(
                Picture(
                    path=path,
                    source=source,
                    type=kind,
                    format=written,
                    size=image.size,
                    thumbnail=thumbnail(image),
                )
            )
    if len(chosen) < count:
        raise StudyError(
            f"{folder}: expected {count} images, calibration included, found {len(chosen)} that "
            "differ; ask for fewer, or name another folder"
        )
    return chosen


def common_size(pictures: Sequence[Picture], fit: Fit | None) -> tuple[int, int]:
    """The size that all images are shown in: the smallest width and height.

    Raises:
        StudyError: sizes differ, and nobody said how to make them alike.
    """
    sizes = {picture.size for picture in pictures}
    if len(sizes) > 1 and fit is None:
        told = ", ".join(f"{width} x {height}" for width, height in sorted(sizes)[:4])
        raise StudyError(
            f"images differ in size ({told}), which would tell them apart; give --fit crop where "
            "all have the same microns a pixel, --fit scale where all show the same field"
        )
    return min(width for width, _ in sizes), min(height for _, height in sizes)


def blinded(picture: Picture, size: tuple[int, int], fit: Fit | None) -> bytes:
    """A PNG of the pixels and nothing else; its length follows from its size in pixels alone."""
    image, _ = _read(picture.path)
    if image.size != size:
        image = _cropped(image, size) if fit == "crop" else ImageOps.fit(image, size)
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(image)).save(buffer, "PNG", compress_level=0)
    return buffer.getvalue()


def traces(real: Sequence[Picture], synthetic: Sequence[Picture]) -> Iterator[str]:
    """What a reader might tell the kinds apart by although no tissue shows it, a sentence each."""
    formats = [sorted({each.format for each in pictures}) for pictures in (real, synthetic)]
    if formats[0] != formats[1]:
        yield (
            f"real images are {' and '.join(formats[0])}, synthetic ones "
            f"{' and '.join(formats[1])}: traces of compression may tell them apart; store both "
            "kinds in one format with one quality first"
        )
    sizes = [sorted({each.size for each in pictures}) for pictures in (real, synthetic)]
    if sizes[0] != sizes[1]:
        yield "sizes differ between the kinds: what cropping or scaling changes may tell them apart"
    types = [{each.type for each in pictures} for pictures in (real, synthetic)]
    if only := sorted(str(each or "unknown") for each in types[0] ^ types[1]):
        yield f"of one kind only is the tissue type {', '.join(only)}, which may tell it"


def _cropped(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    left, top = ((image.size[axis] - size[axis]) // 2 for axis in (0, 1))
    return image.crop((left, top, left + size[0], top + size[1]))


def _read(path: Path) -> tuple[Image.Image, str]:
    """Pixels in RGB, and the format of the file.

    Colour profiles are left out: generators learn from bare pixels, so both kinds are shown so.
    """
    try:
        with Image.open(path) as stored:
            written, mode = str(stored.format), stored.mode
            image = ImageOps.exif_transpose(stored).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise StudyError(f"{path} is no image that can be read; remove it") from error
    if mode not in _COLOUR_MODES:
        raise StudyError(f"{path}: expected a colour image of 8 bits, got mode {mode}; remove it")
    return image, written


def _provenance(path: Path) -> Provenance | None:
    try:
        return read_provenance(path)
    except ProvenanceError:
        return None


def _type_of(path: Path, said: Provenance | None) -> str | None:
    """From the caption that it was drawn from, or the nearest folder that is named as a type."""
    if said is not None:
        caption = said.prompts[0] if said.prompts else ""
        known = (each for each in _CAPTIONS if f"{caption}, ".startswith(f"{each}, "))
        return _CAPTIONS.get(max(known, key=len, default=""))
    for name in reversed(path.parts[:-1]):
        try:
            return read_type(name.replace("-", " "))
        except VocabularyError:
            continue
    return None
