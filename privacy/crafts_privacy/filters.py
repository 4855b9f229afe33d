"""The privacy filters that a policy can declare for a cohort's life, by name.

Names and closed forms only, so that reading a policy stays quick; ``lifetime`` counts with them and
says why they hold. ``sums`` adds up what plans declare. ``renyi:ORDER`` adds up Rényi divergences
at that order and converts the sum to epsilon.
"""

import math
from collections.abc import Sequence

SUMS = "sums"
FILTER_PATTERN = r"^(sums|renyi:([2-9]|[1-9][0-9]{1,2}))$"
"""Orders are whole numbers, where the divergence of a sampled Gaussian is a finite sum."""
_ORDERS = range(2, 1000)


def renyi_order(name: str) -> int:
    """The order in the name of a Rényi filter."""
    return int(name.removeprefix("renyi:"))


def conversion_cost(order: int, delta: float) -> float:
    """Epsilon that converting from Rényi at an order costs before the first step.

    Proposition 12 of Canonne, Kamath and Steinke 2020.
    """
    return math.log1p(-1 / order) - math.log(delta * order) / (order - 1)


def best_order(max_epsilon: float, delta: float) -> int:
    """The order at which unsampled Gaussians, whose divergence is ORDER times a number, fit most.

    Sampled ones want another by little.
    """
    return max(_ORDERS, key=lambda order: (max_epsilon - conversion_cost(order, delta)) / order)


def check_filters(names: Sequence[str], *, max_epsilon: float, delta: float) -> None:
    """Each is declared once and leaves room for a first step.

    Raises:
        ValueError: says which does not, and what to declare instead.
    """
    if len(set(names)) < len(names):
        raise ValueError("expected every filter once")
    share = delta / len(names)
    for name in names:
        if name != SUMS and conversion_cost(renyi_order(name), share) >= max_epsilon:
            raise ValueError(
                f"{name} leaves no room in epsilon {max_epsilon:g}; "
                f"declare renyi:{best_order(max_epsilon, share)}"
            )
