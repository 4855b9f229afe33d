"""Nuclei that are found again: against masks of drawn tissue, and against a slow matcher."""

import itertools

import numpy as np
import pytest

from crafts_core.evaluation.encoder import Images
from crafts_core.evaluation.nuclei_finder import (
    Floats,
    NucleiFinder,
    centres_of_condition,
    centres_of_foreground,
    compared,
    num_matched,
)
from crafts_core.procedural import phenotype, random_stain, render_region
from crafts_core.stains import stained_otherwise
from crafts_core.tiles.conditions import nuclei_condition
from crafts_core.vocabulary import cancer_type, sample_attributes

SIDE = 96


def _tissue(seed: int) -> tuple[Images, Floats, int]:
    rng = np.random.default_rng(seed)
    region = render_region(
        rng,
        width_px=SIDE,
        height_px=SIDE,
        mpp=1.0,
        phenotype=phenotype(sample_attributes(rng, cancer_type("KIRC"))),
        stain=random_stain(rng),
    )
    count = len(np.unique(region.instances[region.instances > 0]))
    return region.image, nuclei_condition(region.instances), count


def _many(seeds: range) -> tuple[Images, Floats]:
    drawn = [_tissue(seed) for seed in seeds]
    return np.stack([each[0] for each in drawn]), np.stack([each[1] for each in drawn])


@pytest.fixture(scope="module")
def finder() -> NucleiFinder:
    images_NHWC, condition_NCHW = _many(range(8))
    return NucleiFinder.teach(images_NHWC, condition_NCHW[:, 0] > 0.5, seed=0)


def test_a_mask_is_found_in_its_own_tile_and_in_no_other(finder: NucleiFinder) -> None:
    images_NHWC, condition_NCHW = _many(range(100, 106))
    patients = np.arange(6)
    own = compared(finder.see(images_NHWC), condition_NCHW, patients)
    other = compared(finder.see(images_NHWC), np.roll(condition_NCHW, 1, axis=0), patients)
    assert own.dice > 0.75
    assert own.found_again > 0.6
    assert own.dice_interval is not None
    assert own.dice_interval.low <= own.dice <= own.dice_interval.high
    assert other.dice < 0.5 * own.dice
    assert other.found_again < 0.5 * own.found_again


def test_empty_glass_has_none(finder: NucleiFinder) -> None:
    _, condition_NCHW = _many(range(100, 102))
    glass_NHWC = np.full((2, SIDE, SIDE, 3), 240, np.uint8)
    found = compared(finder.see(glass_NHWC), condition_NCHW, np.arange(2))
    assert found.dice == found.found_again == 0
    assert found.count_error == 1


def test_another_stain_is_no_advantage(finder: NucleiFinder) -> None:
    images_NHWC, condition_NCHW = _many(range(100, 104))
    paler_NHWC = stained_otherwise(images_NHWC, scale_S=np.full(3, 0.7), shift_S=np.zeros(3))
    same, paler = (
        compared(finder.see(each), condition_NCHW, np.arange(4))
        for each in (images_NHWC, paler_NHWC)
    )
    assert paler.dice == pytest.approx(same.dice, abs=0.05)


def test_masks_without_nuclei_do_not_count(finder: NucleiFinder) -> None:
    images_NHWC, condition_NCHW = _many(range(100, 102))
    patients = np.arange(2)
    one = compared(finder.see(images_NHWC[:1]), condition_NCHW[:1], patients[:1])
    condition_NCHW[1] = 0
    assert compared(finder.see(images_NHWC), condition_NCHW, patients) == one
    with pytest.raises(ValueError, match="no mask has a nucleus"):
        compared(finder.see(images_NHWC), np.zeros_like(condition_NCHW), patients)


@pytest.mark.parametrize("is_inside", [True, False])
def test_nobody_learns_from_one_kind_of_pixel(is_inside: bool) -> None:
    images_NHWC = np.zeros((2, 16, 16, 3), np.uint8)
    with pytest.raises(ValueError, match="with nuclei and with something else"):
        NucleiFinder.teach(images_NHWC, np.full((2, 16, 16), is_inside), seed=0)


@pytest.mark.parametrize("seed", range(4))
def test_each_nucleus_of_a_condition_has_one_middle(seed: int) -> None:
    """Also as a store keeps it, in 8 bits, and though nuclei touch or are long."""
    _, condition_CHW, count = _tissue(seed)
    stored_CHW = np.rint(condition_CHW * 255).astype(np.uint8).astype(np.float32) / 255
    assert len(centres_of_condition(stored_CHW)) == pytest.approx(count, abs=max(1, 0.05 * count))


def test_long_and_tiny_nuclei_are_one_each() -> None:
    labels_HW = np.zeros((40, 60), np.int64)
    labels_HW[4:34, 4:9] = 1
    labels_HW[4:34, 9:14] = 2  # beside it, as long
    labels_HW[20, 30] = 3
    assert len(centres_of_condition(nuclei_condition(labels_HW))) == 3


@pytest.mark.slow
def test_the_mask_itself_is_all_but_found(finder: NucleiFinder) -> None:
    """The most that anybody can have: its nuclei are told apart by their shape alone."""
    _, condition_NCHW = _many(range(100, 106))
    own = compared(condition_NCHW[:, 0] > 0.5, condition_NCHW, np.arange(6))
    assert own.dice == 1
    assert own.found_again > 0.9
    assert own.count_error < 0.2


def test_touching_discs_are_two() -> None:
    y, x = np.mgrid[:40, :60]
    discs_HW = ((y - 20) ** 2 + (x - 20) ** 2 <= 81) | ((y - 20) ** 2 + (x - 37) ** 2 <= 81)
    centres_C = centres_of_foreground(discs_HW)
    assert np.abs(np.sort(centres_C[:, 1]) - [20, 37]).max() <= 1.5
    assert len(centres_of_foreground(np.zeros((8, 8), bool))) == 0


@pytest.mark.parametrize("seed", range(5))
def test_matching_is_the_best_of_all(seed: int) -> None:
    """Beside every assignment that there is."""
    rng = np.random.default_rng(seed)
    first_C = rng.uniform(0, 12, (5, 2)).astype(np.float32)
    second_C = rng.uniform(0, 12, (4, 2)).astype(np.float32)
    best = max(
        sum(np.hypot(*(first_C[row] - second_C[place])) <= 4 for place, row in enumerate(rows))
        for rows in itertools.permutations(range(5), 4)
    )
    assert num_matched(first_C, second_C) == best
    assert num_matched(first_C, second_C[:0]) == 0
