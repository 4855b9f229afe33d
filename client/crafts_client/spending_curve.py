"""What a cohort had spent after each charge: a curve for each filter, and one for its steps."""

import math
from collections.abc import Sequence
from datetime import datetime

from markupsafe import Markup
from pydantic import BaseModel, ConfigDict

from crafts_core import charts
from crafts_privacy import accounting
from crafts_privacy.charges import plans_of
from crafts_privacy.ledger_rows import LedgerEntry
from crafts_privacy.lifetime import Lifetime

MOST_POINTS = 60
"""Of a curve; a longer life is drawn at evenly chosen charges, the last one among them."""
STEPS = "steps, had all been fixed beforehand"


class Curve(BaseModel):
    """Epsilon after some charges."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str
    """Of a filter, or ``STEPS``."""
    points: tuple[tuple[datetime, float], ...]


def spending_curves(charged: Sequence[LedgerEntry], lifetime: Lifetime) -> tuple[Curve, ...]:
    """One for each filter that bounds something, one for the steps; none before the first charge.

    Steps are composed as coarsely as searches are, which never understates them. Where any ran
    without noise there is no epsilon, and from there on no point.

    Args:
        charged: A cohort's charges, oldest first.
        lifetime: The limit, and the filters that count against it.
    """
    points: dict[str, list[tuple[datetime, float]]] = {}
    for number in _chosen(len(charged)):
        until = charged[:number]
        events = [entry.event for entry in until]
        states = lifetime.states(plans_of(until))
        figures = {state.name: state.epsilon for state in states}
        figures[STEPS] = accounting.epsilon(
            events, lifetime.delta, discretization=accounting.COARSE
        )
        for name, epsilon in figures.items():
            if math.isfinite(epsilon):
                points.setdefault(name, []).append((until[-1].recorded_at, epsilon))
    return tuple(Curve(name=name, points=tuple(each)) for name, each in points.items())


def curves_drawn(curves: Sequence[Curve], *, limit: float, until: datetime) -> Markup:
    """The curves beside the limit; nothing where nothing was charged."""
    if not curves:
        return Markup()
    return charts.timeline(
        [(curve.name, curve.points) for curve in curves],
        until=until,
        unit="epsilon counted so far",
        mark=limit,
        told="limit for life",
    )


def _chosen(count: int) -> list[int]:
    """Numbers of charges, from 1 to all of them."""
    points = min(count, MOST_POINTS)
    return [math.ceil(count * number / points) for number in range(1, points + 1)]
