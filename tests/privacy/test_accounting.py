import math
from dataclasses import replace

import dp_accounting
import pytest
from dp_accounting import pld
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from crafts_privacy.accounting import (
    COARSE,
    NeighboringRelation,
    PrivacyEvent,
    SecondOpinion,
    calibrate_noise_multiplier,
    epsilon,
    epsilon_at_two_hospitals,
    epsilon_second_opinion,
    merge,
    steps_left,
)
from crafts_privacy.errors import CalibrationError

GOLDENS = [
    # noise multiplier, q, steps, delta, dp-accounting 0.6 PLD, opacus 1.6 PRV
    (1.0, 0.01, 1000, 1e-5, 1.828, 1.838),
    (2.0, 0.1, 300, 1e-4, 3.597, 3.607),
    (0.6, 0.02, 200, 1e-5, 7.260, 7.271),
]


def event(noise_multiplier: float, sample_rate: float, steps: int) -> PrivacyEvent:
    return PrivacyEvent(noise_multiplier=noise_multiplier, sample_rate=sample_rate, steps=steps)


def gaussian_epsilon(noise_multiplier: float, steps: int, delta: float) -> float:
    """Balle and Wang 2018, theorem 8: the exact curve of a composed Gaussian mechanism."""
    mu = math.sqrt(steps) / noise_multiplier

    def excess(value: float) -> float:
        first = stats.norm.cdf(mu / 2 - value / mu)
        return float(first - math.exp(value) * stats.norm.cdf(-mu / 2 - value / mu) - delta)

    return float(optimize.brentq(excess, 0.0, 200.0))


@pytest.mark.slow
@pytest.mark.parametrize(("noise_multiplier", "q", "steps", "delta", "pld", "prv"), GOLDENS)
def test_epsilon_goldens(
    noise_multiplier: float, q: float, steps: int, delta: float, pld: float, prv: float
) -> None:
    events = [event(noise_multiplier, q, steps)]
    assert epsilon(events, delta) == pytest.approx(pld, abs=1e-3)
    second = epsilon_second_opinion(events, delta)
    assert second.epsilon == pytest.approx(prv, abs=1e-3)
    assert second.accountant == "opacus-prv"


@pytest.mark.slow
def test_replace_one_golden() -> None:
    """q=0.1, noise multiplier 1, 100 steps, delta 1e-4 (facts: 5.97 against 9.22)."""
    events = [event(1.0, 0.1, 100)]
    replaced = epsilon(events, 1e-4, neighboring_relation=NeighboringRelation.REPLACE_ONE)
    assert epsilon(events, 1e-4) == pytest.approx(5.966, abs=1e-3)
    assert replaced == pytest.approx(9.221, abs=1e-3)


@pytest.mark.slow
def test_epsilon_equals_dp_accounting_for_the_same_events() -> None:
    events = [event(1.1, 0.05, 40), event(2.0, 0.2, 30)]
    theirs = pld.PLDAccountant(value_discretization_interval=1e-4)
    for one in events:
        gaussian = dp_accounting.GaussianDpEvent(one.noise_multiplier)
        theirs.compose(dp_accounting.PoissonSampledDpEvent(one.sample_rate, gaussian), one.steps)
    assert epsilon(events, 1e-4) == theirs.get_epsilon(1e-4)


@pytest.mark.parametrize(("noise_multiplier", "steps"), [(1.0, 1), (5.0, 10), (2.0, 30)])
def test_rate_one_is_the_plain_gaussian_mechanism(noise_multiplier: float, steps: int) -> None:
    exact = gaussian_epsilon(noise_multiplier, steps, 1e-5)
    ours = epsilon([event(noise_multiplier, 1.0, steps)], 1e-5)
    assert exact <= ours <= exact + 2e-3
    second = epsilon_second_opinion([event(noise_multiplier, 1.0, steps)], 1e-5)
    assert exact <= second.epsilon <= exact + 0.03


def test_nothing_costs_nothing() -> None:
    assert epsilon([], 1e-5) == 0
    assert epsilon([event(1.0, 0.5, 0)], 1e-5) == 0
    assert epsilon_second_opinion([], 1e-5).epsilon == 0


def test_anything_without_noise_costs_everything() -> None:
    events = [event(5.0, 0.1, 10), event(0.0, 0.1, 1)]
    assert epsilon(events, 1e-5) == math.inf
    assert epsilon_second_opinion(events, 1e-5).epsilon == math.inf


def test_events_compose_for_less_than_the_sum_of_their_epsilons() -> None:
    stages = [event(2.0, 0.1, 100), event(3.0, 0.1, 200), event(5.0, 0.2, 50)]
    parts = [epsilon([stage], 1e-4, discretization=COARSE) for stage in stages]
    composed = epsilon(stages, 1e-4, discretization=COARSE)
    assert max(parts) < composed < sum(parts)


def test_both_accountants_agree_on_mixed_histories() -> None:
    stages = [event(2.0, 0.1, 100), event(3.0, 0.05, 200), event(8.0, 1.0, 5)]
    second = epsilon_second_opinion(stages, 1e-4)
    assert 0 < second.epsilon - epsilon(stages, 1e-4) < 0.02


def test_renyi_answers_where_prv_cannot() -> None:
    hopeless = [event(0.3, 0.5, 500)]
    second = epsilon_second_opinion(hopeless, 1e-4)
    assert second.accountant == "opacus-rdp"
    assert second.epsilon > epsilon(hopeless, 1e-4)


def test_rounds_of_one_kind_cost_the_same_as_one_long_run() -> None:
    assert epsilon([event(1.0, 0.1, 10)] * 10, 1e-4) == epsilon([event(1.0, 0.1, 100)], 1e-4)


@given(
    st.lists(
        st.builds(
            event, st.sampled_from([0.5, 1.0]), st.sampled_from([0.1, 1.0]), st.integers(0, 9)
        ),
        max_size=12,
    )
)
def test_merging_keeps_every_step_and_forgets_order(events: list[PrivacyEvent]) -> None:
    merged = merge(events)
    assert sum(one.steps for one in merged) == sum(one.steps for one in events)
    assert merged == merge(reversed(events))
    assert len({(one.noise_multiplier, one.sample_rate) for one in merged}) == len(merged)


@pytest.mark.slow
@settings(deadline=None, max_examples=5)
@given(
    noise_multiplier=st.floats(0.7, 4.0),
    sample_rate=st.floats(0.01, 1.0),
    steps=st.integers(1, 40),
)
def test_more_of_anything_costs_more(
    noise_multiplier: float, sample_rate: float, steps: int
) -> None:
    base = epsilon([event(noise_multiplier, sample_rate, steps)], 1e-3, discretization=COARSE)
    slack = 0.02  # two discretized upper bounds
    for dearer in (
        event(noise_multiplier / 1.5, sample_rate, steps),
        event(noise_multiplier, min(1.0, sample_rate * 1.5), steps),
        event(noise_multiplier, sample_rate, 2 * steps),
    ):
        assert epsilon([dearer], 1e-3, discretization=COARSE) >= base - slack


def test_a_coarser_discretization_never_understates() -> None:
    events = [event(1.0, 0.1, 50)]
    fine = epsilon(events, 1e-4)
    for discretization in (1e-3, 1e-2, 1e-1):
        assert epsilon(events, 1e-4, discretization=discretization) >= fine - 1e-9


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "rate", "steps"), [(8.0, 0.1, 20), (1.0, 0.2, 100), (0.5, 1.0, 10)]
)
def test_calibrated_noise_meets_the_target_closely_and_never_passes_it(
    target: float, rate: float, steps: int
) -> None:
    noise_multiplier = calibrate_noise_multiplier(
        target_epsilon=target, delta=1e-3, sample_rate=rate, steps=steps
    )
    reached = epsilon([event(noise_multiplier, rate, steps)], 1e-3)
    assert 0.99 * target < reached <= target


@pytest.mark.slow
def test_calibration_leaves_room_for_what_was_spent() -> None:
    spent = [event(2.0, 0.1, 50)]
    asked = {"target_epsilon": 4.0, "delta": 1e-3, "sample_rate": 1.0, "steps": 5}
    fresh = calibrate_noise_multiplier(**asked)
    later = calibrate_noise_multiplier(**asked, spent=spent)
    assert later > fresh
    assert 0.99 * 4.0 < epsilon([*spent, event(later, 1.0, 5)], 1e-3) <= 4.0


def test_calibrated_noise_survives_being_written_with_four_digits() -> None:
    value = calibrate_noise_multiplier(target_epsilon=3.0, delta=1e-3, sample_rate=1.0, steps=20)
    assert float(f"{value:.4g}") == value


@pytest.mark.slow
def test_calibration_refuses_when_nothing_is_left() -> None:
    with pytest.raises(CalibrationError, match="spent already"):
        calibrate_noise_multiplier(
            target_epsilon=1.0,
            delta=1e-3,
            sample_rate=0.1,
            steps=5,
            spent=[event(1.0, 1.0, 5)],
        )


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan])
def test_a_delta_outside_zero_and_one_is_refused(delta: float) -> None:
    for accountant in (epsilon, epsilon_second_opinion):
        with pytest.raises(ValueError, match="delta"):
            accountant([event(1.0, 0.1, 1)], delta)


@pytest.mark.parametrize(
    "bad", [(-1.0, 0.1, 1), (math.nan, 0.1, 1), (1.0, 0.0, 1), (1.0, 1.1, 1), (1.0, 0.1, -1)]
)
def test_an_impossible_event_cannot_be_made(bad: tuple[float, float, int]) -> None:
    with pytest.raises(ValueError, match="expected"):
        event(*bad)


@pytest.mark.parametrize(
    "bad", [{"target_epsilon": 0.0}, {"target_epsilon": math.inf}, {"steps": 0}]
)
def test_an_impossible_target_is_refused(bad: dict[str, float]) -> None:
    asked = {"target_epsilon": 1.0, "delta": 1e-3, "sample_rate": 0.1, "steps": 5} | bad
    with pytest.raises(ValueError, match="expected"):
        calibrate_noise_multiplier(**asked)


@pytest.mark.slow
@pytest.mark.parametrize("spent_steps", [0, 10])
def test_steps_left_is_the_largest_number_that_fits(spent_steps: int) -> None:
    """The slow obvious loop: one step more until it is too many."""
    kind = PrivacyEvent(noise_multiplier=2.0, sample_rate=0.3, steps=0)
    spent = [PrivacyEvent(noise_multiplier=1.5, sample_rate=0.2, steps=spent_steps)]
    steps = 0
    while epsilon([*spent, replace(kind, steps=steps + 1)], 1e-4, discretization=COARSE) <= 3.0:
        steps += 1

    found = steps_left(kind, max_epsilon=3.0, delta=1e-4, spent=spent)

    assert 0 < steps - 1 <= found <= steps + 1
    assert epsilon([*spent, replace(kind, steps=found)], 1e-4) <= 3.0


def test_no_step_is_left_of_a_spent_budget_and_the_search_ends() -> None:
    kind = PrivacyEvent(noise_multiplier=1.0, sample_rate=0.5, steps=0)
    spent = [replace(kind, steps=100)]
    assert steps_left(kind, max_epsilon=1.0, delta=1e-4, spent=spent) == 0
    quiet = PrivacyEvent(noise_multiplier=1000.0, sample_rate=0.01, steps=0)
    assert steps_left(quiet, max_epsilon=8.0, delta=1e-4, most=50) == 50


@pytest.mark.parametrize(
    ("accountant", "value", "opinion", "agree"),
    [
        ("opacus-prv", 8.0, 8.01, True),
        ("opacus-prv", 8.0, 8.2, False),
        ("opacus-prv", 8.0, 7.8, False),
        ("opacus-prv", 0.1, 0.12, True),
        ("opacus-prv", 0.1, 0.15, False),
        ("opacus-prv", 0.1, 0.05, False),
        ("opacus-rdp", 50.0, 60.0, True),
        ("opacus-rdp", 50.0, 48.0, False),
        ("opacus-rdp", 50.0, math.inf, False),
        ("opacus-rdp", math.inf, 50.0, False),
        ("opacus-rdp", math.inf, math.inf, True),
    ],
)
def test_a_second_opinion_is_compared_in_both_directions(
    accountant: str, value: float, opinion: float, agree: bool
) -> None:
    """PRV must be near on both sides; Renyi is an upper bound that may be loose."""
    assert SecondOpinion(opinion, accountant).agrees_with(value) is agree


@pytest.mark.slow
@pytest.mark.parametrize(
    ("noise", "rate", "steps", "delta"),
    [(0.5, 0.5, 4, 1e-3), (2.0, 0.5, 100, 1e-3), (8.0, 0.1, 10, 1e-4), (1.0, 1.0, 5, 1e-3)],
)
def test_the_two_accountants_agree(noise: float, rate: float, steps: int, delta: float) -> None:
    events = [PrivacyEvent(noise_multiplier=noise, sample_rate=rate, steps=steps)]
    opinion = epsilon_second_opinion(events, delta)
    assert opinion.accountant == "opacus-prv"
    assert opinion.agrees_with(epsilon(events, delta))


@pytest.mark.slow
@pytest.mark.parametrize(("sigma", "once", "twice"), [(1.488, 8.0, 20.8), (7.25, 1.0, 2.3)])
def test_a_patient_at_two_members_of_one_sum_pays_more_than_at_two_studies(
    sigma: float, once: float, twice: float
) -> None:
    """q 0.4, 48 steps, delta 1e-3: both gradients under the noise of one sum."""
    steps = PrivacyEvent(noise_multiplier=sigma, sample_rate=0.4, steps=48)
    assert epsilon([steps], 1e-3) == pytest.approx(once, rel=0.01)
    found = epsilon_at_two_hospitals([], [steps], 1e-3)
    assert found == pytest.approx(twice, abs=0.1)
    assert found > epsilon([steps, steps], 1e-3)


@pytest.mark.slow
def test_two_hospitals_without_a_sum_in_common_compose() -> None:
    one = PrivacyEvent(noise_multiplier=2.0, sample_rate=0.2, steps=20)
    other = PrivacyEvent(noise_multiplier=3.0, sample_rate=0.1, steps=40)
    together = epsilon_at_two_hospitals([one, other], [], 1e-4)
    assert together == epsilon([one, other], 1e-4)
    mixed = epsilon_at_two_hospitals([other], [one], 1e-4)
    assert mixed > together
    none = PrivacyEvent(noise_multiplier=0.0, sample_rate=0.2, steps=1)
    assert epsilon_at_two_hospitals([one], [none], 1e-4) == math.inf


@pytest.mark.slow
def test_where_everybody_is_drawn_two_hospitals_are_one_patient_of_twice_the_bound() -> None:
    """Closed form: at rate 1 the mixture is a Gaussian of twice the sensitivity."""
    steps = PrivacyEvent(noise_multiplier=4.0, sample_rate=1.0, steps=3)
    halved = PrivacyEvent(noise_multiplier=2.0, sample_rate=1.0, steps=3)
    found = epsilon_at_two_hospitals([], [steps], 1e-3)
    assert found == pytest.approx(epsilon([halved], 1e-3), abs=0.01)
