"""Private updates as integers of a sum: exact, at both ends of the group, and sent once."""

import json
import math
import pickle
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from crafts_core.plan import Plan
from crafts_privacy.secure_aggregation.fixed_point import from_group
from crafts_privacy.secure_aggregation.masking import Group, add_up_
from crafts_privacy.secure_aggregation.updates import HeldUpdate, UpdateGrid
from support.summing_sites import plan_of_updates
from support.sums import SumSite, members_of, roster_of, sum_sites

RULES = ("by_patients", "uniform", "alignment_regularized")
SIZES = st.lists(st.integers(1, 5000), min_size=3, max_size=12)


def plan_of(rule: str, **stage: object) -> Plan:
    return plan_of_updates(rule=rule, stage=stage)


def grid_of(plan: Plan, patients: dict[str, int], noise_multiplier: float = 1.5) -> UpdateGrid:
    return UpdateGrid.of(plan, plan.stage[0], patients, noise_multiplier=noise_multiplier)


def added(vectors: list[Group]) -> Group:
    total = np.zeros_like(vectors[0])
    for vector in vectors:
        add_up_(total, vector)
    return total


@settings(max_examples=60, deadline=None)
@given(SIZES, st.sampled_from(RULES), st.sampled_from(["sgd", "adam"]), st.integers(0, 2**32 - 1))
def test_the_sum_is_the_weighted_sum_of_updates_rounded_once_each(
    sizes: list[int], rule: str, optimizer: str, seed: int
) -> None:
    """Oracles: Python's integers, and rational numbers for what rounding may cost."""
    grid = grid_of(
        plan_of(rule, optimizer=optimizer), dict(zip("abcdefghijkl", sizes, strict=False))
    )
    source = torch.Generator().manual_seed(seed)
    updates = {
        site: torch.randn(5, generator=source) * delta.noise_std
        for site, delta in grid.declared.items()
    }
    opened = grid.opened(added([grid.part_of(site, update) for site, update in updates.items()]))
    for place, got in enumerate(opened.tolist()):
        terms = {site: float(update[place]) for site, update in updates.items()}
        whole = sum(round(grid.weights[site] / grid.step * terms[site]) for site in terms)
        assert got == whole * grid.step
        exact = sum(Fraction(grid.weights[site]) * Fraction(terms[site]) for site in terms)
        assert abs(got - exact) <= 0.5001 * len(sizes) * grid.step
    assert math.fsum(grid.weights.values()) == pytest.approx(1.0)


@settings(max_examples=60, deadline=None)
@given(SIZES, st.sampled_from(RULES), st.floats(0.3, 200.0))
def test_no_sum_wraps_whatever_the_members_send(
    sizes: list[int], rule: str, noise_multiplier: float
) -> None:
    """Every member's longest coordinate in one direction; beyond it an honest site cuts."""
    patients = dict(zip("abcdefghijkl", sizes, strict=False))
    grid = grid_of(plan_of(rule), patients, noise_multiplier)
    far = torch.tensor([1e30, -1e30])
    total = added([grid.part_of(site, far) for site in patients])
    high, low = from_group(total).tolist()
    assert 2**29 - len(sizes) <= high < 2**31, "and no bit is wasted"
    assert low == -high


@pytest.mark.parametrize("num_sites", [3, 10, 100])
def test_thirty_two_bits_are_finer_than_any_noise(num_sites: int) -> None:
    """All rounding together is below a thousandth of the sum's deviation."""
    patients = {f"site-{number}": 20 + 3 * number for number in range(num_sites)}
    for noise_multiplier in (0.5, 8.0, 100.0):
        grid = grid_of(plan_of("by_patients"), patients, noise_multiplier)
        assert grid.step * num_sites**0.5 < 1e-3 * grid.declared_sum.noise_std


@pytest.mark.parametrize("rule", RULES)
def test_nobody_else_chooses_the_weights(rule: str) -> None:
    """They are the plan's, of public sizes; precision goes with their squares, and is capped."""
    patients = {"a": 10, "b": 20, "c": 70}
    weights = grid_of(plan_of(rule), patients).weights
    expected = {
        "by_patients": [0.1, 0.2, 0.7],
        "uniform": [1 / 3] * 3,
        "alignment_regularized": [0.4 * 100 / 500, 0.4 * 400 / 500, 0.6],
    }[rule]
    assert [weights[site] for site in "abc"] == pytest.approx(expected, rel=1e-4)


def test_masks_cancel_and_one_vector_looks_like_chance() -> None:
    """The exact sum over three sites; one or two of them are far from zero, everywhere alike."""
    sites = sum_sites(3)
    grid = grid_of(plan_of("by_patients"), roster_of(sites).patients)
    source = torch.Generator().manual_seed(3)
    updates = {name: 0.01 * torch.randn(4096, generator=source) for name in sites}
    masked = [
        HeldUpdate({"only": updates[name]}).release(grid, name, pairs_of(sites, name))
        for name in sites
    ]
    plain = added([grid.part_of(name, updates[name]) for name in sites])
    assert np.array_equal(added(masked), plain)
    for few in (masked[:1], masked[:2]):
        counts = np.bincount(added(few) >> np.uint32(28), minlength=16)
        assert np.abs(counts - 4096 / 16).max() < 5 * (4096 / 16) ** 0.5


def pairs_of(sites: dict[str, SumSite], own: str) -> list[tuple[bytes, bool]]:
    return sites[own].mask_key.pair_keys(own, members_of(sites, sorted(sites), own))


def test_a_held_update_leaves_once_with_masks_and_to_no_file() -> None:
    grid = grid_of(plan_of("uniform"), {"a": 10, "b": 20, "c": 30})
    update: dict[str, Tensor] = {"b": torch.ones(2, 3), "a": torch.zeros(4)}
    held = HeldUpdate(update)
    with pytest.raises(TypeError, match="in memory only"):
        pickle.dumps(held)
    with pytest.raises(ValueError, match="with masks"):
        held.release(grid, "a", [])
    with pytest.raises(ValueError, match="once"):
        held.release(grid, "a", [(bytes(32), True)])
    vector = HeldUpdate(update).release(grid, "a", [(bytes(32), True)])
    assert len(vector) == 10
    forgotten = HeldUpdate(update)
    forgotten.forget()
    with pytest.raises(ValueError, match="once"):
        forgotten.release(grid, "a", [(bytes(32), True)])
    with pytest.raises(KeyError):
        HeldUpdate(update).release(grid, "stranger", [(bytes(32), True)])


def test_weights_and_grid_survive_the_way_of_a_plan() -> None:
    """Coordinator and sites read the same JSON, so they agree to the last bit."""
    plan, patients = plan_of("alignment_regularized"), {"a": 17, "b": 230, "c": 64}
    again = Plan.parse(json.loads(plan.to_json()))
    assert grid_of(again, dict(reversed(patients.items()))) == grid_of(plan, patients)
