"""A caption states only what the renderer draws: each attribute, toggled, moves the pixels."""

from functools import cache

import numpy as np
import pytest

from crafts_core.procedural import Stain, phenotype, render_region
from crafts_core.vocabulary import (
    CANCER_TYPES,
    GROWTH_PATTERNS,
    Feature,
    GrowthPattern,
    Stroma,
    TissueAttributes,
)

STAIN = Stain(
    hematoxylin=(0.65, 0.70, 0.29),
    eosin=(0.10, 0.95, 0.30),
    hematoxylin_strength=1.2,
    eosin_strength=0.8,
    white=(0.95, 0.95, 0.95),
    blur_um=0.3,
    noise=0.0,
)
STATED = sorted(
    {("crypts", "goblet cells"), ("crypts", "many lymphocytes"), ("alveoli", "red blood cells")}
    | {(p, f) for c in CANCER_TYPES for p in c.look.patterns for f in c.look.features}
)


def _pixels(pattern: GrowthPattern, stroma: Stroma, *features: Feature, seed: int) -> np.ndarray:
    attributes = TissueAttributes(
        growth_pattern=pattern, nuclear_grade="low", stroma=stroma, features=features
    )
    return render_region(
        np.random.default_rng(seed),
        width_px=128,
        height_px=128,
        mpp=1.0,
        phenotype=phenotype(attributes),
        stain=STAIN,
    ).image.astype(np.float64)


@cache
def _plain(pattern: GrowthPattern, seed: int) -> np.ndarray:
    """Without any feature: the same beside each that is stated of the pattern."""
    return _pixels(pattern, "moderate", seed=seed)


@pytest.mark.slow
@pytest.mark.parametrize(("pattern", "feature"), STATED)
def test_a_stated_feature_is_drawn(pattern: GrowthPattern, feature: Feature) -> None:
    moved = [
        np.abs(_pixels(pattern, "moderate", feature, seed=seed) - _plain(pattern, seed)).mean()
        for seed in range(3)
    ]
    assert np.mean(moved) > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("pattern", GROWTH_PATTERNS)
def test_the_stated_amount_of_stroma_is_drawn(pattern: GrowthPattern) -> None:
    scant, moderate, abundant = (
        np.stack([_pixels(pattern, amount, seed=seed) for seed in range(3)])
        for amount in ("scant", "moderate", "abundant")
    )
    assert np.abs(moderate - scant).mean() > 0.5
    assert np.abs(abundant - moderate).mean() > 0.5


def test_clear_and_eosinophilic_cells_are_both_seen() -> None:
    both = _pixels("sheets", "scant", "clear cytoplasm", "eosinophilic cytoplasm", seed=0)
    clear = _pixels("sheets", "scant", "clear cytoplasm", seed=0)
    pink = _pixels("sheets", "scant", "eosinophilic cytoplasm", seed=0)
    assert pink.mean() + 10 < both.mean() < clear.mean() - 10
