"""Variants of a tile: the same tissue, turned and stained otherwise."""

import numpy as np
import pytest

from crafts_core.stains import STAIN_SC, stained_otherwise
from crafts_core.tiles.augment import turned_as_view, view_of

TILE = np.random.default_rng(0).integers(60, 250, (32, 32, 3), dtype=np.uint8)


def test_view_zero_is_the_tile() -> None:
    assert view_of(TILE, 0, key=b"a") is TILE


def test_a_view_is_the_same_for_the_same_tile_only() -> None:
    one = view_of(TILE, 1, key=b"a")
    assert np.array_equal(one, view_of(TILE, 1, key=b"a"))
    assert not np.array_equal(one, view_of(TILE, 2, key=b"a"))
    assert not np.array_equal(one, view_of(TILE, 1, key=b"b"))


def test_all_eight_orientations_come() -> None:
    ramp = np.repeat(np.arange(64, dtype=np.uint8).reshape(8, 8, 1) * 3 + 40, 3, axis=2)
    orders = {
        tuple(np.argsort(view_of(ramp, view, key=b"k").sum(axis=2).ravel())[:5])
        for view in range(1, 80)
    }
    assert len(orders) == 8


def test_unchanged_stains_give_the_tile_back() -> None:
    same = stained_otherwise(TILE, scale_S=np.ones(3), shift_S=np.zeros(3))
    assert np.abs(same.astype(int) - TILE).max() <= 1


@pytest.mark.parametrize("stain", [0, 1])
def test_one_stain_alone_moves(stain: int) -> None:
    """A pixel of one stain twice as dense is what Beer and Lambert say."""
    unit = STAIN_SC[stain] / np.linalg.norm(STAIN_SC[stain])
    pixel = np.rint(256 * np.exp(-0.4 * unit) - 1).astype(np.uint8).reshape(1, 1, 3)
    scale = np.where(np.arange(3) == stain, 2.0, 1.0)
    denser = stained_otherwise(pixel, scale_S=scale, shift_S=np.zeros(3))
    expected = 256 * np.exp(-0.8 * unit) - 1
    assert np.abs(denser.ravel() - expected).max() < 4


def test_what_lies_over_a_tile_turns_with_it_and_keeps_its_values() -> None:
    tile = np.full((16, 16, 3), 230, np.uint8)
    tile[2:4, 9:12] = 20
    over = (tile == 20).astype(np.uint8)
    for view in range(12):
        seen, turned = view_of(tile, view, key=b"k"), turned_as_view(over, view, key=b"k")
        assert np.array_equal(seen.mean(axis=2) < 125, turned[..., 0] == 1)
