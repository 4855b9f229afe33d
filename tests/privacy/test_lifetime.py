"""The limit for life holds against a coordinator that chooses each plan after it saw the last.

The adversary here sees the privacy loss of its first plan and then picks, of the plans that the
ledger would admit, the one that hurts most. Its true delta at the limit's epsilon is an integral
over the first loss of closed forms, so no accountant that is tested here has a part in it.
"""

import math
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from opacus.accountants.analysis.rdp import compute_rdp, get_privacy_spent
from scipy.stats import norm

from crafts_privacy import accounting
from crafts_privacy.accounting import PrivacyEvent
from crafts_privacy.filters import best_order, check_filters, conversion_cost
from crafts_privacy.ledger import (
    BudgetExceededError,
    FiltersChangedError,
    Ledger,
    Lifetime,
    PlanLimit,
)
from crafts_privacy.lifetime import PlanCharges, Terms, renyi_epsilon, with_charge

EPSILON, DELTA = 8.0, 1e-3
ONE_ROUND = PrivacyEvent(noise_multiplier=8.0, sample_rate=0.1, steps=10)
Admits = Callable[[PrivacyEvent, PrivacyEvent], bool]


def step(noise_multiplier: float, sample_rate: float = 1.0) -> PrivacyEvent:
    return PrivacyEvent(noise_multiplier=noise_multiplier, sample_rate=sample_rate, steps=1)


def lifetime(*filters: str, max_epsilon: float = EPSILON, delta: float = DELTA) -> Lifetime:
    return Lifetime(max_epsilon=max_epsilon, delta=delta, filters=filters)


def limit(max_epsilon: float, delta: float = DELTA / 10) -> PlanLimit:
    return PlanLimit(max_epsilon=max_epsilon, delta=delta)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "ledger.db")


def charge(
    ledger: Ledger,
    life: Lifetime,
    plan_limit: PlanLimit,
    *,
    plan: int = 0,
    round: int = 1,
    cohort: str = "main",
    event: PrivacyEvent = ONE_ROUND,
) -> None:
    ledger.reserve(
        cohort=cohort,
        plan_hash=f"{plan:064x}",
        run_id="run",
        round=round,
        stage="pretraining",
        event=event,
        request_hash="0" * 64,
        lifetime=life,
        plan_limit=plan_limit,
    )


# The adversary.


def removed(event: PrivacyEvent, epsilons: np.ndarray) -> np.ndarray:
    """Delta of one step where the patient is removed: P sees the patient, Q does not."""
    q, sigma = event.sample_rate, event.noise_multiplier
    odds = (np.exp(epsilons) - (1 - q)) / q
    x = sigma**2 * np.log(np.where(odds > 0, odds, 1.0)) + 0.5
    p = (1 - q) * norm.sf(x / sigma) + q * norm.sf((x - 1) / sigma)
    return np.where(odds > 0, p - np.exp(epsilons) * norm.sf(x / sigma), 1 - np.exp(epsilons))


def added(event: PrivacyEvent, epsilons: np.ndarray) -> np.ndarray:
    """Delta of one step where the patient is added: Q sees the patient, P does not."""
    q, sigma = event.sample_rate, event.noise_multiplier
    odds = (np.exp(-epsilons) - (1 - q)) / q
    x = sigma**2 * np.log(np.where(odds > 0, odds, 1.0)) + 0.5
    q_of = (1 - q) * norm.cdf(x / sigma) + q * norm.cdf((x - 1) / sigma)
    return np.where(odds > 0, norm.cdf(x / sigma) - np.exp(epsilons) * q_of, 0.0)


def true_delta(first: PrivacyEvent, branches: Sequence[PrivacyEvent]) -> float:
    """Of one unsampled step, then the branch that is worst for what its loss has left of EPSILON.

    Exact but for the integral: the loss of a Gaussian of mean mu is N(mu^2 / 2, mu^2) under P, and
    what is left after a loss L is a hockey stick at EPSILON - L.
    """
    mu = 1 / first.noise_multiplier
    z = np.linspace(-9, 9, 20_001)
    left = np.clip(EPSILON - mu * mu / 2 - mu * z, -500, 500)
    weights = norm.pdf(z) / norm.pdf(z).sum()
    stop = np.maximum(0, 1 - np.exp(np.minimum(left, 0)))  # publish nothing more
    worst = [
        np.max([stop, *(hockey_stick(branch, left) for branch in branches)], axis=0)
        for hockey_stick in (removed, added)
    ]
    return max(float(weights @ delta) for delta in worst)


@pytest.mark.slow
@pytest.mark.parametrize("event", [step(0.8), step(0.5, 0.217), step(2.0, 0.4)])
def test_the_closed_forms_are_the_accountants_figures(event: PrivacyEvent) -> None:
    epsilon = np.array(accounting.epsilon([event], DELTA))
    assert max(removed(event, epsilon), added(event, epsilon)) == pytest.approx(DELTA, rel=0.01)


FIRST = step(0.6)
BRANCHES = (step(0.801), step(0.5, 0.217), step(0.4, 0.079))
"""Three ways to go on; with each, privacy loss distributions end just below (8, 1e-3)."""


@pytest.mark.slow
def test_loss_distributions_of_everything_charged_are_no_filter() -> None:
    """The control: what the ledger did before. Each branch fits; the choice of them does not."""
    for branch in BRANCHES:
        together = accounting.epsilon([FIRST, branch], DELTA)
        assert 0.995 * EPSILON < together <= EPSILON
        assert true_delta(FIRST, [branch]) <= DELTA
    assert true_delta(FIRST, BRANCHES) > 1.5 * DELTA


def admitted_by(ledger: Ledger, life: Lifetime, declared: Callable[[PrivacyEvent], PlanLimit]):
    """Whether the ledger takes a first plan and then a second, each time of a fresh cohort."""
    numbers = count()

    def admits(first: PrivacyEvent, second: PrivacyEvent) -> bool:
        cohort = f"cohort-{next(numbers)}"
        charge(ledger, life, declared(first), cohort=cohort, event=first)
        try:
            charge(ledger, life, declared(second), plan=1, cohort=cohort, event=second)
        except BudgetExceededError:
            return False
        return True

    return admits


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sums", "renyi:3"])
def test_the_same_adversary_stays_below_the_limit_under_a_filter(ledger: Ledger, name: str) -> None:
    def tight(event: PrivacyEvent) -> PlanLimit:
        """A plan declares no more than it needs, at half of the limit's delta."""
        return limit(accounting.epsilon([event], DELTA / 2), DELTA / 2)

    admits = admitted_by(ledger, lifetime(name), tight)
    taken = [branch for branch in BRANCHES if admits(FIRST, branch)]
    assert true_delta(FIRST, taken) <= DELTA


def weakest(sample_rate: float, fits: Callable[[PrivacyEvent], bool]) -> PrivacyEvent:
    """The step of this rate with the least noise that fits, to a thousandth."""
    low, high = 0.2, 20.0
    while high / low > 1.001:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if fits(step(middle, sample_rate)) else (middle, high)
    return step(high, sample_rate)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sums", "renyi:3"])
def test_an_adversary_that_uses_up_a_filter_stays_below_the_limit(
    ledger: Ledger, name: str
) -> None:
    """Branches of three shapes, each with the least noise that still fits after the first plan."""
    first = step(1.0)
    half = limit(EPSILON / 2, DELTA / 2)

    def fits(second: PrivacyEvent) -> bool:
        if name == "sums":
            return accounting.epsilon([second], half.delta, discretization=1e-3) <= 3.99
        return renyi_epsilon([first, second], DELTA, order=3) <= EPSILON

    branches = [weakest(sample_rate, fits) for sample_rate in (1.0, 0.3, 0.1)]
    declared = half if name == "sums" else limit(math.inf)
    admits = admitted_by(ledger, lifetime(name), lambda _: declared)
    assert all(admits(first, branch) for branch in branches)
    alone = max(true_delta(first, [branch]) for branch in branches)
    assert 1.001 * alone < true_delta(first, branches) <= DELTA


# Sums of what plans declare.


def test_a_plan_charges_its_whole_target_with_its_first_round(ledger: Ledger) -> None:
    """So that nothing is won by stopping it once its first answers disappoint."""
    life = lifetime("sums")
    charge(ledger, life, limit(5.0))
    with pytest.raises(BudgetExceededError, match=r"sums counts epsilon 9\.000 of 8"):
        charge(ledger, life, limit(4.0), plan=1)
    charge(ledger, life, limit(3.0), plan=1)
    charge(ledger, life, limit(5.0), round=2)
    with pytest.raises(BudgetExceededError):
        charge(ledger, life, limit(0.01), plan=2)
    assert len(ledger.entries()) == 3


def test_a_plan_that_names_a_smaller_target_later_gives_nothing_back(ledger: Ledger) -> None:
    life = lifetime("sums")
    charge(ledger, life, limit(5.0, 0.5 * DELTA))
    charge(ledger, life, limit(1.0), round=2)
    state = life.state(ledger.plans("main"))
    assert (state.epsilon, state.delta) == (5.0, 0.5 * DELTA)


def test_deltas_of_plans_add_up_too(ledger: Ledger) -> None:
    life = lifetime("sums")
    charge(ledger, life, limit(1.0, 0.6 * DELTA))
    with pytest.raises(BudgetExceededError, match=r"at delta 0\.0011 of 0\.001"):
        charge(ledger, life, limit(1.0, 0.5 * DELTA), plan=1)
    charge(ledger, life, limit(1.0, 0.4 * DELTA), plan=1)


def test_what_plans_declare_adds_up_as_it_is_written(ledger: Ledger) -> None:
    """0.1 + 0.2 is more than 0.3 in binary."""
    life = lifetime("sums", max_epsilon=0.3)
    quiet = step(1e4, 0.01)
    charge(ledger, life, limit(0.1), event=quiet)
    charge(ledger, life, limit(0.2), plan=1, event=quiet)


def test_a_declared_target_without_bound_leaves_no_room(ledger: Ledger) -> None:
    charge(ledger, lifetime("sums", max_epsilon=math.inf), limit(math.inf), event=step(0.0))
    with pytest.raises(BudgetExceededError):
        charge(ledger, lifetime("sums"), limit(1.0), plan=1)


# Rényi divergence at one order.


@pytest.mark.parametrize("order", [2, 3, 8, 40])
def test_renyi_epsilon_is_opacus_figure(order: int) -> None:
    events = [
        PrivacyEvent(noise_multiplier=0.9, sample_rate=0.2, steps=7),
        PrivacyEvent(noise_multiplier=4.0, sample_rate=1.0, steps=3),
        PrivacyEvent(noise_multiplier=0.9, sample_rate=0.2, steps=2),
    ]
    rdp = [
        compute_rdp(
            q=e.sample_rate, noise_multiplier=e.noise_multiplier, steps=e.steps, orders=[order]
        )
        for e in events
    ]
    theirs, _ = get_privacy_spent(orders=[order], rdp=np.sum(rdp, axis=0), delta=1e-5)
    assert renyi_epsilon(events, 1e-5, order=order) == pytest.approx(float(theirs), rel=1e-9)


def test_renyi_epsilon_of_gaussians_is_the_closed_form() -> None:
    """Order alpha: alpha / (2 sigma^2) a step, and the conversion once."""
    found = renyi_epsilon([step(2.0)] * 5, 1e-4, order=6)
    assert found == pytest.approx(5 * 6 / (2 * 4.0) + conversion_cost(6, 1e-4), rel=1e-12)
    assert renyi_epsilon([step(0.0)], 1e-4, order=6) == math.inf
    assert renyi_epsilon([], 1e-4, order=6) == 0


def test_many_small_plans_fit_into_a_renyi_filter_that_would_not_add_up(ledger: Ledger) -> None:
    event = PrivacyEvent(noise_multiplier=6.517, sample_rate=0.2, steps=100)
    plan, sums, renyi = limit(1.0), lifetime("sums"), lifetime("renyi:3")
    assert sums.plans_left((), plan, event) == 8
    room = renyi.plans_left((), plan, event)
    assert room == 38
    after = [PlanCharges(plan_hash=str(i), limit=plan, events=(event,)) for i in range(room)]
    assert renyi.state(after).holds
    events = [*(event for each in after for event in each.events), event]
    assert renyi_epsilon(events, DELTA, order=3) > EPSILON


def test_steps_left_are_the_most_that_plan_and_filter_allow() -> None:
    kind, plan = step(6.0, 0.2), limit(2.0)
    spent = with_charge((), "other", limit(7.0), step(0.9))
    wanted = PlanCharges(plan_hash="this", limit=plan, events=())
    by_plan = accounting.steps_left(kind, max_epsilon=2.0, delta=plan.delta)

    assert lifetime("sums").steps_left((), wanted, kind) == by_plan
    assert lifetime("sums").steps_left(spent, wanted, kind) == 0
    left = lifetime("renyi:3", max_epsilon=4.6).steps_left(spent, wanted, kind)
    assert 0 < left < by_plan

    def after(steps: int) -> float:
        more = PrivacyEvent(noise_multiplier=6.0, sample_rate=0.2, steps=steps)
        return renyi_epsilon([step(0.9), more], DELTA, order=3)

    assert after(left) <= 4.6 < after(left + 1)


# Several filters.


def test_of_two_filters_either_is_enough_at_half_the_delta(ledger: Ledger) -> None:
    both = lifetime("sums", "renyi:3")
    with pytest.raises(BudgetExceededError):
        charge(ledger, both, limit(8.0, 0.6 * DELTA), event=step(0.5))
    charge(ledger, both, limit(8.0, 0.5 * DELTA), event=step(0.5))  # sums
    renyi = limit(5.0, 0.6 * DELTA)
    charge(ledger, both, renyi, cohort="many", event=step(2.0))
    charge(ledger, both, renyi, cohort="many", plan=1, event=step(2.0))
    sums, by_renyi = both.states(ledger.plans("many"))
    assert (sums.holds, by_renyi.holds) == (False, True)
    assert by_renyi.epsilon == renyi_epsilon([step(2.0)] * 2, DELTA / 2, order=3)
    assert (sums.max_delta, by_renyi.max_delta) == (DELTA / 2, DELTA / 2)


def test_a_cohort_keeps_the_filters_of_its_first_charge(ledger: Ledger) -> None:
    """Another one chosen once something was seen is a second chance, and counts for nothing."""
    charge(ledger, lifetime("sums"), limit(1.0))
    for other in (("renyi:3",), ("sums", "renyi:3")):
        with pytest.raises(FiltersChangedError, match="set it back"):
            charge(ledger, lifetime(*other), limit(1.0), plan=1)
        with pytest.raises(FiltersChangedError):
            ledger.check_filters("main", other)
    assert len(ledger.entries()) == 1
    charge(ledger, lifetime("renyi:3"), limit(1.0), cohort="lung")


# What was charged before targets were written down.


@pytest.fixture
def old(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> Ledger:
    """A ledger with a round of plan 0 as earlier versions wrote it."""
    with monkeypatch.context() as patch:
        patch.setattr(Terms, "to_text", lambda self: "")
        charge(ledger, lifetime("sums"), limit(1.0))
    (plan,) = ledger.plans("main")
    assert plan.limit is None
    return ledger


def test_an_old_charge_stays_charged_in_full(old: Ledger) -> None:
    state = lifetime("renyi:3").state(old.plans("main"))
    assert state.epsilon == renyi_epsilon([ONE_ROUND], DELTA, order=3)
    state = lifetime("sums").state(old.plans("main"))
    assert state.epsilon == accounting.epsilon([ONE_ROUND], DELTA)
    assert state.delta == DELTA


def test_nothing_joins_an_old_charge_in_a_sum_and_its_own_plan_goes_on(old: Ledger) -> None:
    with pytest.raises(BudgetExceededError):
        charge(old, lifetime("sums"), limit(0.1, 1e-9), plan=1)
    charge(old, lifetime("sums"), limit(1.0), round=2)
    state = lifetime("sums").state(old.plans("main"))
    assert (state.epsilon, state.delta) == (1.0, DELTA / 10)


# Names and words.


def test_terms_survive_being_written_down() -> None:
    for target in (7.9, math.inf):
        terms = Terms(limit=limit(target), filters=("sums", "renyi:3"), request_hash="ab" * 32)
        assert Terms.of_text(terms.to_text()) == terms
        assert "Infinity" not in terms.to_text()
    for text in ("{}", "[]", "not json", "1"):
        with pytest.raises(ValueError):
            Terms.of_text(text)


def test_a_filter_that_leaves_no_room_says_which_would() -> None:
    with pytest.raises(ValueError, match=r"renyi:2 leaves no room in epsilon 1; declare renyi:10"):
        check_filters(["renyi:2"], max_epsilon=1.0, delta=1e-3)
    check_filters(["renyi:10"], max_epsilon=1.0, delta=1e-3)
    with pytest.raises(ValueError, match="once"):
        check_filters(["sums", "sums"], max_epsilon=1.0, delta=1e-3)


@pytest.mark.parametrize(("epsilon", "delta"), [(8.0, 1e-3), (3.0, 1e-4), (1.0, 1e-5)])
def test_the_best_order_lets_most_gaussians_in(epsilon: float, delta: float) -> None:
    best = best_order(epsilon, delta)

    def least_noise(order: int) -> float:
        return weakest(
            1.0, lambda one: renyi_epsilon([one], delta, order=order) <= epsilon
        ).noise_multiplier

    assert least_noise(best) <= 1.001 * min(least_noise(best - 1), least_noise(best + 1))
