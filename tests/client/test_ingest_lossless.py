"""Copied tiles: the stored bytes, the same pixels, and nothing else of the source."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from crafts_client.ingest.lossless import TileCopier, tile_copier
from crafts_client.ingest.readers import jpeg_stream
from crafts_client.ingest.slides import Slide
from crafts_client.ingest.tiling import TilingOptions, grid
from support.slide_files import (
    set_tile_tag,
    write_dicom_slide,
    write_tiffslide_only,
    write_tiled_tiff,
)
from support.slides import REAL_DATA, tissue_image

TILE_PX = 64
NAME = b"DOE^JOHN 1951-02-03"
needs_data = pytest.mark.skipif(not REAL_DATA.is_dir(), reason="no shared data beside repository")


@pytest.fixture(params=["YCbCr", "RGB"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A slide of three levels, its JPEG stored as most scanners do or as Aperio does."""
    options: dict[str, Any] = {}
    if request.param == "RGB":
        options["compressionargs"] = {"level": 90, "outcolorspace": "rgb"}
    path = write_tiled_tiff(tmp_path / "s.tif", tissue_image(), num_levels=3, **options)
    with tifffile.TiffFile(path) as file:
        assert file.pages[0].photometric.name == request.param.upper()
    return path


@pytest.fixture
def slide(path: Path) -> Iterator[Slide]:
    with Slide.open(path) as opened:
        yield opened


def _copier(path: Path, slide: Slide, mpp: float = 0.5) -> TileCopier:
    copier = tile_copier(path, slide, TILE_PX, mpp)
    assert copier is not None
    return copier


def _copied(path: Path, slide: Slide, x: int, y: int, mpp: float = 0.5) -> bytes:
    jpeg = _copier(path, slide, mpp).copy(x, y)
    assert jpeg is not None
    return jpeg


@pytest.mark.parametrize("level", [0, 1, 2])
def test_copied_tiles_have_the_pixels_that_openslide_reads(
    path: Path, slide: Slide, level: int
) -> None:
    step = TILE_PX << level
    for x, y in ((step, step), (0, step)):
        jpeg = _copied(path, slide, x, y, mpp=0.5 * 2**level)
        with Image.open(io.BytesIO(jpeg), formats=["JPEG"]) as image:
            pixels = np.asarray(image.convert("RGB")).astype(int)
        read = slide.read((x, y, step, step), (TILE_PX, TILE_PX))
        assert np.abs(pixels - read).max() <= 2


@pytest.mark.parametrize("error", [-4e-7, 4e-7, -9e-4, 9e-4])
def test_scale_that_is_hardly_off_copies_every_tile_either_way(path: Path, error: float) -> None:
    """At 9e-4 the eight tiles of a row are off by 0.46 pixels together."""
    options = TilingOptions(tile_px=TILE_PX, mpp=0.5)
    with Slide.open(path, mpp=0.5 * (1 + error)) as slide:
        frame_N4 = grid(slide, options)
        assert len(frame_N4) == 64
        assert set(frame_N4[:, 2:].ravel()) == {64.0}
        copier = _copier(path, slide)
        assert all(copier.copy(int(x), int(y)) for x, y in frame_N4[:, :2])
    with Slide.open(path, mpp=0.5 * (1 + 2 * np.sign(error) * 9e-4)) as slide:
        assert set(grid(slide, options)[:, 2]) != {64.0}
        assert tile_copier(path, slide, TILE_PX, 0.5) is None


def test_scan_is_the_files_own_to_the_byte(path: Path, slide: Slide) -> None:
    stored = _stored_tile(path, 27)
    copied = _copied(path, slide, 192, 192)
    assert _scans(copied) == _scans(stored) != []


def test_name_in_the_sources_jpeg_is_not_copied(path: Path, slide: Slide) -> None:
    segments = [(jpeg_stream.COM, NAME), (0xE1, b"Exif\0\0" + NAME), (0xED, NAME)]
    number = _replace_tile(path, 27, lambda jpeg: _with_segments(jpeg, segments) + NAME)
    assert NAME in path.read_bytes()
    jpeg = _copied(path, slide, 192, 192)
    assert NAME not in jpeg
    assert _scans(jpeg) == _scans(number)


def test_copy_holds_only_tables_frame_scan_and_colour(path: Path, slide: Slide) -> None:
    markers = {s.marker for s in jpeg_stream.segments(_copied(path, slide, 192, 192))}
    picture = {jpeg_stream.DQT, jpeg_stream.DHT, jpeg_stream.SOS, *jpeg_stream.FRAMES}
    assert markers - picture == {jpeg_stream.APP14}


@pytest.mark.parametrize("x, y", [(1, 0), (0, 63), (65, 64), (512, 0), (0, -64), (32, 32)])
def test_off_the_grid_there_is_nothing_to_copy(path: Path, slide: Slide, x: int, y: int) -> None:
    assert _copier(path, slide).copy(x, y) is None


@pytest.mark.parametrize(
    "tile_px, mpp", [(64, 0.501), (64, 0.499), (64, 0.4), (32, 0.5), (64, 4.0)]
)
def test_other_size_or_scale_is_no_copy(path: Path, slide: Slide, tile_px: int, mpp: float) -> None:
    assert tile_copier(path, slide, tile_px, mpp) is None


def test_scale_of_the_table_counts(path: Path) -> None:
    with Slide.open(path, mpp=0.25) as slide:
        assert tile_copier(path, slide, TILE_PX, 0.25) is not None
        assert tile_copier(path, slide, TILE_PX, 0.5) is not None  # the second level
        assert tile_copier(path, slide, TILE_PX, 2.0) is None


def test_level_that_is_not_a_whole_fraction_is_not_copied(tmp_path: Path) -> None:
    image = tissue_image()[:, :510]
    path = write_tiled_tiff(tmp_path / "s.tif", image, num_levels=3)  # 510, 255, 127
    with Slide.open(path) as slide:
        assert tile_copier(path, slide, TILE_PX, 0.5) is not None
        assert tile_copier(path, slide, TILE_PX, 2.0) is None


def test_tile_that_the_edge_cuts_off_is_not_copied(tmp_path: Path) -> None:
    path = write_tiled_tiff(tmp_path / "s.tif", tissue_image()[:500, :500])
    with Slide.open(path) as slide:
        assert _copier(path, slide).copy(448, 0) is None
        assert _copier(path, slide).copy(384, 0) is not None


@pytest.mark.parametrize("num_bytes", [0, 1, 10, 2 * 10**8])
def test_impossible_byte_count_is_no_copy(path: Path, num_bytes: int) -> None:
    set_tile_tag(path, "TileByteCounts", 27, num_bytes)
    with Slide.open(path) as slide:
        assert _copier(path, slide).copy(192, 192) is None
        assert _copier(path, slide).copy(256, 192) is not None


@pytest.mark.parametrize("offset", [0, 8, 2**31 - 1])
def test_impossible_offset_is_no_copy(path: Path, offset: int) -> None:
    set_tile_tag(path, "TileOffsets", 27, offset)
    with Slide.open(path) as slide:
        assert _copier(path, slide).copy(192, 192) is None


def test_tile_of_another_size_is_no_copy(path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32)).save(buffer, "JPEG")
    _replace_tile(path, 27, lambda _: buffer.getvalue())
    with Slide.open(path) as slide:
        assert _copier(path, slide).copy(192, 192) is None


def test_progressive_tile_is_no_copy(path: Path, slide: Slide) -> None:
    """Its scans may be thousands: decoding a patient's tiles would take a time of their own."""

    def refined(_: bytes) -> bytes:
        buffer = io.BytesIO()
        Image.new("RGB", (TILE_PX, TILE_PX), "pink").save(buffer, "JPEG", progressive=True)
        return buffer.getvalue()

    _copied(path, slide, 192, 192)
    jpeg = _replace_tile(path, 27, refined)
    assert len(_scans(jpeg)) > 3
    with Slide.open(path) as changed:
        assert _copier(path, changed).copy(192, 192) is None


def test_more_scans_than_colours_are_no_copy(path: Path) -> None:
    def repeated(jpeg: bytes) -> bytes:
        scan = jpeg[jpeg.index(b"\xff\xda") : jpeg.rindex(b"\xff\xd9")]
        return jpeg[:-2] + 3 * scan + jpeg[-2:]

    assert len(_scans(_replace_tile(path, 27, repeated))) == 4
    with Slide.open(path) as slide:
        assert _copier(path, slide).copy(192, 192) is None


def test_only_jpeg_in_tiff_is_copied(tmp_path: Path) -> None:
    lzw = write_tiled_tiff(
        tmp_path / "lzw.tif", tissue_image(), compression="lzw", compressionargs=None
    )
    jpeg_2000 = write_tiffslide_only(tmp_path / "j2k.tif", tissue_image())
    dicom = write_dicom_slide(tmp_path / "dicom", tissue_image())
    for path in (lzw, jpeg_2000, dicom):
        with Slide.open(path) as slide:
            assert tile_copier(path, slide, TILE_PX, 0.5) is None


@needs_data
@pytest.mark.parametrize(
    "name, tile_px",
    [("wsi/cmu-1-small-region.svs", 240), ("wsi_derived/kidneyoncocytoma_HE_d4.tif", 256)],
)
def test_real_slides_tiles_are_copied(name: str, tile_px: int) -> None:
    path = REAL_DATA / name
    with Slide.open(path) as slide:
        copier = tile_copier(path, slide, tile_px, slide.mpp_x)
        assert copier is not None
        jpeg = copier.copy(3 * tile_px, 5 * tile_px)
        assert jpeg is not None
        with Image.open(io.BytesIO(jpeg), formats=["JPEG"]) as image:
            pixels = np.asarray(image.convert("RGB")).astype(int)
        read = slide.read((3 * tile_px, 5 * tile_px, tile_px, tile_px), (tile_px, tile_px))
    assert np.abs(pixels - read).max() <= 2


def _scans(jpeg: bytes) -> list[bytes]:
    return [segment.scan for segment in jpeg_stream.segments(jpeg) if segment.scan]


def _stored_tile(path: Path, number: int) -> bytes:
    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        offset, num_bytes = page.dataoffsets[number], page.databytecounts[number]
    return path.read_bytes()[offset : offset + num_bytes]


def _with_segments(jpeg: bytes, planted: list[tuple[int, bytes]]) -> bytes:
    written = b"".join(
        bytes((0xFF, marker)) + (len(payload) + 2).to_bytes(2, "big") + payload
        for marker, payload in planted
    )
    return jpeg[:2] + written + jpeg[2:]


def _replace_tile(path: Path, number: int, change: Any) -> bytes:
    """Append a changed copy of a tile of level 0 and let the file point at it."""
    jpeg: bytes = change(_stored_tile(path, number))
    end = path.stat().st_size
    with path.open("ab") as file:
        file.write(jpeg)
    set_tile_tag(path, "TileOffsets", number, end)
    set_tile_tag(path, "TileByteCounts", number, len(jpeg))
    return jpeg
