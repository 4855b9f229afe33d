"""Alignment steps on public data inside a trust region, and the check that accepts a step.

Design section 6. ``d`` is the step that the sites' updates ask for; ``t`` moves it towards
alignment on the public probe:

    t_0 = 0
    t_{i+1} = project(t_i - (rho |d| / n) g_i / |g_i|),   g_i = grad loss(state + d + t_i)
    project(t) = t - min(<t, d>, 0) / |d|^2 d             without the component opposing d

so ``|t| <= rho |d|`` and ``<t, d> >= 0``: public data may bend the sites' step, never undo it.
``state + s (d + t)`` is accepted for the first s in 1, 1/2, 1/4 ... at which the probe's margin
does not fall by more than the tolerance; after that s = 0.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from crafts_core.exchange import global_norm, inner_product
from crafts_core.state import State, add_delta

Margin = Callable[[Mapping[str, Tensor]], float]
Gradient = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class AcceptedStep:
    """Where the global adapter goes. ``scale`` zero means that it stays."""

    state: State
    scale: float
    margin: float


def alignment_steps(
    state: Mapping[str, Tensor],
    step: Mapping[str, Tensor],
    gradient: Gradient,
    *,
    trust_radius: float,
    num_steps: int,
) -> State:
    """t: what public alignment adds to ``step``.

    Guarantee: ``|t| <= trust_radius |step|`` and ``<t, step> >= 0``, to rounding. Zero when the
    step or the gradient is zero; a gradient that is not finite ends the steps taken so far.

    Args:
        state: Global adapter before the step.
        step: d; names of the factor that trained.
        gradient: Of the public alignment loss, for the same names.
        trust_radius: rho.
        num_steps: n.
    """
    step_norm = global_norm(step)
    trust = {name: torch.zeros_like(tensor) for name, tensor in step.items()}
    if step_norm == 0.0 or trust_radius == 0.0 or num_steps == 0:
        return trust
    length = trust_radius * step_norm / num_steps
    for _ in range(num_steps):
        slope = gradient(add_delta(add_delta(state, step), trust))
        slope_norm = global_norm(slope)
        # Written so that NaN ends the loop too.
        if not 0.0 < slope_norm < float("inf"):
            break
        trust = add_delta(trust, slope, -length / slope_norm)
        trust = without_opposing_component(trust, step)
    return trust


def without_opposing_component(trust: State, step: Mapping[str, Tensor]) -> State:
    """``trust`` minus its projection on ``step`` where that points against ``step``."""
    along = inner_product(trust, step)
    if along >= 0.0:
        return trust
    return add_delta(trust, step, -along / global_norm(step) ** 2)


def accept_or_halve(
    state: State,
    step: Mapping[str, Tensor],
    margin: Margin,
    *,
    margin_before: float,
    tolerance: float,
    max_halvings: int,
) -> AcceptedStep:
    """The longest of step, step/2, ... that the probe accepts, or none of it.

    A margin that is not finite is never accepted.
    """
    scale = 1.0
    for _ in range(max_halvings + 1):
        candidate = add_delta(state, step, scale)
        margin_after = margin(candidate)
        if margin_after >= margin_before - tolerance:
            return AcceptedStep(state=candidate, scale=scale, margin=margin_after)
        scale /= 2.0
    return AcceptedStep(state=add_delta(state, {}), scale=0.0, margin=margin_before)
