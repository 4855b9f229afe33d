"""Colour told, matched and removed, against least squares and by construction."""

import numpy as np
import numpy.typing as npt
import pytest

from crafts_core.evaluation.colour import (
    ColourMap,
    ColourMoments,
    colour_features,
    colour_statistics,
    grey_levels,
    grey_structure,
    in_colours_of,
)
from crafts_core.evaluation.encoder import Images
from crafts_core.stains import from_density, optical_density

MATRIX_CC = np.array([[0.8, 0.1, 0.05], [0.1, 0.9, -0.1], [0.05, -0.1, 1.1]])
SHIFT_C = np.array([0.1, 0.05, 0.12])


def tissue(seed: int, count: int = 6, side: int = 24) -> Images:
    """Pixels of two stains in random amounts, far from black and white."""
    rng = np.random.default_rng(seed)
    amounts_NHWS = rng.uniform(0.05, 0.8, (count, side, side, 2))
    density_NHWC = amounts_NHWS @ np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11]])
    noise_NHWC = rng.normal(0, 0.03, density_NHWC.shape)
    return from_density((density_NHWC + noise_NHWC + 0.1).astype(np.float32))


def restained(images_NHWC: Images) -> Images:
    density_NHWC = optical_density(images_NHWC, np.float32) @ MATRIX_CC.astype(np.float32)
    return from_density(density_NHWC + SHIFT_C.astype(np.float32))


def pixels(images_NHWC: Images) -> npt.NDArray[np.float64]:
    return optical_density(images_NHWC, np.float32).reshape(-1, 3).astype(np.float64)


def test_pixels_survive_the_way_to_density_and_back() -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    assert np.array_equal(from_density(optical_density(levels, np.float32)), levels)


def test_the_colour_map_is_that_of_least_squares_over_pairs_of_pixels() -> None:
    """Pixel by pixel it never saw the pairs: moments alone give the map back."""
    before, after = tissue(0), restained(tissue(0))
    found = ColourMap.between(ColourMoments.of(before), ColourMoments.of(after))
    design = np.concatenate([pixels(before), np.ones((len(pixels(before)), 1))], axis=1)
    slow, *_ = np.linalg.lstsq(design, pixels(after), rcond=None)
    assert found.matrix_CC == pytest.approx(slow[:3], abs=0.03)
    assert found.shift_C == pytest.approx(slow[3], abs=0.03)
    assert np.abs(pixels(found(before)) - pixels(after)).mean() < 0.01


def test_mapped_tiles_have_the_moments_of_the_target() -> None:
    target = ColourMoments.of(restained(tissue(1)))
    mapped = ColourMoments.of(in_colours_of(tissue(2), target))
    assert mapped.mean_C == pytest.approx(target.mean_C, abs=0.01)
    assert mapped.covariance_CC == pytest.approx(target.covariance_CC, abs=0.005)


def test_the_map_between_equal_colours_changes_nothing() -> None:
    moments = ColourMoments.of(tissue(3))
    found = ColourMap.between(moments, moments)
    assert found.matrix_CC == pytest.approx(np.eye(3), abs=1e-6)
    assert np.array_equal(found(tissue(3)), tissue(3))


def test_tiles_of_one_colour_are_mapped_to_something_finite() -> None:
    flat = np.full((2, 32, 32, 3), 200, np.uint8)
    mapped = in_colours_of(flat, ColourMoments.of(tissue(4)))
    assert np.ptp(mapped, axis=(0, 1, 2)).max() <= 1
    assert np.isfinite(colour_features(flat)).all()
    assert np.isfinite(grey_structure(flat)).all()
    with pytest.raises(ValueError, match="at least one tile"):
        ColourMoments.of(flat[:0])


def test_statistics_are_those_of_each_tile_alone() -> None:
    images = tissue(5, count=300, side=4)
    slow = [
        np.concatenate([d.mean(0), np.log(d.std(0))])
        for d in (pixels(image[None]) for image in images)
    ]
    assert colour_statistics(images) == pytest.approx(np.stack(slow))
    features = colour_features(images)
    assert features.shape == (300, 21)
    assert features[7, 6] == pytest.approx(np.cov(pixels(images[7:8]).T, bias=True)[0, 0])


def test_a_grey_tile_forgets_its_stain() -> None:
    images = tissue(6)
    grey, other = grey_structure(images), grey_structure(restained(images))
    assert np.ptp(grey, axis=3).max() == 0
    levels = grey_levels(grey)
    assert levels[:, 4] == pytest.approx([np.median(image) for image in grey])
    assert levels == pytest.approx(grey_levels(other), abs=2)
    difference = np.abs(grey.astype(int) - other.astype(int)).mean()
    assert difference < 0.1 * grey.std()
    assert np.abs(grey.astype(int) - grey_structure(tissue(7)).astype(int)).mean() > grey.std()
