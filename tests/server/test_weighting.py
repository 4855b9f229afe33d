"""Precision, gate and cap against slow, obvious oracles and their promises."""

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crafts_server.weighting import capped, log_gate, log_precision, normalised

WEIGHTS = st.lists(st.integers(0, 1000), min_size=1, max_size=9).filter(any)


def water_level(weights: list[float], max_weight: float) -> list[float]:
    """Oracle: cap one site at a time and hand its excess to the others until nobody is over."""
    result = [Fraction(weight) for weight in weights]
    cap, closed = Fraction(max_weight), set()
    while max(result) > cap:
        worst = result.index(max(result))
        closed.add(worst)
        excess = result[worst] - cap
        result[worst] = cap
        open_sites = [k for k in range(len(result)) if k not in closed]
        total = sum(result[k] for k in open_sites)
        for k in open_sites:
            result[k] += excess * (result[k] / total if total else Fraction(1, len(open_sites)))
    return [float(weight) for weight in result]


@given(WEIGHTS, st.floats(0.05, 1.0))
def test_capped_weights_sum_to_one_and_keep_the_cap(scores: list[int], max_weight: float) -> None:
    weights = [score / sum(scores) for score in scores]
    result = capped(weights, max_weight)
    assert math.fsum(result) == pytest.approx(1.0, abs=1e-12)
    assert max(result) <= max(max_weight, 1 / len(weights)) + 1e-12
    assert min(result) >= 0.0


@given(WEIGHTS, st.floats(0.05, 1.0))
def test_capped_equals_redistribution_one_site_at_a_time(
    scores: list[int], max_weight: float
) -> None:
    weights = [score / sum(scores) for score in scores]
    if len(weights) * max_weight > 1.001:
        assert capped(weights, max_weight) == pytest.approx(water_level(weights, max_weight))


def test_an_infeasible_cap_gives_equal_weights() -> None:
    assert capped([0.9, 0.1], 0.3) == [0.5, 0.5]


def test_one_site_alone_has_all_the_weight() -> None:
    assert capped([1.0], 0.6) == [1.0]


def test_excess_of_one_site_goes_to_the_others_in_proportion() -> None:
    assert capped([0.8, 0.15, 0.05], 0.6) == pytest.approx([0.6, 0.3, 0.1])


def test_a_cap_that_is_no_fraction_is_refused() -> None:
    with pytest.raises(ValueError, match="max_weight"):
        capped([1.0], 0.0)


@given(st.floats(0, 1e6), st.floats(1e-12, 1.0))
def test_precision_is_one_over_floor_plus_variance(variance: float, floor: float) -> None:
    assert math.exp(log_precision(variance, floor)) == pytest.approx(1 / (floor + variance))


@given(st.floats(-20, 20), st.floats(0.1, 5.0))
def test_gate_is_the_sigmoid_of_gain_over_temperature(gain: float, temperature: float) -> None:
    oracle = 1 / (1 + math.exp(-gain / temperature))
    assert math.exp(log_gate(gain, temperature)) == pytest.approx(oracle)


def test_gate_survives_any_gain() -> None:
    assert log_gate(1e300, 1e-3) == 0.0
    assert log_gate(-1e3, 1e-3) == pytest.approx(-1e6)
    assert log_gate(math.nan, 1.0) == -math.inf


def test_normalised_equals_direct_products() -> None:
    variances, gains = [1e-6, 4e-6, 1e-8], [0.02, -0.1, 0.0]
    direct = [1 / (1e-9 + v) / (1 + math.exp(-g / 0.05)) for v, g in zip(variances, gains)]  # noqa: B905
    logs = [log_precision(v, 1e-9) + log_gate(g, 0.05) for v, g in zip(variances, gains)]  # noqa: B905
    assert normalised(logs) == pytest.approx([score / sum(direct) for score in direct])


def test_sites_that_are_all_hopeless_count_the_same() -> None:
    assert normalised([-math.inf, -math.inf]) == [0.5, 0.5]
    assert normalised([-1e6, -1e6]) == [0.5, 0.5]


def test_no_site_is_no_weight() -> None:
    with pytest.raises(ValueError, match="at least one"):
        normalised([])
