"""The curve of a life says what the filters and the accountant of record say."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise

import pytest

from crafts_client.spending_curve import MOST_POINTS, STEPS, curves_drawn, spending_curves
from crafts_privacy import accounting
from crafts_privacy.accounting import PrivacyEvent
from crafts_privacy.ledger_rows import EntryKind, LedgerEntry
from crafts_privacy.lifetime import Lifetime, PlanCharges, PlanLimit, Terms

LIMIT = PlanLimit(max_epsilon=2.0, delta=1e-5)
LIFE = Lifetime(max_epsilon=9.0, delta=1e-4, filters=("sums", "renyi:8"))
START = datetime(2026, 3, 1, tzinfo=UTC)


def charges(count: int, *, noise_multiplier: float = 4.0) -> list[LedgerEntry]:
    """One plan's, a day apart."""
    terms = Terms(limit=LIMIT, filters=LIFE.filters, request_hash="0" * 64)
    return [
        LedgerEntry(
            sequence=number,
            recorded_at=START + timedelta(days=number),
            kind=EntryKind.RESERVED,
            reservation=number,
            cohort="main",
            plan_hash="a" * 64,
            run_id="run",
            round=number,
            stage="alignment",
            noise_multiplier=noise_multiplier,
            sample_rate=0.25,
            steps=3,
            detail=terms.to_text(),
            previous_hash="",
        )
        for number in range(1, count + 1)
    ]


def test_each_point_is_what_was_counted_then() -> None:
    entries = charges(4)
    curves = {curve.name: dict(curve.points) for curve in spending_curves(entries, LIFE)}
    assert set(curves) == {"sums", "renyi:8", STEPS}
    for number in range(1, 5):
        events = (PrivacyEvent(noise_multiplier=4.0, sample_rate=0.25, steps=3),) * number
        plans = [PlanCharges(plan_hash="a" * 64, limit=LIMIT, events=events)]
        at = entries[number - 1].recorded_at
        for state in LIFE.states(plans):
            assert curves[state.name][at] == state.epsilon
        exact = accounting.epsilon(events, LIFE.delta)
        assert exact <= curves[STEPS][at] == pytest.approx(exact, abs=2e-3)


@pytest.mark.slow
def test_a_long_life_is_drawn_to_its_last_charge() -> None:
    entries = charges(3 * MOST_POINTS + 1)
    for curve in spending_curves(entries, replace(LIFE, filters=("sums",))):
        assert len(curve.points) == MOST_POINTS
        assert curve.points[-1][0] == entries[-1].recorded_at
        assert all(one <= two for one, two in pairwise(curve.points))


def test_without_noise_there_is_no_point() -> None:
    entries = [*charges(1), replace(charges(1, noise_multiplier=0.0)[0], sequence=2)]
    steps = next(curve for curve in spending_curves(entries, LIFE) if curve.name == STEPS)
    assert len(steps.points) == 1


def test_nothing_charged_is_nothing_drawn() -> None:
    assert spending_curves([], LIFE) == ()
    assert curves_drawn((), limit=9.0, until=START) == ""
