"""How much each site counts: precision, alignment gate, cap. Pure functions of scalars.

Design section 6: ``alpha_k`` is proportional to ``p_k a_k`` and capped, where

    p_k = 1 / (tau^2 + v_k)              precision, from the *declared* noise variance v_k
    a_k = sigmoid(gain_k / temperature)  soft gate on the gain in alignment margin

Products are formed as logarithms, so that no combination of noise and gain gives 0/0.
"""

import math
from collections.abc import Sequence


def log_precision(noise_variance: float, precision_floor: float) -> float:
    """``log p_k = -log(tau^2 + v_k)``; tau^2 keeps a noiseless site finite."""
    return -math.log(precision_floor + noise_variance)


def log_gate(gain: float, temperature: float) -> float:
    """``log a_k = log sigmoid(gain / temperature)``; without overflow at either end.

    A gain that is not finite closes the gate: ``-inf``.
    """
    if not math.isfinite(gain):
        return -math.inf
    x = gain / temperature
    return -math.log1p(math.exp(-x)) if x >= 0 else x - math.log1p(math.exp(x))


def normalised(log_scores: Sequence[float]) -> list[float]:
    """Weights proportional to ``exp(log_score)``, summing to one.

    Where every score is ``-inf`` nobody is better than another: equal weights.
    """
    if not log_scores:
        raise ValueError("expected at least one score")
    highest = max(log_scores)
    if highest == -math.inf:
        return [1.0 / len(log_scores)] * len(log_scores)
    scores = [math.exp(score - highest) for score in log_scores]
    total = math.fsum(scores)
    return [score / total for score in scores]


def capped(weights: Sequence[float], max_weight: float) -> list[float]:
    """No weight above ``max_weight``; the excess goes to the others in proportion.

    Guarantee: the sum stays one; order among the sites stays; a weight is above the cap only
    where the cap cannot be kept (``len(weights) * max_weight < 1``), and then all are equal.

    Args:
        weights: Non-negative, summing to one.
        max_weight: The cap, in (0, 1].
    """
    if not 0 < max_weight <= 1:
        raise ValueError(f"expected 0 < max_weight <= 1, got {max_weight}")
    count = len(weights)
    if count * max_weight <= 1.0:
        return [1.0 / count] * count
    result = list(weights)
    at_cap: set[int] = set()
    while over := {k for k, w in enumerate(result) if k not in at_cap and w > max_weight}:
        at_cap |= over
        free = [k for k in range(count) if k not in at_cap]
        left = 1.0 - max_weight * len(at_cap)
        total = math.fsum(weights[k] for k in free)
        for k in at_cap:
            result[k] = max_weight
        for k in free:
            result[k] = left * weights[k] / total if total > 0 else left / len(free)
    return result
