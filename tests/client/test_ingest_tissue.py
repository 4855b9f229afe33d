"""Tissue, pen and focus: functions of one slide alone."""

import numpy as np
import pytest
from PIL import Image, ImageFilter

from crafts_client.ingest.tissue import (
    drop_small_regions,
    fill_small_holes,
    find_tissue,
    otsu_threshold,
    pen_mask,
    sharpness,
    tissue_fraction,
    tissue_mask,
)
from support.slides import REAL_DATA, tissue_image

PINK, GLASS = (225, 160, 200), (244, 243, 245)


def page(colour: tuple[int, int, int] = GLASS, side: int = 128) -> np.ndarray:
    return np.full((side, side, 3), colour, dtype=np.uint8)


def test_tissue_is_where_the_colour_is() -> None:
    mask = tissue_mask(tissue_image(256, margin=64))
    assert mask[72:184, 72:184].all()
    assert not mask[:56].any()


def test_empty_glass_is_not_split_into_noise() -> None:
    noise = np.random.default_rng(0).integers(-3, 4, (128, 128, 3))
    assert not tissue_mask((page().astype(int) + noise).astype(np.uint8)).any()


def test_slide_full_of_tissue_is_not_split_in_two() -> None:
    image = page(PINK)
    image[:64] = (150, 60, 120)
    assert tissue_mask(image).all()


def test_tinted_glass_is_glass() -> None:
    image = page((245, 226, 220))
    image[32:96, 32:96] = PINK
    mask = tissue_mask(image)
    assert mask[40:88, 40:88].all()
    assert not mask[:24].any()


@pytest.mark.parametrize(
    "ink", [(60, 170, 140), (70, 120, 210), (205, 25, 25), (25, 25, 28)], ids=str
)
def test_pen_strokes_are_found(ink: tuple[int, int, int]) -> None:
    image = tissue_image(128, margin=16)
    image[60:70] = ink
    assert pen_mask(image)[60:70].all()


def test_stained_tissue_is_not_pen() -> None:
    assert pen_mask(tissue_image(256, margin=32)).mean() < 0.01


def test_small_regions_go_and_large_ones_stay() -> None:
    mask = np.zeros((20, 20), dtype=bool)
    mask[0:2, 0:2] = mask[10:15, 10:15] = True
    assert drop_small_regions(mask, 5).sum() == 25
    assert not drop_small_regions(np.zeros((4, 4), dtype=bool), 1).any()


def test_small_holes_fill_and_large_ones_stay() -> None:
    mask = np.ones((40, 40), dtype=bool)
    mask[5:7, 5:7] = mask[15:35, 15:35] = False
    filled = fill_small_holes(mask, 50)
    assert filled[5:7, 5:7].all()
    assert not filled[15:35, 15:35].any()


def test_otsu_splits_two_heaps_between_them() -> None:
    values = np.array([10] * 50 + [12] * 50 + [200] * 40, dtype=np.uint8)
    assert 12 / 255 <= otsu_threshold(values) < 200 / 255


def test_blur_lowers_sharpness() -> None:
    tile = tissue_image(64, margin=0)
    blurred = Image.fromarray(tile).filter(ImageFilter.GaussianBlur(3))
    assert sharpness(np.asarray(blurred)) < 25 < sharpness(tile)


def test_fraction_of_one_tile_counts_coloured_pixels() -> None:
    tile = page(side=64)
    tile[:16] = PINK
    assert tissue_fraction(tile) == pytest.approx(0.25)


def test_mask_is_addressed_in_level0_pixels() -> None:
    image = page()
    image[:, 64:] = PINK
    mask = find_tissue(image, mpp=8.0, slide_px=(1280, 640))
    frames = np.array([[0, 0, 320, 320], [480, 0, 320, 320], [900, 300, 320, 320.0]])
    tissue, pen = mask.fractions(frames)
    np.testing.assert_allclose(tissue, [0, 0.5, 1], atol=0.1)
    assert not pen.any()


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="no shared data beside the repository")
@pytest.mark.parametrize(
    ("name", "least_pen", "most_pen"),
    [
        ("tcga-green-pen", 0.10, 0.3),
        ("tcga-red-pen", 0.15, 0.4),
        ("no-tissue-green-pen", 0.6, 1.0),
        ("medium-nuclei-score-level1", 0.0, 0.001),
        ("high-nuclei-score-level2", 0.0, 0.001),
    ],
)
def test_pen_on_real_slides(name: str, least_pen: float, most_pen: float) -> None:
    image = Image.open(REAL_DATA / "artefacts" / f"{name}.png").convert("RGB").reduce(4)
    assert least_pen <= pen_mask(np.asarray(image)).mean() <= most_pen


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="no shared data beside the repository")
@pytest.mark.parametrize("name", ["no-tissue", "no-tissue2", "no-tissue-line", "almost-white-1"])
def test_real_glass_is_not_tissue(name: str) -> None:
    image = np.asarray(Image.open(REAL_DATA / "artefacts" / f"{name}.png").convert("RGB").reduce(4))
    mask = find_tissue(image, mpp=4.0, slide_px=(image.shape[1], image.shape[0]))
    assert mask.is_tissue_HW.mean() < 0.01
