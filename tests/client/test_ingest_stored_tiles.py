"""JPEG tiles decoded without OpenSlide: its pixels to the bit, and no word in doubt."""

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import openslide
import pytest

from crafts_client.ingest.errors import SlideError
from crafts_client.ingest.readers import stored_tiles
from crafts_client.ingest.readers.openslide_files import OpenSlideFile
from crafts_client.ingest.readers.stored_tiles import StoredLevel, StoredTiles
from crafts_client.ingest.slides import Slide
from support.slide_files import set_tile_tag, write_tiffslide_only, write_tiled_tiff
from support.slides import damage_tile, tissue_image

SIDE = 500
"""No multiple of a tile's side, nor of the levels' downsamples."""
STORED: dict[str, dict[str, Any]] = {
    "YCbCr": {},
    "RGB": {"compressionargs": {"level": 90, "outcolorspace": "rgb"}},
    "half the colour": {"subsampling": (2, 2)},
    "coarse": {"compressionargs": {"level": 30}},
    "wide tiles": {"tile": (32, 96)},
}


def _write(folder: Path, **options: Any) -> Path:
    return write_tiled_tiff(folder / "s.tif", tissue_image()[:SIDE, :SIDE], num_levels=3, **options)


def _openslides(path: Path, level: int, corner: tuple[int, int], extent: tuple[int, int]) -> Any:
    """What the library reads, at a corner that is a whole pixel of the level."""
    with openslide.OpenSlide(path) as slide:
        x, y = (place << level for place in corner)
        return np.asarray(slide.read_region((x, y), level, extent).convert("RGB"))


def _boxes(side: int) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """A whole tile, one cut by the edge, and boxes across several."""
    rng = np.random.default_rng(0)
    drawn = [
        ((int(x), int(y)), (int(rng.integers(1, side - x + 1)), int(rng.integers(1, side - y + 1))))
        for x, y in rng.integers(0, side, (6, 2))
    ]
    edge = side - side % 64
    return [((64, 0), (64, 64)), ((edge, edge), (side - edge, side - edge)), *drawn]


@pytest.mark.parametrize("kind", STORED)
@pytest.mark.parametrize("level", [0, 1])
def test_pixels_are_openslides_to_the_bit(tmp_path: Path, kind: str, level: int) -> None:
    path = _write(tmp_path, **STORED[kind])
    with closing(OpenSlideFile(path)) as reader:
        assert reader._tiles().levels[level] is not None  # type: ignore[union-attr]
        for corner, extent in _boxes(SIDE >> level):
            read = reader.read(level, corner, extent)
            np.testing.assert_array_equal(read, _openslides(path, level, corner, extent))


def test_openslide_is_not_asked_for_plain_tiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> npt.NDArray[np.uint8]:
        raise AssertionError

    monkeypatch.setattr(OpenSlideFile, "_read_region", refuse)
    with Slide.open(_write(tmp_path)) as slide:
        assert slide.read((10, 20, 300, 300), (150, 150)).shape == (150, 150, 3)


def test_level_of_a_broken_scale_is_read_at_its_own_pixels(tmp_path: Path) -> None:
    """510 pixels become 127: OpenSlide would have to interpolate between them."""
    path = write_tiled_tiff(tmp_path / "s.tif", tissue_image()[:510, :510], num_levels=3)
    with Slide.open(path) as slide:
        level = slide.source.levels[2]
        assert level.downsample != round(level.downsample)
        x, y = slide.source.start(2, (5, 7))
        assert (x, y) == pytest.approx((5 * level.downsample, 7 * level.downsample))


def test_where_a_tile_was_left_out_openslide_is_asked(tmp_path: Path) -> None:
    path = _write(tmp_path)
    set_tile_tag(path, "TileByteCounts", 9, 0)
    with closing(StoredTiles.open(path, _levels(path))) as tiles:
        assert tiles.read(0, (64, 64), (64, 64)) is None
        assert tiles.read(0, (100, 0), (64, 64)) is not None
    with Slide.open(path) as slide:
        assert (slide.read((64, 64, 64, 64), (64, 64)) == 255).all()


def test_damaged_tile_is_an_error_and_its_neighbour_is_not(tmp_path: Path) -> None:
    path = _write(tmp_path)
    damage_tile(path, 9)
    with Slide.open(path) as slide:
        for _ in range(2):
            with pytest.raises(SlideError, match="cannot be decoded"):
                slide.read((100, 100, 64, 64), (64, 64))
            assert slide.read((128, 64, 64, 64), (64, 64)).shape == (64, 64, 3)


def test_other_tiles_than_jpeg_are_left_to_others(tmp_path: Path) -> None:
    lzw = _write(tmp_path, compression="lzw", compressionargs=None)
    jpeg_2000 = write_tiffslide_only(tmp_path / "j2k.tif", tissue_image())
    for path in (lzw, jpeg_2000):
        with closing(StoredTiles.open(path, _levels(lzw))) as tiles:
            assert tiles.levels == (None, None, None)


def test_tile_that_was_taken_in_part_is_decoded_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, asked = _write(tmp_path), []
    jpeg = StoredLevel.jpeg

    def ask(level: StoredLevel, column: int, row: int) -> bytes | None:
        asked.append((column, row))
        return jpeg(level, column, row)

    monkeypatch.setattr(StoredLevel, "jpeg", ask)
    with closing(StoredTiles.open(path, _levels(path))) as tiles:
        for corner in ((0, 0), (32, 0), (0, 32), (32, 32)):
            tiles.read(0, corner, (32, 32))
        assert asked == [(0, 0)]
        for _ in range(2):
            tiles.read(0, (64, 64), (64, 64))
        assert asked == [(0, 0), (1, 1), (1, 1)]
        assert len(tiles._cache) == 1


def test_cache_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_tiles, "CACHE_BYTES", 5 * 64 * 64 * 3)
    path = _write(tmp_path)
    with closing(StoredTiles.open(path, _levels(path))) as tiles:
        for top in range(0, SIDE - 10, 10):
            strip = tiles.read(0, (0, top), (SIDE, 10))
            assert strip is not None
            np.testing.assert_array_equal(strip, _openslides(path, 0, (0, top), (SIDE, 10)))
            assert 0 < len(tiles._cache) <= 5


def _levels(path: Path) -> Any:
    with closing(OpenSlideFile(path)) as reader:
        return reader.levels
