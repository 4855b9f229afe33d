"""Every format behind one seam: right pixels, right scale, and one sentence for what is wrong."""

import logging
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import pytest
import tifffile
from PIL import Image

from crafts_client.ingest.errors import SlideError
from crafts_client.ingest.folder_search import find_slides
from crafts_client.ingest.readers.openslide_files import OpenSlideFile
from crafts_client.ingest.readers.scanners import known_scanner
from crafts_client.ingest.readers.seam import Level, foreign, pyramid
from crafts_client.ingest.slides import MissingScaleError, Slide
from support.slide_files import (
    halved,
    write_dicom_slide,
    write_tiffslide_only,
    write_tiled_tiff,
)
from support.slides import damage_tile, tissue_image, write_tissue_slide

SIDE = 512


@pytest.mark.parametrize("name", ["tifffile", "pydicom.filereader", "PIL.TiffImagePlugin"])
def test_what_a_library_says_of_a_file_goes_nowhere(
    name: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    log = logging.getLogger(name)
    with foreign():
        log.error("DOE^JANE")
        warnings.warn("DOE^JANE", stacklevel=1)
    assert not caplog.records
    assert capfd.readouterr() == ("", "")
    log.error("of somebody else's file")
    assert [record.message for record in caplog.records] == ["of somebody else's file"]


def _write_image(path: Path) -> Path:
    Image.fromarray(tissue_image()).save(path)
    return path


FORMATS: dict[str, Callable[[Path], Path]] = {
    "openslide": lambda folder: write_tiled_tiff(folder / "s.tif", tissue_image(), num_levels=2),
    "tiffslide": lambda folder: write_tiffslide_only(folder / "s.tif", tissue_image()),
    "wsidicom": lambda folder: write_dicom_slide(folder / "s", tissue_image()),
    "image": lambda folder: _write_image(folder / "s.png"),
}


@pytest.fixture(params=FORMATS)
def any_slide(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    """A slide of each reader's format with the same picture at 0.5 microns per pixel."""
    return request.param, FORMATS[request.param](tmp_path)


def _mpp(reader: str) -> float | None:
    return 0.5 if reader == "image" else None


def test_every_reader_gives_the_same_picture(any_slide: tuple[str, Path]) -> None:
    reader, path = any_slide
    with Slide.open(path, mpp=_mpp(reader)) as slide:
        native = slide.read((100, 140, 200, 200), (200, 200))
        coarse = slide.read((100, 140, 200, 200), (100, 100))
        assert (slide.reader, slide.size_px) == (reader, (SIDE, SIDE))
        assert (slide.mpp_x, slide.mpp_y) == pytest.approx((0.5, 0.5))
    truth = tissue_image()[140:340, 100:300]
    assert np.abs(native.astype(int) - truth).mean() < 3  # JPEG
    assert np.abs(coarse.astype(int) - halved(truth, 1)).mean() < 6


def test_every_reader_reads_between_pixels(any_slide: tuple[str, Path]) -> None:
    """A box half a pixel to the right is the mean of the two it lies between."""
    reader, path = any_slide
    with Slide.open(path, mpp=_mpp(reader)) as slide:
        left, right, between = (
            slide.read((200 + shift, 200, 64, 64), (64, 64)).astype(float) for shift in (0, 1, 0.5)
        )
    assert np.abs(between - (left + right) / 2).mean() < np.abs(left - right).mean() / 4


def test_every_reader_reads_up_to_the_last_pixel(any_slide: tuple[str, Path]) -> None:
    reader, path = any_slide
    with Slide.open(path, mpp=_mpp(reader)) as slide:
        corner = slide.read((SIDE - 64, SIDE - 64, 64, 64), (64, 64))
    assert np.abs(corner.astype(int) - tissue_image()[-64:, -64:]).mean() < 3


def test_every_reader_gives_signs_of_life(
    any_slide: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, path = any_slide
    monkeypatch.setattr("crafts_client.ingest.slides.MAX_READ_PX", 128)
    beats: list[int] = []
    with Slide.open(path, mpp=_mpp(reader)) as slide:
        slide.thumbnail(max_px=256, min_mpp=1.0, beat=lambda: beats.append(1))
    assert len(beats) == (16 if reader == "image" else 4)  # an image has no coarser level


def test_closed_reader_leaves_no_file_open(any_slide: tuple[str, Path]) -> None:
    """What is left open warns, and warnings are errors here."""
    reader, path = any_slide
    with Slide.open(path, mpp=_mpp(reader)) as slide:
        slide.read((0, 0, 64, 64), (64, 64))


def test_only_a_plain_image_needs_a_scale(any_slide: tuple[str, Path]) -> None:
    reader, path = any_slide
    if reader == "image":
        with pytest.raises(MissingScaleError, match="column mpp"):
            Slide.open(path)
    else:
        with Slide.open(path) as slide:
            assert slide.mpp_x == pytest.approx(0.5)


def test_tiffslide_reads_on_after_a_damaged_place(tmp_path: Path) -> None:
    path = write_tiffslide_only(tmp_path / "s.tif", tissue_image())
    damage_tile(path, 0)
    with Slide.open(path) as slide:
        with pytest.raises(SlideError, match="cannot be decoded"):
            slide.read((0, 0, 64, 64), (64, 64))
        assert slide.read((256, 256, 64, 64), (64, 64)).shape == (64, 64, 3)


def test_wsidicom_reads_on_after_a_damaged_place(tmp_path: Path) -> None:
    folder = write_dicom_slide(tmp_path / "s", tissue_image(), num_levels=1)
    (file,) = folder.iterdir()
    data = file.read_bytes()
    frame = data.index(b"\xff\xd8\xff")
    file.write_bytes(data[:frame] + b"\0" * 200 + data[frame + 200 :])
    with Slide.open(folder) as slide:
        with pytest.raises(SlideError, match="cannot be decoded"):
            slide.read((0, 0, 64, 64), (64, 64))
        assert slide.read((256, 256, 64, 64), (64, 64)).shape == (64, 64, 3)


def test_place_that_the_scanner_left_out_is_white(tmp_path: Path) -> None:
    """Whichever reader it is, glass that was never scanned is no tissue."""
    for name, write in (("a.tif", write_tiled_tiff), ("b.tif", write_tiffslide_only)):
        path = write(tmp_path / name, tissue_image())
        _set_tag_values(path, "TileByteCounts", {27: 0})
        with Slide.open(path) as slide:
            assert (slide.read((192, 192, 64, 64), (64, 64)) == 255).all(), slide.reader


def test_raw_read_is_the_librarys_own(tmp_path: Path) -> None:
    """The private name that reads without the detour over RGBA still does the same."""
    path = write_tissue_slide(tmp_path / "s.svs")
    ours, theirs = OpenSlideFile(path), openslide.OpenSlide(path)
    region = ours.read(0, (37, 41), (100, 90))
    expected = theirs.read_region((37, 41), 0, (100, 90)).convert("RGB")
    ours.close()
    theirs.close()
    assert region.tobytes() == expected.tobytes()


def test_one_file_of_a_dicom_series_stands_for_the_slide(tmp_path: Path) -> None:
    folder = write_dicom_slide(tmp_path / "s", tissue_image())
    with Slide.open(folder / "series1-level1.dcm") as slide:
        assert slide.size_px == (SIDE, SIDE)


def test_tiff_whose_pixels_lie_in_another_file_is_refused(tmp_path: Path) -> None:
    """OME-XML may say so, and what is listed for one patient would show another's tissue."""
    text = (
        '<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" '
        'UUID="urn:uuid:{own}"><Image ID="Image:0"><Pixels DimensionOrder="XYCZT" ID="Pixels:0" '
        f'SizeC="3" SizeT="1" SizeX="{SIDE}" SizeY="{SIDE}" SizeZ="1" Type="uint8" '
        'PhysicalSizeX="0.5" PhysicalSizeY="0.5"><Channel ID="Channel:0:0" SamplesPerPixel="3"/>'
        '<TiffData IFD="0" PlaneCount="1"><UUID FileName="theirs.tif">urn:uuid:{of}</UUID>'
        "</TiffData></Pixels></Image></OME>"
    )
    ours, theirs = (f"{digit * 8}-1111-1111-1111-{digit * 12}" for digit in "12")
    for name, own in (("theirs.tif", theirs), ("ours.tif", ours)):
        description = text.format(own=own, of=theirs).encode()
        write_tiled_tiff(
            tmp_path / name,
            tissue_image(seed=len(name)),
            description=description,
            compression="jpeg2000",
            compressionargs=None,
        )
    with Slide.open(tmp_path / "theirs.tif") as slide:
        assert slide.size_px == (SIDE, SIDE)
    with pytest.raises(SlideError, match="pixels of it lie in other files"):
        Slide.open(tmp_path / "ours.tif")


def test_folder_of_two_dicom_slides_is_refused_and_found_by_files(tmp_path: Path) -> None:
    for series in (1, 2):
        write_dicom_slide(tmp_path / "two", tissue_image(), series=series)
    with pytest.raises(SlideError, match="holds 2 DICOM slides"):
        Slide.open(tmp_path / "two")
    found = list(find_slides(tmp_path).paths)
    assert [path.name for path in found] == ["series1-level0.dcm", "series2-level0.dcm"]
    for path in found:
        with Slide.open(path) as slide:
            assert slide.size_px == (SIDE, SIDE)


def test_every_kind_of_slide_is_found_and_images_only_when_asked(tmp_path: Path) -> None:
    write_dicom_slide(tmp_path / "dicom", tissue_image())
    write_tiffslide_only(tmp_path / "b.tif", tissue_image())
    write_tissue_slide(tmp_path / "a.svs")
    _write_image(tmp_path / "c.png")
    (tmp_path / "notes.txt").write_text("no picture")
    slides = [path.name for path in find_slides(tmp_path).paths]
    assert slides == ["a.svs", "b.tif", "dicom"]
    with_images = [path.name for path in find_slides(tmp_path, images=True).paths]
    assert with_images == ["a.svs", "b.tif", "c.png", "dicom"]


def test_scanner_is_vendor_and_model_and_nothing_else(tmp_path: Path) -> None:
    path = write_tiled_tiff(
        tmp_path / "s.tif",
        tissue_image(),
        extratags=[
            (271, "s", 0, "Hamamatsu", True),
            (272, "s", 0, "C13220 serial 000842 of Dr. DOE", True),
        ],
    )
    with Slide.open(path) as slide:
        assert slide.scanner == "Hamamatsu C13220"
    assert known_scanner("Leica Biosystems", "Aperio GT 450 DX SN77") == "Leica GT 450 DX"
    assert known_scanner("DOE scanners", None) == "unknown"


@pytest.mark.parametrize("mode", ["I;16", "F"])
def test_image_of_more_than_8_bits_is_refused(tmp_path: Path, mode: str) -> None:
    suffix = ".png" if mode == "I;16" else ".tif"
    Image.new(mode, (64, 64)).save(tmp_path / f"s{suffix}")
    with pytest.raises(SlideError, match="expected 8 bits"):
        Slide.open(tmp_path / f"s{suffix}", mpp=0.5)


def test_huge_image_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    path = _write_image(tmp_path / "s.png")
    data = bytearray(path.read_bytes())
    data[16:24] = struct.pack(">II", 12_000, 12_000)
    path.write_bytes(_with_png_checksum(data))
    with pytest.raises(SlideError, match="too many"):
        Slide.open(path, mpp=0.5)


def test_transparent_image_lies_on_white(tmp_path: Path) -> None:
    Image.new("RGBA", (64, 64), (200, 0, 0, 0)).save(tmp_path / "s.png")
    with Slide.open(tmp_path / "s.png", mpp=0.5) as slide:
        assert (slide.read((0, 0, 64, 64), (64, 64)) == 255).all()


@pytest.mark.parametrize("side", [0, 4_000_001, 2**31 - 1])
def test_impossible_size_is_refused(side: int) -> None:
    with pytest.raises(SlideError, match="cannot be right"):
        pyramid([(side, 100)])


@pytest.mark.parametrize(
    "sizes, downsamples",
    [
        ([(1000, 1000), (500, 100)], None),
        ([(1000, 1000), (500, 500)], [1.0, 4.0]),
        ([(1000, 1000), (500, 500)], [1.0, float("nan")]),
        ([(500, 500), (1000, 1000)], None),
    ],
)
def test_levels_that_are_not_one_picture_are_refused(
    sizes: list[tuple[int, int]], downsamples: list[float] | None
) -> None:
    with pytest.raises(SlideError, match="not one picture"):
        pyramid(sizes, downsamples)


def test_level_that_rounding_has_made_a_pixel_shorter_is_fine() -> None:
    assert pyramid([(300, 250), (37, 31)])[1] == Level(37, 31, pytest.approx(8.086, abs=1e-3))


@pytest.mark.parametrize("write", [write_tiled_tiff, write_tiffslide_only])
def test_directories_in_a_circle_are_one_clear_error(
    tmp_path: Path, write: Callable[[Path, Any], Path]
) -> None:
    """tifffile follows a circle that begins after the hundredth directory for ever."""
    path = write(tmp_path / "DOE.tif", tissue_image())
    _append_directories(path, 150)
    with pytest.raises(SlideError) as caught:
        Slide.open(path)
    assert "DOE" not in str(caught.value)


def test_tag_that_claims_more_than_the_file_is_refused(tmp_path: Path) -> None:
    path = write_tiffslide_only(tmp_path / "s.tif", tissue_image())
    with tifffile.TiffFile(path) as file:
        place = file.pages[0].tags["TileOffsets"].offset
    with path.open("r+b") as file:
        file.seek(place + 4)
        file.write(struct.pack("<I", 2**30))
    with pytest.raises(SlideError):
        Slide.open(path)


@pytest.mark.parametrize(
    "tag, value", [("TileWidth", 2**31 - 16), ("TileLength", 0), ("ImageWidth", 2**32 - 1)]
)
def test_tiles_that_openslide_would_die_of_are_refused(
    tmp_path: Path, tag: str, value: int
) -> None:
    """OpenSlide ends the process when there is no room for a tile as large as a header claims."""
    path = write_tiled_tiff(tmp_path / "s.tif", tissue_image())
    _set_tag_values(path, tag, {0: value})
    with pytest.raises(SlideError, match="header is damaged"):
        Slide.open(path)


def test_byte_count_that_openslide_would_die_of_is_refused(tmp_path: Path) -> None:
    path = write_tiled_tiff(tmp_path / "s.tif", tissue_image(256))
    _set_tag_values(path, "TileByteCounts", {3: 3 * 10**9})
    with pytest.raises(SlideError, match="header is damaged"):
        Slide.open(path)


def test_compressed_picture_larger_than_its_tile_is_not_decoded(tmp_path: Path) -> None:
    path = write_tiffslide_only(tmp_path / "s.tif", tissue_image())
    with tifffile.TiffFile(path) as file:
        offset = file.pages[0].dataoffsets[0]
    data = bytearray(path.read_bytes())
    place = data.index(b"\xff\x4f\xff\x51", offset)
    data[place + 8 : place + 16] = struct.pack(">II", 60_000, 60_000)
    path.write_bytes(data)
    with Slide.open(path) as slide, pytest.raises(SlideError, match="cannot be decoded"):
        slide.read((0, 0, 64, 64), (64, 64))


def test_scale_that_asks_for_far_too_many_pixels_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("crafts_client.ingest.slides.MAX_REGION_PX", 300 * 300)
    path = _write_image(tmp_path / "s.png")
    with Slide.open(path, mpp=1e-4) as slide, pytest.raises(SlideError, match="too large"):
        slide.read((0, 0, 640_000, 640_000), (64, 64))


def test_file_names_that_look_like_addresses_are_only_names(tmp_path: Path) -> None:
    folder = tmp_path / "zip:" / "a::http:"
    folder.mkdir(parents=True)
    write_tiffslide_only(folder / "x::y.tif", tissue_image())
    write_dicom_slide(folder / "d::e", tissue_image())
    for name in ("x::y.tif", "d::e"):
        with Slide.open(folder / name) as slide:
            assert slide.size_px == (SIDE, SIDE)


def _with_png_checksum(data: bytearray) -> bytes:
    import zlib

    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


def _set_tag_values(path: Path, tag: str, changes: dict[int, int]) -> None:
    """Change single values of an array tag of the first page."""
    with tifffile.TiffFile(path) as file:
        found = file.pages[0].tags[tag]
        code = {3: "H", 4: "I", 16: "Q"}[int(found.dtype)]
        start = found.valueoffset
    with path.open("r+b") as file:
        for number, value in changes.items():
            file.seek(start + number * struct.calcsize(code))
            file.write(struct.pack(f"<{code}", value))


def _append_directories(path: Path, count: int) -> None:
    """Directories without tags behind the last one; the last of them points at the first."""
    with tifffile.TiffFile(path) as file:
        last = file.pages[-1].offset
    data = bytearray(path.read_bytes())
    (num_tags,) = struct.unpack_from("<H", data, last)
    struct.pack_into("<I", data, last + 2 + 12 * num_tags, len(data))
    first = len(data)
    for number in range(count):
        following = first + 6 * (number + 1) if number < count - 1 else first
        data += struct.pack("<HI", 0, following)
    path.write_bytes(data)
