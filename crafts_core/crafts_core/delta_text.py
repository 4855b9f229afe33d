"""How a delta is written for people: never smaller than it is.

Delta is the chance that the promise of privacy says nothing. Rounded to nearest, 1.49e-4 reads
0.0001, and who multiplies that by the number of patients is told a third less than is true.
"""

from decimal import ROUND_CEILING, Context, Decimal

_UP = Context(prec=3, rounding=ROUND_CEILING)


def delta_text(delta: float) -> str:
    """At most three significant digits, rounded up."""
    return f"{_up(Decimal(repr(delta))):f}"


def delta_times_patients(delta: float, patients: int) -> float:
    """How many patients the promise may say nothing about, in expectation; rounded up likewise."""
    return float(_up(Decimal(repr(delta)) * patients))


def _up(value: Decimal) -> Decimal:
    # By way of float to drop what a plain number would not show, like the zeros of 0.00100.
    return Decimal(repr(float(_UP.plus(value))))
