"""The group holds a sum exactly, up to its bound; and shares of noise make up the whole."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from crafts_privacy.secure_aggregation.fixed_point import (
    from_group,
    largest_grid_bits,
    sum_fits,
    to_group,
)
from crafts_privacy.secure_aggregation.shares import (
    num_honest,
    own_noise_multiplier,
    total_noise_multiplier,
)

SIGNED = st.integers(-(2**31), 2**31 - 1)


@given(st.lists(SIGNED, min_size=1, max_size=40))
def test_integers_come_back_as_they_were(values: list[int]) -> None:
    sum_D = torch.tensor(values, dtype=torch.float64)
    assert torch.equal(from_group(to_group(sum_D)), sum_D)


@given(st.lists(st.integers(-(2**52), 2**52), min_size=1, max_size=20))
def test_larger_integers_are_taken_modulo_the_group(values: list[int]) -> None:
    vector_D = to_group(torch.tensor(values, dtype=torch.float64))
    assert vector_D.tolist() == [value % 2**32 for value in values]


def test_long_vectors_are_cut_without_a_seam() -> None:
    sum_D = torch.arange(-300_000, 300_001, dtype=torch.float64)
    assert torch.equal(from_group(to_group(sum_D)), sum_D)


@pytest.mark.parametrize(("patients", "bits"), [(330, 20), (760, 19), (1650, 18), (7400, 16)])
def test_the_finest_grid_on_which_a_sum_fits(patients: int, bits: int) -> None:
    """Of ten sites with two that may collude, at epsilon 8."""
    total = total_noise_multiplier(
        [own_noise_multiplier(1.488, num_members=10, colluding_sites=2)] * 10
    )
    sizes = {"expected_patients": float(patients), "total_noise_multiplier": total}
    assert largest_grid_bits(**sizes) == bits
    longest = 2 * patients + 12 * math.sqrt(patients) + 12 + 9 * total
    assert longest * 2 ** (bits + 1) < 2**31 <= longest * 2 ** (bits + 2)
    assert not sum_fits(bits + 1, **sizes)


def test_a_study_that_is_too_large_for_any_grid_is_refused() -> None:
    with pytest.raises(ValueError, match="sample rate"):
        largest_grid_bits(expected_patients=1e6, total_noise_multiplier=1.0)


@given(sigma=st.floats(0.1, 50), members=st.integers(3, 100), data=st.data())
def test_the_honest_members_make_up_the_whole_noise(
    sigma: float, members: int, data: st.DataObject
) -> None:
    colluding = data.draw(st.integers(1, members - 1))
    own = own_noise_multiplier(sigma, num_members=members, colluding_sites=colluding)
    honest = [own] * (members - colluding)
    assert total_noise_multiplier(honest) == pytest.approx(sigma, rel=1e-12)


def test_a_floor_only_adds_noise() -> None:
    sizes = {"num_members": 10, "colluding_sites": 2}
    assert own_noise_multiplier(4.0, **sizes, floor=1.0) == own_noise_multiplier(4.0, **sizes)
    assert own_noise_multiplier(4.0, **sizes, floor=3.0) == 3.0


@pytest.mark.parametrize(("members", "colluding"), [(3, 3), (2, 5), (3, -1)])
def test_somebody_must_be_honest(members: int, colluding: int) -> None:
    with pytest.raises(ValueError, match="colluding"):
        num_honest(members, colluding)


def test_a_numpy_vector_of_any_bits_is_a_sum() -> None:
    words = np.array([0, 1, 2**31 - 1, 2**31, 2**32 - 1], dtype=np.uint32)
    assert from_group(words).tolist() == [0.0, 1.0, 2**31 - 1.0, -(2.0**31), -1.0]
