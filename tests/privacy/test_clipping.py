import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crafts_privacy.clipping import GRID_BITS, clip_, grid_step, norm_float64, to_grid_

FLOAT32 = st.floats(
    width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**100), max_value=2.0**100
)
GRADIENTS = st.lists(FLOAT32, min_size=1, max_size=40).map(lambda values: torch.tensor(values))
BOUNDS = st.floats(min_value=1e-9, max_value=1e9)


@settings(deadline=None)
@given(grad_D=GRADIENTS, bound=BOUNDS)
def test_norm_never_exceeds_the_bound_in_float64(grad_D: torch.Tensor, bound: float) -> None:
    clip_(grad_D, bound)
    assert float(grad_D.double().norm()) <= bound


@settings(deadline=None)
@given(grad_D=GRADIENTS, bound=BOUNDS)
def test_the_grid_never_lengthens_a_gradient(grad_D: torch.Tensor, bound: float) -> None:
    clip_(grad_D, bound)
    before = grad_D.double().norm()
    step = grid_step(bound)
    to_grid_(grad_D, step)
    assert torch.equal(grad_D, grad_D.trunc())
    assert float((grad_D.double() * step).norm()) <= float(before)


@pytest.mark.parametrize("num_coordinates", [1, 1000, 3_000_000])
def test_bound_holds_for_long_gradients_that_are_all_clipped(num_coordinates: int) -> None:
    grad_D = torch.randn(num_coordinates) * 50 + 3
    clip_(grad_D, 0.37)
    assert 0.37 * (1 - 2e-6) <= float(grad_D.double().norm()) <= 0.37


def test_a_margin_is_needed_for_the_bound() -> None:
    """Control: clipping exactly to C in float32 does exceed C."""
    rows = torch.randn(200, 1000)
    clipped = rows * (1.0 / rows.norm(dim=1, keepdim=True))
    assert (clipped.double().norm(dim=1) > 1.0).any()


def test_a_short_gradient_is_left_alone() -> None:
    grad_D = torch.tensor([0.3, -0.4])
    assert bool(clip_(grad_D, 1.0))
    assert torch.equal(grad_D, torch.tensor([0.3, -0.4]))


def test_direction_is_kept() -> None:
    grad_D = torch.randn(100)
    clipped = grad_D.clone()
    clip_(clipped, 0.01)
    assert torch.cosine_similarity(grad_D, clipped, dim=0) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("bound", [1.0, math.inf])
def test_a_bad_gradient_becomes_zero(bad: float, bound: float) -> None:
    grad_D = torch.tensor([1.0, bad, 2.0])
    assert not bool(clip_(grad_D, bound))
    assert torch.equal(grad_D, torch.zeros(3))


def test_zero_stays_zero() -> None:
    grad_D = torch.zeros(4)
    assert bool(clip_(grad_D, 1.0))
    assert torch.equal(grad_D, torch.zeros(4))


def test_huge_values_are_clipped_not_overflowed() -> None:
    grad_D = torch.full((1000,), 1e36)
    assert bool(clip_(grad_D, 1.0))
    assert float(grad_D.double().norm()) == pytest.approx(1.0, abs=1e-5)


def test_a_gradient_too_long_to_be_scaled_exactly_becomes_zero() -> None:
    """Found by the property test: a subnormal scale rounded four such values to norm > C."""
    grad_D = torch.full((4,), 2.0**100)
    assert not bool(clip_(grad_D, 1e-9))
    assert torch.equal(grad_D, torch.zeros(4))


def test_an_infinite_bound_changes_nothing_finite() -> None:
    grad_D = torch.tensor([3e30, -1.0])
    clip_(grad_D, math.inf)
    assert torch.equal(grad_D, torch.tensor([3e30, -1.0]))


@pytest.mark.parametrize("bound", [0.0, -1.0, math.nan])
def test_a_bound_that_is_not_positive_is_refused(bound: float) -> None:
    with pytest.raises(ValueError, match="max_grad_norm"):
        clip_(torch.ones(2), bound)


@pytest.mark.parametrize("grad", [torch.ones(2, dtype=torch.float16), torch.ones(2, 2)])
def test_only_flat_float32_is_accepted(grad: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="flat float32"):
        clip_(grad, 1.0)


def test_norm_does_not_lose_digits_over_many_coordinates() -> None:
    grad_D = torch.full((4_000_000,), 0.1)
    exact = math.sqrt(4_000_000) * float(torch.tensor(0.1))
    assert float(norm_float64(grad_D)) == pytest.approx(exact, rel=1e-9)


@given(bound=BOUNDS)
def test_the_step_is_a_power_of_two_just_below_the_bound(bound: float) -> None:
    step = grid_step(bound)
    assert math.frexp(step)[0] == 0.5
    assert 2**GRID_BITS <= bound / step < 2 ** (GRID_BITS + 1)


@settings(deadline=None)
@given(grad_D=GRADIENTS, bound=BOUNDS, stability=st.floats(1e-6, 1e6))
def test_automatic_clipping_never_exceeds_the_bound(
    grad_D: torch.Tensor, bound: float, stability: float
) -> None:
    clip_(grad_D, bound, stability=stability)
    assert float(grad_D.double().norm()) <= bound


@pytest.mark.parametrize("length", [0.0, 1e-3, 1.0, 1e3])
def test_automatic_clipping_is_the_formula_of_the_paper(length: float) -> None:
    """AUTO-S: C g / (|g| + gamma), for short and long gradients alike."""
    direction = torch.tensor([0.6, 0.8])
    grad_D = length * direction
    assert bool(clip_(grad_D, 2.0, stability=0.01))
    expected = 2.0 * length / (length + 0.01) * direction
    torch.testing.assert_close(grad_D, expected, rtol=2e-6, atol=1e-9)
