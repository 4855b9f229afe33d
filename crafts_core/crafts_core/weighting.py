"""How much each site counts: precision, alignment gate, cap. Pure functions of scalars.

Design section 6: ``alpha_k`` is proportional to ``p_k a_k`` and capped by the site's share of the
agreed patients, where

    p_k = 1 / (tau^2 + v_k)           precision, from the *declared* noise variance v_k
    a_k = sigmoid(gain_k / softness)  soft gate on the gain in alignment margin, to first order

Products are formed as logarithms, so that no combination of noise and gain gives 0/0.

Where only a sum over sites is opened there is no gain, and what is left is public before any site
answers: then sites and coordinator compute the same weights (``agreed_weights``).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from crafts_core.plan_sections import AggregationConfig


@dataclass(frozen=True, slots=True)
class AgreedWeights:
    """How much each of some sites counts, in their order."""

    weights: list[float]
    """Summing to one."""
    caps: list[float]
    """The most that each could have counted."""


def agreed_weights(
    config: AggregationConfig, patients: Sequence[int], noise_variances: Sequence[float]
) -> AgreedWeights:
    """Weights from the plan and public numbers alone: the gate of each site is neutral.

    Args:
        config: Of the plan.
        patients: What sites and coordinator agreed on.
        noise_variances: v_k of each site.
    """
    max_weight = 1.0
    match config.rule:
        case "alignment_regularized":
            max_weight = config.max_weight
            weights = normalised(
                [log_precision(v, config.precision_floor) for v in noise_variances]
            )
        case "uniform":
            weights = equal_weights(len(patients))
        case "by_patients":
            weights = weights_by_patients(patients)
        case other:
            raise ValueError(f"no site knows the weights of rule {other}")
    caps = share_caps(
        patients, max_weight=max_weight, max_weight_per_share=config.max_weight_per_share
    )
    return AgreedWeights(weights=capped(weights, caps), caps=caps)


def equal_weights(num_sites: int) -> list[float]:
    """Plain averaging."""
    return [1.0 / num_sites] * num_sites


def weights_by_patients(patients: Sequence[int]) -> list[float]:
    """Federated averaging."""
    total = sum(patients)
    return [n / total for n in patients]


def log_precision(noise_variance: float, precision_floor: float) -> float:
    """``log p_k = -log(tau^2 + v_k)``; tau^2 keeps a noiseless site finite."""
    return -math.log(precision_floor + noise_variance)


def log_gate(gain: float, softness: float) -> float:
    """``log a_k = log sigmoid(gain / softness)``; without overflow at either end.

    A gain that is not finite closes the gate: ``-inf``.
    """
    if not math.isfinite(gain):
        return -math.inf
    x = gain / softness
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


def share_caps(
    patients: Sequence[int], *, max_weight: float, max_weight_per_share: float
) -> list[float]:
    """The most that each of the sites that answered may count, from agreed numbers alone.

    ``max_weight_per_share`` times the site's share of their patients and never above
    ``max_weight``; but as much as in plain averaging everybody may count. So the caps can always be
    kept: their sum is at least one. With two or three sites it is ``max_weight`` that binds, as
    twice a third is more than the 0.6 of most plans.

    Args:
        patients: What sites and coordinator agreed on, of who answered.
        max_weight: Of the plan, in (0, 1].
        max_weight_per_share: Of the plan, at least one.
    """
    if not 0 < max_weight <= 1:
        raise ValueError(f"expected 0 < max_weight <= 1, got {max_weight}")
    if not max_weight_per_share >= 1:
        raise ValueError(f"expected max_weight_per_share >= 1, got {max_weight_per_share}")
    plain, total = 1.0 / len(patients), sum(patients)
    return [max(plain, min(max_weight, max_weight_per_share * n / total)) for n in patients]


def capped(weights: Sequence[float], caps: Sequence[float]) -> list[float]:
    """No weight above its cap; the excess goes to the others in proportion.

    Guarantee: the sum stays one, no weight passes its cap, and sites below their caps keep their
    ratios.

    Args:
        weights: Non-negative, summing to one.
        caps: Of each site; together at least one.
    """
    if math.fsum(caps) < 1.0 - 1e-9:
        raise ValueError(f"expected caps that sum to one at least, got {math.fsum(caps)}")
    count = len(weights)
    result = list(weights)
    at_cap: set[int] = set()
    while over := {k for k in range(count) if k not in at_cap and result[k] > caps[k]}:
        at_cap |= over
        free = [k for k in range(count) if k not in at_cap]
        left = 1.0 - math.fsum(caps[k] for k in at_cap)
        total = math.fsum(weights[k] for k in free)
        for k in at_cap:
            result[k] = caps[k]
        for k in free:
            result[k] = left * weights[k] / total if total > 0 else left / len(free)
    return result
