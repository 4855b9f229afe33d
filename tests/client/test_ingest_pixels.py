"""What a file says of its pixels is honoured, or refused in one line; it never passes unseen."""

import io
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tifffile
from PIL import Image

from crafts_client.ingest.errors import SlideError
from crafts_client.ingest.readers.jpeg_stream import stored_colour
from crafts_client.ingest.ready_tiles import condition_problems, prepare_tile
from crafts_client.ingest.slides import Slide
from crafts_client.ingest.table import TableRow
from support.slide_files import write_dicom_slide, write_tiled_tiff
from support.slides import tissue_image

tissue = cache(tissue_image)
"""Drawn once; not to be written to."""
Pixels = npt.NDArray[np.uint8]
ORIENTATION = 274
PX = 64
TURNS: dict[int, Callable[[Any], Any]] = {
    1: lambda shown: shown,
    2: lambda shown: shown[:, ::-1],
    3: lambda shown: shown[::-1, ::-1],
    4: lambda shown: shown[::-1],
    5: lambda shown: shown.swapaxes(0, 1),
    6: lambda shown: np.rot90(shown),
    7: lambda shown: np.rot90(shown, 2).swapaxes(0, 1),
    8: lambda shown: np.rot90(shown, -1),
}
"""How a picture is stored that a viewer shows as it was, by EXIF orientation."""


def corner_image(height: int = PX, width: int = PX) -> Pixels:
    """No two of its turned and mirrored forms are alike."""
    image = np.full((height, width, 3), 240, np.uint8)
    image[: height // 2, : width // 4] = (200, 30, 90)
    image[: height // 8] = (30, 30, 200)
    return image


def difference(found: Pixels, truth: Pixels) -> float:
    return float(np.abs(found.astype(int) - truth).mean())


def save_turned(path: Path, stored: Any, orientation: int) -> Path:
    """An image file whose tag or EXIF says how it is turned."""
    stored = np.ascontiguousarray(stored)
    if path.suffix == ".tif":
        tags = [(ORIENTATION, "H", 1, orientation, True)]
        tifffile.imwrite(path, stored, extratags=tags, metadata=None)
    else:
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        quality: dict[str, Any] = {} if path.suffix == ".png" else {"quality": 98}
        Image.fromarray(stored).save(path, exif=exif, **quality)
    return path


def write_slide(path: Path, pixels: Any, **options: Any) -> Path:
    """A tiled TIFF without a lossy step."""
    written = {"tile": (64, 64), "compression": "zlib", "metadata": None, "photometric": "rgb"}
    scale = {"resolution": (2e4, 2e4), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(path, pixels, **(written | scale | options))
    return path


def with_samples(*values: int) -> Pixels:
    """Tissue, and further samples that are the same everywhere."""
    image = tissue()
    planes = [np.full((*image.shape[:2], 1), value, np.uint8) for value in values]
    return np.concatenate([image, *planes], axis=2)


# ---- orientation ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ending", "orientation"),
    [(e, o) for e in ("jpg", "tif") for o in TURNS] + [("png", 6), ("png", 3), ("webp", 8)],
)
def test_a_turned_tile_is_the_one_that_viewers_show(
    tmp_path: Path, ending: str, orientation: int
) -> None:
    truth = corner_image(PX, PX + 32)
    path = save_turned(tmp_path / f"t.{ending}", TURNS[orientation](truth), orientation)
    tile = prepare_tile(path, None, PX)
    found = np.asarray(Image.open(io.BytesIO(tile.jpeg)))
    assert difference(found, truth[:, 16:-16]) < 6
    with Slide.open(path, mpp=1.0) as slide:
        assert slide.size_px == (PX + 32, PX)
        assert difference(slide.read((0, 0, PX, PX), (PX, PX)), truth[:, :PX]) < 6


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("ending", ["png", "tif"])
def test_a_turned_mask_lies_over_what_viewers_show(
    tmp_path: Path, ending: str, orientation: int
) -> None:
    labels = np.zeros((PX, PX + 32), np.uint16)
    labels[5:20, 20:50] = 7
    tile = save_turned(tmp_path / "t.png", TURNS[6](corner_image(PX, PX + 32)), 6)
    path = save_turned(tmp_path / f"m.{ending}", TURNS[orientation](labels), orientation)
    row = TableRow(line=2, name="t.png", path=tile, patient="p", case="", label="", caption="",
                   mpp=None, conditions={"nuclei": path})  # fmt: skip
    assert condition_problems(row, lambda _: None) == []
    nuclei = prepare_tile(tile, None, PX, row.conditions).conditions["nuclei"]
    foreground = np.asarray(Image.open(io.BytesIO(nuclei)))[..., 0]
    assert np.array_equal(foreground > 0, labels[:, 16:-16] > 0)


@pytest.mark.parametrize(
    ("compression", "orientation"), [*(("zlib", turn) for turn in range(2, 9)), ("jpeg", 4)]
)
def test_a_turned_slide_is_refused(tmp_path: Path, compression: str, orientation: int) -> None:
    tags = [(ORIENTATION, "H", 1, orientation, True)]
    options = {"compression": compression, "compressionargs": None, "extratags": tags}
    path = write_tiled_tiff(tmp_path / "s.tif", tissue(), **options)
    with pytest.raises(SlideError, match=r"turned or mirrored .* write it upright: vips autorot"):
        Slide.open(path)


# ---- samples, bits and colour ---------------------------------------------------------------


@pytest.mark.parametrize("extra", [[0], [0, 0], [1, 0], [2, 2]])
def test_samples_that_are_no_alpha_are_refused(tmp_path: Path, extra: list[int]) -> None:
    path = write_slide(tmp_path / "s.tif", with_samples(*[128] * len(extra)), extrasamples=extra)
    with pytest.raises(SlideError, match="samples a pixel, of which the last are no alpha"):
        Slide.open(path)


@pytest.mark.parametrize("extra", [1, 2])
def test_opaque_alpha_changes_nothing(tmp_path: Path, extra: int) -> None:
    path = write_slide(tmp_path / "s.tif", with_samples(255), extrasamples=[extra])
    with Slide.open(path) as slide:
        assert np.array_equal(slide.read((0, 0, 512, 512), (512, 512)), tissue())


def test_planes_of_samples_are_read_as_pixels_are(tmp_path: Path) -> None:
    planes = np.moveaxis(tissue(), 2, 0)
    path = write_slide(tmp_path / "s.tif", planes, planarconfig="separate")
    with Slide.open(path) as slide:
        assert np.array_equal(slide.read((0, 0, 512, 512), (512, 512)), tissue())


@pytest.mark.parametrize("bits", [10, 12, 14, 16])
@pytest.mark.parametrize("says_so", [True, False])
def test_more_than_eight_bits_are_refused(tmp_path: Path, bits: int, says_so: bool) -> None:
    pixels = tissue().astype(np.uint16) << (bits - 8)
    tags = [(280, "H", 3, (0, 0, 0), True), (281, "H", 3, (2**bits - 1,) * 3, True)]
    options: dict[str, Any] = {"extratags": tags if says_so else ()}
    tiled = write_slide(tmp_path / "s.tif", pixels, **options)
    in_strips = write_slide(tmp_path / "t.tif", pixels, tile=None, **options)
    for path in (tiled, in_strips):
        with pytest.raises(SlideError, match="16 bits a sample; expected 8 bits"):
            Slide.open(path, mpp=0.5)
    with pytest.raises(SlideError, match="16 bits a sample; expected 8 bits"):
        prepare_tile(in_strips, None, PX)


def test_sixteen_bits_in_png_are_refused(tmp_path: Path) -> None:
    imagecodecs = pytest.importorskip("imagecodecs")
    path = tmp_path / "t.png"
    path.write_bytes(imagecodecs.png_encode(tissue().astype(np.uint16) << 4))
    with pytest.raises(SlideError, match="16 bits a sample; expected 8 bits"):
        prepare_tile(path, None, PX)


def test_samples_with_a_sign_are_refused(tmp_path: Path) -> None:
    path = write_slide(tmp_path / "s.tif", tissue().astype(np.int8))
    with pytest.raises(SlideError, match="signed samples; expected 8 bits, without a sign"):
        Slide.open(path)


def test_three_grey_samples_and_grey_slides_are_refused(tmp_path: Path) -> None:
    lying = write_slide(tmp_path / "s.tif", tissue(), photometric="minisblack",
                        extrasamples=[0, 0], planarconfig="contig")  # fmt: skip
    with pytest.raises(SlideError, match=r"samples are not RGB \(photometric interpretation 1\)"):
        Slide.open(lying)
    grey = write_slide(tmp_path / "g.tif", tissue()[..., 0], photometric="minisblack")
    with pytest.raises(SlideError, match="a grey picture; expected 8 bits"):
        Slide.open(grey)


def with_other_tag(path: Path, code: str, value: int) -> None:
    """Replace one number of the first page."""
    with tifffile.TiffFile(path, mode="r+b") as file:
        file.pages[0].tags[code].overwrite(value)


@pytest.mark.parametrize(("said", "stored"), [("RGB", "YCbCr"), ("YCbCr", "RGB")])
def test_a_tag_of_colour_that_lies_is_refused(tmp_path: Path, said: str, stored: str) -> None:
    path = tmp_path / "s.tif"
    image = tissue_image(128, margin=16)
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=95, keep_rgb=stored == "RGB")
    assert stored_colour(buffer.getvalue()) == stored
    shape = {"shape": image.shape, "dtype": np.uint8, "tile": (128, 128)}
    tifffile.imwrite(path, iter([buffer.getvalue()]), compression="jpeg", metadata=None,
                     photometric="rgb", **shape)  # fmt: skip
    numbers = {"RGB": 2, "YCbCr": 6}
    with_other_tag(path, "PhotometricInterpretation", numbers[said])
    for read in (lambda: Slide.open(path, mpp=0.5), lambda: prepare_tile(path, None, PX)):
        with pytest.raises(SlideError, match=f"its tags say {said}, its JPEG data {stored}"):
            read()
    with_other_tag(path, "PhotometricInterpretation", numbers[stored])
    with Slide.open(path, mpp=0.5) as slide:
        assert difference(slide.read((0, 0, 128, 128), (128, 128)), image) < 6


def test_dicom_colours_that_lie_are_refused(tmp_path: Path) -> None:
    fields = {"PhotometricInterpretation": "RGB"}
    path = write_dicom_slide(tmp_path / "s", tissue(), fields=fields)
    with pytest.raises(SlideError, match=r"PhotometricInterpretation says RGB, .* YCbCr.*dcmodify"):
        Slide.open(path)


@pytest.mark.parametrize(
    "fields",
    [
        {"BitsStored": 12, "BitsAllocated": 16},
        {"PhotometricInterpretation": "MONOCHROME2"},
        {"PhotometricInterpretation": "YBR_PARTIAL_422"},
    ],
)
def test_dicom_that_is_no_eight_bit_colour_says_so(tmp_path: Path, fields: dict[str, Any]) -> None:
    path = write_dicom_slide(tmp_path / "s", tissue(), fields=fields)
    with pytest.raises(SlideError, match="not a picture of 8 bits of red, green and blue, but of"):
        Slide.open(path)


# ---- pages ----------------------------------------------------------------------------------

LABEL: dict[str, Any] = {"photometric": "rgb", "metadata": None}
MARKS: dict[str, dict[str, Any]] = {
    "nothing, but smaller": {},
    "a word": {"description": "Label"},
    "Aperio's words": {"description": "Aperio Image Library v12\nlabel 387x463"},
    "Akoya's words": {"description": "<PerkinElmer-QPI><ImageType>Overview</ImageType>"},
    "OME's words": {"description": '<OME><Image ID="Image:0" Name="macro image"></Image></OME>'},
    "the page's name": {"extratags": [(285, "s", 0, "thumbnail", True)]},
    "Aperio's number": {"subfiletype": 9},
    "a reduced copy": {"subfiletype": 1},
}


@pytest.mark.parametrize("mark", MARKS)
@pytest.mark.parametrize("tiled", [True, False])
def test_a_label_that_comes_first_is_never_the_slide(
    tmp_path: Path, mark: str, tiled: bool
) -> None:
    side = 128 if mark == "nothing, but smaller" else 576
    label = np.full((side, side, 3), 200, np.uint8)
    with tifffile.TiffWriter(tmp_path / "s.tif") as writer:
        writer.write(label, tile=(64, 64) if tiled else None, **LABEL, **MARKS[mark])
        writer.write(tissue(), tile=(64, 64), **LABEL)
    with pytest.raises(SlideError, match=r"its first page is .*tiffcp FILE,1 NEW"):
        Slide.open(tmp_path / "s.tif", mpp=0.5)
    with pytest.raises(SlideError, match="its first page is"):
        prepare_tile(tmp_path / "s.tif", None, PX)


def test_a_label_in_strips_before_a_smaller_slide_in_tiles_is_refused(tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "s.tif") as writer:
        writer.write(np.full((640, 640, 3), 200, np.uint8), **LABEL)
        writer.write(tissue(), tile=(64, 64), **LABEL)
    with pytest.raises(SlideError, match="first page is in strips and another in tiles"):
        Slide.open(tmp_path / "s.tif", mpp=0.5)


def test_a_label_that_comes_later_does_no_harm(tmp_path: Path) -> None:
    """Levels, a thumbnail and a label without any mark, as most converters write them."""
    with tifffile.TiffWriter(tmp_path / "s.tif") as writer:
        writer.write(tissue(), tile=(64, 64), description="Label-free phase", **LABEL)
        writer.write(tissue()[::2, ::2], tile=(64, 64), subfiletype=1, **LABEL)
        writer.write(np.zeros((90, 200, 3), np.uint8), **LABEL)
    with Slide.open(tmp_path / "s.tif", mpp=0.5) as slide:
        assert slide.size_px == (512, 512)


def test_pictures_of_which_any_may_be_the_slide_are_refused(tmp_path: Path) -> None:
    with tifffile.TiffWriter(tmp_path / "s.tif") as writer:
        writer.write(tissue(), **LABEL)
        writer.write(np.zeros((90, 200, 3), np.uint8), **LABEL)
    with pytest.raises(SlideError, match="which of its pages is the picture cannot be told"):
        prepare_tile(tmp_path / "s.tif", None, PX)


@pytest.mark.parametrize("tiled", [True, False])
def test_colour_in_grey_pages_is_refused(tmp_path: Path, tiled: bool) -> None:
    with tifffile.TiffWriter(tmp_path / "s.tif") as writer:
        for plane in np.moveaxis(tissue(), 2, 0):
            writer.write(plane, tile=(64, 64) if tiled else None, metadata=None)
    for read in (lambda: Slide.open(tmp_path / "s.tif", mpp=0.5),
                 lambda: prepare_tile(tmp_path / "s.tif", None, PX)):  # fmt: skip
        with pytest.raises(SlideError, match="are 3 separate pages of one size"):
            read()
