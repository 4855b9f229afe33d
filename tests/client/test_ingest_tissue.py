"""Tissue, pen and focus: functions of one slide alone."""

import io
import timeit

import numpy as np
import pytest
from PIL import Image, ImageFilter
from scipy import ndimage

from crafts_client.ingest.tiling import TilingOptions, candidates
from crafts_client.ingest.tissue import (
    TissueMethod,
    drop_small_regions,
    fill_small_holes,
    find_tissue,
    judge,
    otsu_threshold,
    pen_mask,
    sharpness,
    smoothed,
    tissue_fraction,
    tissue_mask,
)
from support.slides import REAL_DATA, tissue_image

needs_data = pytest.mark.skipif(not REAL_DATA.is_dir(), reason="no shared data beside repository")
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


GREEN, BLUE, INVERTED = "green", "blue", "inverted"


def recoloured(image: np.ndarray, how: str) -> np.ndarray:
    if how == INVERTED:
        return 255 - image
    return np.ascontiguousarray(image[..., (1, 0, 2) if how == GREEN else (1, 2, 0)])


@pytest.mark.parametrize("how", [GREEN, BLUE, INVERTED])
def test_slide_that_is_wholly_ink_is_a_stain(how: str) -> None:
    """Trichrome is green or blue, and fluorescence is black: nothing of it is ink."""
    image = recoloured(dense_tissue(), how)
    mask = find_tissue(image, mpp=4.0, slide_px=(256, 256))
    assert mask.ink_coloured > 0.9
    assert mask.is_stained_like_ink
    assert not mask.is_pen_HW.any()
    assert mask.is_tissue_HW[40:216, 40:216].mean() > 0.95


def test_strokes_on_bare_glass_stay_ink() -> None:
    """Ink is even where tissue is not: a slide of nothing but strokes gives nothing."""
    image = page(side=256)
    image[64:192, 32:224] = (60, 170, 140)
    noise = np.random.default_rng(0).normal(0, 1.5, image.shape)
    image = np.clip(image + noise, 0, 255).astype(np.uint8)
    mask = find_tissue(image, mpp=4.0, slide_px=(256, 256))
    assert mask.ink_coloured > 0.9
    assert not mask.is_stained_like_ink
    assert not mask.is_tissue_HW.any()


def test_nothing_is_ink_where_ink_is_kept() -> None:
    image = dense_tissue()
    image[24:232, 24:120] = recoloured(image, GREEN)[24:232, 24:120]
    sought = find_tissue(image, mpp=4.0, slide_px=(256, 256))
    assert 0.3 < sought.ink_coloured < 0.6
    assert sought.is_pen_HW[40:216, 40:110].all()
    kept = find_tissue(image, mpp=4.0, slide_px=(256, 256), seeks_ink=False)
    assert not kept.is_pen_HW.any()
    assert kept.is_tissue_HW[40:216, 40:216].mean() > 0.95


def test_thin_ink_counts_only_beside_a_stroke() -> None:
    thin, ink = (225, 135, 140), (205, 25, 25)
    image = page()
    image[40:50] = thin
    assert not pen_mask(image).any()
    image[50:60] = ink
    assert pen_mask(image)[40:60].all()


def folded(image: np.ndarray) -> np.ndarray:
    """The same tissue with a fold down the middle: light passes it twice."""
    once = image[:, 120:136] / 255
    with_fold = image.copy()
    with_fold[:, 120:136] = np.rint(255 * once**2.5)
    return with_fold


def test_fold_is_found_and_its_tiles_are_rejected() -> None:
    image = folded(dense_tissue())
    mask = find_tissue(image, mpp=4.0, slide_px=(2560, 2560))
    assert mask.is_fold_HW[40:216, 122:134].mean() > 0.95
    assert mask.is_fold_HW[:, :115].mean() < 0.01
    frames = np.array([[1120, 1120, 320, 320], [480, 1120, 320, 320.0]])
    kept, rejected = candidates(frames, mask, TilingOptions(tile_px=32, mpp=1.0))
    assert [place.x for place in kept] == [480]
    assert rejected == {"pen": 0, "fold": 1, "background": 0}


@pytest.mark.parametrize("gain", [0.75, 1.0, 1.1])
def test_slide_without_folds_loses_nothing(gain: float) -> None:
    image = np.clip(dense_tissue() * gain, 0, 255).astype(np.uint8)
    mask = find_tissue(image, mpp=4.0, slide_px=(2560, 2560))
    assert mask.is_fold_HW.mean() < 0.001


def test_a_fold_is_measured_against_its_own_slide() -> None:
    """The same stretch of tissue is a fold in a pale slide and nothing special in a dark one."""
    pale, dark = folded(dense_tissue()), dense_tissue()
    dark[40:216, 40:216] = pale[40:216, 122:134].mean(axis=(0, 1))
    assert find_tissue(pale, mpp=4.0, slide_px=(256, 256)).is_fold_HW.sum() > 1000
    assert not find_tissue(dark, mpp=4.0, slide_px=(256, 256)).is_fold_HW.any()


def dense_tissue() -> np.ndarray:
    """Uneven pink and purple, as a thumbnail shows it, in the middle of glass."""
    noise = np.random.default_rng(1).normal(0, 12, (256, 256, 1))
    image = np.clip(np.array([200, 125, 175]) + noise, 0, 255).astype(np.uint8)
    tissue = page(side=256)
    tissue[24:232, 24:232] = image[24:232, 24:232]
    return tissue


def test_pale_fat_beside_dense_tissue_is_kept() -> None:
    image = page(side=256)
    image[32:224, 32:128] = (150, 60, 140)
    image[32:224, 128:224] = (242, 220, 232)
    assert tissue_mask(image)[40:216, 40:216].all()


def test_fixed_method_keeps_the_palest_fat() -> None:
    image = page(side=256)
    image[32:224, 32:128] = (150, 60, 140)
    image[32:224, 128:224] = (244, 231, 238)
    pale = (slice(40, 216), slice(136, 216))
    assert not tissue_mask(image)[pale].any()
    assert tissue_mask(image, TissueMethod.FIXED)[pale].all()
    assert not tissue_mask(image, TissueMethod.FIXED)[:28].any()


def test_luminance_finds_what_has_no_colour() -> None:
    image = page()
    image[32:96, 32:96] = (150, 152, 151)
    assert not tissue_mask(image).any()
    mask = tissue_mask(image, TissueMethod.LUMINANCE)
    assert mask[36:92, 36:92].all()
    assert not mask[:28].any()


def test_with_method_all_everything_is_tissue() -> None:
    assert find_tissue(
        page(PINK), mpp=4.0, slide_px=(128, 128), method=TissueMethod.ALL
    ).is_tissue_HW.all()


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
    least = TilingOptions(tile_px=64, mpp=1.0).min_sharpness
    assert sharpness(np.asarray(blurred)) < least < sharpness(tile)


def test_sharpness_is_the_variance_of_the_laplacian() -> None:
    tile = np.random.default_rng(0).integers(0, 256, (65, 64, 3), dtype=np.uint8)
    every_row = ndimage.laplace(tile[..., 1].astype(float))[1:-1, 1:-1]
    assert sharpness(tile) == pytest.approx(every_row[::2].var(), rel=1e-5)
    assert sharpness(page()) == 0.0


def test_fraction_of_one_tile_counts_coloured_pixels() -> None:
    tile = page(side=64)
    tile[:16] = PINK
    assert tissue_fraction(tile) == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("method", "fraction"), [("otsu", 0.25), ("fixed", 0.5), ("luminance", 0.5), ("all", 1.0)]
)
def test_fraction_of_one_tile_follows_the_method(method: str, fraction: float) -> None:
    tile = page(side=64)
    tile[:16] = PINK
    tile[16:32] = (224, 212, 220)
    assert tissue_fraction(tile, TissueMethod(method)) == pytest.approx(fraction)


def test_judge_gives_both_scores() -> None:
    tile = tissue_image(64, margin=0)
    quality = judge(tile)
    assert quality.sharpness == sharpness(tile)
    assert quality.tissue_fraction == tissue_fraction(tile) == 1.0


def test_judging_is_cheap_beside_decoding() -> None:
    tile = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    coded = io.BytesIO()
    Image.fromarray(tile).save(coded, "JPEG", quality=90)

    def decode() -> None:
        np.asarray(Image.open(io.BytesIO(coded.getvalue())).convert("RGB"))

    least = [min(timeit.repeat(f, number=20, repeat=5)) for f in (lambda: judge(tile), decode)]
    assert least[0] < least[1]


def test_mask_is_addressed_in_level0_pixels() -> None:
    image = page()
    image[:, 64:] = PINK
    mask = find_tissue(image, mpp=8.0, slide_px=(1280, 640))
    frames = np.array([[0, 0, 320, 320], [480, 0, 320, 320], [900, 300, 320, 320.0]])
    fractions = mask.fractions(frames)
    np.testing.assert_allclose(fractions.tissue_N, [0, 0.5, 1], atol=0.1)
    assert not fractions.pen_N.any()
    assert not fractions.fold_N.any()


def artefact(name: str, reduction: int = 4) -> np.ndarray:
    image = Image.open(REAL_DATA / "artefacts" / f"{name}.png").convert("RGB")
    return np.asarray(image.reduce(reduction))


@needs_data
@pytest.mark.parametrize(
    ("name", "least_pen", "most_pen"),
    [
        ("tcga-green-pen", 0.17, 0.3),
        ("tcga-red-pen", 0.25, 0.4),
        ("no-tissue-green-pen", 0.6, 1.0),
        ("no-tissue-red-pen", 0.45, 0.8),
        ("medium-nuclei-score-green-pen-level1", 0.5, 0.7),
        ("very-low-nuclei-score-red-pen-level1", 0.22, 0.4),
        ("medium-nuclei-score-level1", 0.0, 0.001),
        ("medium-nuclei-score-level1-2", 0.0, 0.001),
        ("medium-nuclei-score-level2", 0.0, 0.001),
        ("high-nuclei-score-level2", 0.0, 0.001),
        ("low-nuclei-score-level0", 0.0, 0.001),
        ("low-nuclei-score-level1", 0.0, 0.001),
        ("tcga-lung-rgb", 0.0, 0.001),
    ],
)
def test_pen_on_real_slides(name: str, least_pen: float, most_pen: float) -> None:
    image = artefact(name)
    assert least_pen <= pen_mask(smoothed(image)).mean() <= most_pen
    size = image.shape[1], image.shape[0]
    assert not find_tissue(image, mpp=4.0, slide_px=size).is_stained_like_ink


@needs_data
def test_rings_drawn_on_tissue_are_found() -> None:
    """Three colours of ink over a third of one real slide's thumbnail."""
    assert pen_mask(smoothed(artefact("diagnostic-slide-thumb-rgb", 1))).mean() > 0.27


@needs_data
@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        ("high-nuclei-score-red-pen-level1", 0.06, 0.12),
        ("medium-nuclei-score-level1", 0.0, 0.001),
        ("medium-nuclei-score-level1-2", 0.0, 0.005),
        ("high-nuclei-score-level2", 0.0, 0.001),
        ("low-nuclei-score-level1", 0.0, 0.02),
    ],
)
def test_folds_on_real_slides(name: str, least: float, most: float) -> None:
    """The first has one fold from side to side."""
    image = artefact(name)
    mask = find_tissue(image, mpp=4.0, slide_px=(image.shape[1], image.shape[0]))
    assert least <= mask.is_fold_HW.sum() / mask.is_tissue_HW.sum() <= most


@needs_data
@pytest.mark.parametrize("name", ["no-tissue", "no-tissue2", "no-tissue-line", "almost-white-1"])
@pytest.mark.parametrize("method", [TissueMethod.OTSU, TissueMethod.FIXED, TissueMethod.LUMINANCE])
def test_real_glass_is_not_tissue(name: str, method: TissueMethod) -> None:
    image = artefact(name)
    size = (image.shape[1], image.shape[0])
    assert find_tissue(image, mpp=4.0, slide_px=size, method=method).is_tissue_HW.mean() < 0.01
