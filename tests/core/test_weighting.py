"""Precision, gate and cap against slow, obvious oracles and their promises."""

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crafts_core.weighting import capped, log_gate, log_precision, normalised, share_caps

SITES = st.lists(st.tuples(st.integers(0, 1000), st.integers(1, 500)), min_size=1, max_size=9)
"""Score and agreed patients of each."""
SCORED = SITES.filter(lambda sites: any(score for score, _ in sites))


def split(sites: list[tuple[int, int]]) -> tuple[list[float], list[int]]:
    scores, patients = zip(*sites, strict=True)
    return [score / sum(scores) for score in scores], list(patients)


def water_level(weights: list[float], caps: list[float]) -> list[float]:
    """Oracle: cap one site at a time and hand its excess to the others until nobody is over."""
    result, cap, closed = [Fraction(w) for w in weights], [Fraction(c) for c in caps], set()
    while over := [k for k in range(len(result)) if result[k] > cap[k]]:
        worst = max(over, key=lambda k: result[k] - cap[k])
        closed.add(worst)
        excess = result[worst] - cap[worst]
        result[worst] = cap[worst]
        open_sites = [k for k in range(len(result)) if k not in closed]
        if not open_sites:
            break
        total = sum(result[k] for k in open_sites)
        for k in open_sites:
            result[k] += excess * (result[k] / total if total else Fraction(1, len(open_sites)))
    return [float(weight) for weight in result]


@given(SCORED, st.floats(0.05, 1.0), st.floats(1.0, 5.0))
def test_after_all_is_handed_on_no_weight_passes_its_cap_and_the_sum_is_one(
    sites: list[tuple[int, int]], max_weight: float, ratio: float
) -> None:
    weights, patients = split(sites)
    caps = share_caps(patients, max_weight=max_weight, max_weight_per_share=ratio)
    result = capped(weights, caps)
    assert math.fsum(result) == pytest.approx(1.0, abs=1e-12)
    assert min(result) >= 0.0
    plain = 1 / len(patients)
    for weight, cap, size in zip(result, caps, patients, strict=True):
        assert weight <= cap + 1e-12
        assert cap <= max(max_weight, plain)
        assert cap <= max(ratio * size / sum(patients), plain)


@given(SCORED, st.floats(0.05, 1.0), st.floats(1.05, 5.0))
def test_capped_equals_redistribution_one_site_at_a_time(
    sites: list[tuple[int, int]], max_weight: float, ratio: float
) -> None:
    weights, patients = split(sites)
    caps = share_caps(patients, max_weight=max_weight, max_weight_per_share=ratio)
    assert capped(weights, caps) == pytest.approx(water_level(weights, caps), abs=1e-9)


@given(st.lists(st.integers(1, 500), min_size=1, max_size=9), st.floats(1.0, 5.0))
def test_plain_and_federated_averaging_pass_under_every_cap(
    patients: list[int], ratio: float
) -> None:
    caps = share_caps(patients, max_weight=1.0, max_weight_per_share=ratio)
    plain = [1 / len(patients)] * len(patients)
    by_patients = [n / sum(patients) for n in patients]
    assert capped(plain, caps) == plain
    assert capped(by_patients, caps) == pytest.approx(by_patients, abs=1e-12)


@pytest.mark.parametrize(
    ("patients", "expected"),
    [
        ([40], [1.0]),
        ([200, 20], [0.6, 0.5]),
        ([120, 120, 120], [0.6, 0.6, 0.6]),
        ([120] * 10, [0.2] * 10),
        ([400] + [100] * 6, [0.6] + [0.2] * 6),
    ],
)
def test_what_a_site_may_count(patients: list[int], expected: list[float]) -> None:
    """Two or three sites: the plan's 0.6, as ever. Ten equal ones: twice a tenth."""
    caps = share_caps(patients, max_weight=0.6, max_weight_per_share=2.0)
    assert caps == pytest.approx(expected)


def test_a_cap_that_nobody_could_keep_gives_equal_weights() -> None:
    caps = share_caps([90, 10], max_weight=0.3, max_weight_per_share=2.0)
    assert capped([0.9, 0.1], caps) == [0.5, 0.5]


def test_excess_of_one_site_goes_to_the_others_in_proportion() -> None:
    assert capped([0.8, 0.15, 0.05], [0.6, 0.6, 0.6]) == pytest.approx([0.6, 0.3, 0.1])


def test_what_is_no_cap_is_refused() -> None:
    with pytest.raises(ValueError, match="max_weight"):
        share_caps([1], max_weight=0.0, max_weight_per_share=2.0)
    with pytest.raises(ValueError, match="max_weight_per_share"):
        share_caps([1], max_weight=0.6, max_weight_per_share=0.9)
    with pytest.raises(ValueError, match="sum to one"):
        capped([0.5, 0.5], [0.4, 0.4])


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
