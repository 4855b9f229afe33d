"""Reading and cutting slides: exact scale, no guesses, damage contained."""

from pathlib import Path

import numpy as np
import pytest

from crafts_client.ingest.errors import SlideError
from crafts_client.ingest.slides import MissingScaleError, Slide
from crafts_client.ingest.tiling import Candidate, TilingOptions, grid, in_drawn_order
from crafts_simulations.slides import write_slide
from support.slide_files import write_tiled_tiff
from support.slides import REAL_DATA, damage_tile, tissue_image, write_tissue_slide

needs_data = pytest.mark.skipif(not REAL_DATA.is_dir(), reason="no shared data beside repository")


@pytest.fixture(scope="module")
def slide_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tissue_slide(tmp_path_factory.mktemp("slides") / "s.svs")


def test_tile_at_the_slides_own_scale_is_the_slides_pixels(slide_path: Path) -> None:
    with Slide.open(slide_path) as slide:
        tile = slide.read((100, 140, 64, 64), (64, 64))
    truth = tissue_image()[140:204, 100:164]
    assert np.abs(tile.astype(int) - truth).mean() < 3  # JPEG


@pytest.mark.parametrize("slide_mpp", [0.25, 0.37, 0.5, 1.0])
def test_tiles_have_exactly_the_wanted_scale(tmp_path: Path, slide_mpp: float) -> None:
    """Red and green are ramps over the slide, so colour tells position."""
    side = 1024
    ramp = np.linspace(0, 255, side)
    image = np.zeros((side, side, 3), dtype=np.uint8)
    image[..., 0], image[..., 1] = ramp[None, :], ramp[:, None]
    write_slide(tmp_path / "ramp.svs", image, mpp=slide_mpp, label="ramp", quality=100)
    options = TilingOptions(tile_px=64, mpp=1.0)
    with Slide.open(tmp_path / "ramp.svs") as slide:
        frames = grid(slide, options)
        x, y, width, height = frames[-1]
        tile = slide.read((x, y, width, height), (64, 64)).astype(float)
    assert width == pytest.approx(64 / slide_mpp)
    positions = (np.arange(64) + 0.5) * width / 64
    per_px = 255 / (side - 1)
    np.testing.assert_allclose(tile[32, :, 0], (x + positions - 0.5) * per_px, atol=2.5)
    np.testing.assert_allclose(tile[:, 32, 1], (y + positions - 0.5) * per_px, atol=2.5)


def test_grid_stays_on_the_slide_and_covers_it(slide_path: Path) -> None:
    with Slide.open(slide_path, mpp=0.37) as slide:
        frames = grid(slide, TilingOptions(tile_px=64, mpp=1.0))
    right, bottom = (frames[:, :2] + frames[:, 2:]).max(axis=0)
    assert len(frames) == 4
    assert max(right, bottom) <= 512
    assert len(np.unique(frames[:, 0])) == 2


def test_tiles_that_fit_exactly_are_all_there(slide_path: Path) -> None:
    with Slide.open(slide_path) as slide:
        assert len(grid(slide, TilingOptions(tile_px=64, mpp=1.0))) == 16


def test_slide_coarser_than_the_tiles_is_refused(slide_path: Path) -> None:
    with Slide.open(slide_path) as slide, pytest.raises(SlideError, match=r"coarser than 0\.25"):
        grid(slide, TilingOptions(tile_px=64, mpp=0.25))


@pytest.mark.parametrize("mpp", [0.001, 352.8])
def test_placeholder_scale_is_no_scale(tmp_path: Path, mpp: float) -> None:
    path = write_tissue_slide(tmp_path / "s.svs", mpp=mpp)
    with pytest.raises(MissingScaleError, match="cannot be right"):
        Slide.open(path)
    with Slide.open(path, mpp=0.5) as slide:
        assert slide.mpp_x == 0.5


def test_file_that_is_no_slide_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "DOE.svs").write_bytes(b"II*\0 not really")
    with pytest.raises(SlideError) as caught:
        Slide.open(tmp_path / "DOE.svs")
    assert "DOE" not in str(caught.value)


def test_slide_is_read_on_after_a_damaged_place(tmp_path: Path) -> None:
    path = write_tissue_slide(tmp_path / "s.svs")
    damage_tile(path, 0)
    with Slide.open(path) as slide:
        with pytest.raises(SlideError, match="cannot be decoded"):
            slide.read((0, 0, 128, 128), (64, 64))
        assert slide.read((256, 256, 128, 128), (64, 64)).shape == (64, 64, 3)


def test_thumbnail_shows_the_whole_slide(slide_path: Path) -> None:
    with Slide.open(slide_path) as slide:
        thumbnail = slide.thumbnail(max_px=1024, min_mpp=4.0)
    assert thumbnail.shape == (64, 64, 3)
    truth = tissue_image().reshape(64, 8, 64, 8, 3).mean(axis=(1, 3))
    assert np.abs(thumbnail - truth).mean() < 6


def test_thumbnail_in_pieces_equals_thumbnail_in_one(
    slide_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Slide.open(slide_path) as slide:
        whole = slide.thumbnail(max_px=64, min_mpp=0.1)
        monkeypatch.setattr("crafts_client.ingest.slides.MAX_READ_PX", 100)
        pieces = slide.thumbnail(max_px=64, min_mpp=0.1)
    assert np.abs(whole.astype(int) - pieces).mean() < 1.0


def test_damaged_coarse_level_is_made_up_for_by_a_finer_one(tmp_path: Path) -> None:
    path = write_tiled_tiff(tmp_path / "s.tif", tissue_image(), num_levels=4)
    with Slide.open(path) as slide:
        whole = slide.thumbnail(max_px=1024, min_mpp=4.0)
        assert slide.damaged_levels == set()
    for level in (2, 3):
        damage_tile(path, 0, page=level)
    with Slide.open(path) as slide:
        mended = slide.thumbnail(max_px=1024, min_mpp=4.0)
        assert slide.damaged_levels == {2, 3}
    assert np.abs(mended.astype(int) - whole).mean() < 3


def test_thumbnail_of_a_slide_damaged_on_every_level_is_an_error(tmp_path: Path) -> None:
    path = write_tiled_tiff(tmp_path / "s.tif", tissue_image(), num_levels=2)
    for level in (0, 1):
        damage_tile(path, 0, page=level)
    with Slide.open(path) as slide, pytest.raises(SlideError, match="cannot be decoded"):
        slide.thumbnail(max_px=1024, min_mpp=4.0)


def test_drawn_order_is_keyed_and_of_one_slide_alone() -> None:
    places = [Candidate(x=x, y=0, width=1, height=1, tissue_fraction=1) for x in range(50)]
    drawn = in_drawn_order(places, b"key")
    assert drawn == in_drawn_order(places[::-1], b"key")
    assert drawn != in_drawn_order(places, b"other")
    assert [p for p in drawn if p.x < 25] == in_drawn_order(places[:25], b"key")


@pytest.mark.parametrize("changes", [{"tile_px": 4}, {"mpp": 0.0}, {"max_tiles_per_slide": 0}])
def test_impossible_options_are_refused(changes: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected"):
        TilingOptions(**({"tile_px": 64, "mpp": 1.0} | changes))  # type: ignore[arg-type]


@needs_data
def test_real_slide_without_scale_needs_one() -> None:
    path = REAL_DATA / "wsi" / "tcga-cr-7395-01a-01-ts1.svs"
    with pytest.raises(MissingScaleError, match="column mpp"):
        Slide.open(path)


@needs_data
@pytest.mark.parametrize("name", ["broken.svs", "small_dicom.dcm", "smalltif.tif"])
def test_real_file_that_openslide_refuses_is_one_clear_error(name: str) -> None:
    with pytest.raises(SlideError):
        Slide.open(REAL_DATA / "wsi" / name)
