"""Procedural tissue: deterministic, exact in size and scale, coloured as H&E is."""

import numpy as np
import pytest

from crafts_core.procedural import Phenotype, Stain, phenotype, random_stain, render_region
from crafts_core.vocabulary import GROWTH_PATTERNS, TissueAttributes

PLAIN = Stain(
    hematoxylin=(0.65, 0.70, 0.29),
    eosin=(0.10, 0.95, 0.30),
    hematoxylin_strength=1.2,
    eosin_strength=0.8,
    white=(0.95, 0.95, 0.95),
    blur_um=0.3,
    noise=0.005,
)


def _tissue(pattern: str = "sheets", *features: str) -> Phenotype:
    return phenotype(
        TissueAttributes(
            growth_pattern=pattern,  # type: ignore[arg-type]
            nuclear_grade="intermediate",
            stroma="moderate",
            features=features,  # type: ignore[arg-type]
        )
    )


def _draw(look: Phenotype, seed: int = 0, px: int = 96, mpp: float = 1.0, stain: Stain = PLAIN):
    rng = np.random.default_rng(seed)
    return render_region(rng, width_px=px, height_px=px, mpp=mpp, phenotype=look, stain=stain)


def test_the_same_seed_draws_the_same_pixels() -> None:
    np.testing.assert_array_equal(_draw(_tissue()).image, _draw(_tissue()).image)
    assert (_draw(_tissue()).image != _draw(_tissue(), seed=1).image).any()


@pytest.mark.parametrize("mpp", [0.25, 0.5, 1.0, 4.0])
@pytest.mark.parametrize(("width", "height"), [(1, 1), (64, 48), (33, 129)])
def test_any_size_and_resolution_can_be_drawn(width: int, height: int, mpp: float) -> None:
    region = render_region(
        np.random.default_rng(0),
        width_px=width,
        height_px=height,
        mpp=mpp,
        phenotype=_tissue("glands"),
        stain=PLAIN,
    )
    assert region.image.shape == (height, width, 3)
    assert region.instances.shape == (height, width)


@pytest.mark.parametrize("pattern", GROWTH_PATTERNS)
def test_nuclei_are_darker_and_bluer_than_the_rest(pattern: str) -> None:
    region = _draw(_tissue(pattern), px=128)
    inside = region.instances > 0
    assert 0.02 < inside.mean() < 0.8
    nuclei, rest = region.image[inside].mean(0), region.image[~inside].mean(0)
    assert nuclei[0] < rest[0] - 20
    assert nuclei[2] - nuclei[0] > rest[2] - rest[0]


def test_nuclei_keep_their_size_in_micrometres() -> None:
    def area_um2(px: int, mpp: float) -> float:
        instances = _draw(_tissue("fibrillar"), px=px, mpp=mpp).instances
        sizes = np.bincount(instances.ravel())[1:]
        return float(np.median(sizes[sizes > 0])) * mpp**2

    assert area_um2(512, 0.25) == pytest.approx(area_um2(192, 0.66), rel=0.3)


def test_clear_cells_are_paler_than_eosinophilic_ones() -> None:
    clear = _draw(_tissue("sheets", "clear cytoplasm")).image.mean()
    pink = _draw(_tissue("sheets", "eosinophilic cytoplasm")).image.mean()
    assert clear > pink + 20


def test_stains_differ_more_than_tissue_noise() -> None:
    means = [
        _draw(_tissue(), stain=random_stain(np.random.default_rng(seed))).image.mean((0, 1))
        for seed in range(8)
    ]
    assert np.std(means, axis=0).mean() > 5


@pytest.mark.parametrize(("px", "mpp"), [(0, 1.0), (64, 0.0), (64, float("nan"))])
def test_a_region_without_pixels_or_scale_is_refused(px: int, mpp: float) -> None:
    with pytest.raises(ValueError, match="positive size and mpp"):
        _draw(_tissue(), px=px, mpp=mpp)
