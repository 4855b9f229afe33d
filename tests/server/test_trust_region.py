"""Alignment steps stay inside their region; a step that the probe dislikes is cut or dropped."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from crafts_core.exchange import global_norm
from crafts_core.state import State, add_delta
from crafts_server.trust_region import (
    accept_or_halve,
    alignment_steps,
    without_opposing_component,
)

SEEDS = st.integers(0, 2**31)


def random_state(seed: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {"a": torch.randn(5, generator=generator), "b": torch.randn(2, 3, generator=generator)}


def flat(state: State) -> list[float]:
    return [float(x) for name in sorted(state) for x in state[name].flatten().double()]


def dot(left: State, right: State) -> float:
    return math.fsum(x * y for x, y in zip(flat(left), flat(right), strict=True))


def oracle_steps(
    state: list[float], step: list[float], best: list[float], *, radius: float, num_steps: int
) -> list[float]:
    """The formula, coordinate by coordinate, for the loss |x - best|^2 / 2."""
    norm = math.sqrt(sum(d * d for d in step))
    trust = [0.0] * len(step)
    for _ in range(num_steps):
        slope = [s + d + t - b for s, d, t, b in zip(state, step, trust, best, strict=True)]
        size = math.sqrt(sum(g * g for g in slope))
        trust = [
            t - radius * norm / num_steps * g / size for t, g in zip(trust, slope, strict=True)
        ]
        along = sum(t * d for t, d in zip(trust, step, strict=True))
        if along < 0:
            trust = [t - along / norm**2 * d for t, d in zip(trust, step, strict=True)]
    return trust


@given(SEEDS, st.floats(0.01, 1.0), st.integers(1, 5))
def test_alignment_steps_equal_the_formula(seed: int, radius: float, num_steps: int) -> None:
    state, step, best = (random_state(seed + offset) for offset in range(3))
    trust = alignment_steps(
        state,
        step,
        lambda at: {name: at[name] - best[name] for name in at},
        trust_radius=radius,
        num_steps=num_steps,
    )
    oracle = oracle_steps(flat(state), flat(step), flat(best), radius=radius, num_steps=num_steps)
    assert flat(trust) == pytest.approx(oracle, abs=1e-5)


@given(SEEDS, st.floats(0.0, 1.0), st.integers(0, 5))
def test_alignment_steps_stay_in_the_region_and_never_oppose(
    seed: int, radius: float, num_steps: int
) -> None:
    state, step, slope = (random_state(seed + offset) for offset in range(3))
    trust = alignment_steps(
        state, step, lambda _at: slope, trust_radius=radius, num_steps=num_steps
    )
    smallest = torch.finfo(torch.float32).tiny  # below it numbers have few digits
    assert global_norm(trust) <= radius * global_norm(step) * (1 + 1e-6) + smallest
    assert dot(trust, step) >= -1e-6 * global_norm(step) ** 2


def test_a_gradient_along_the_step_is_projected_away_entirely() -> None:
    step = random_state(1)
    trust = alignment_steps({**step}, step, lambda _at: step, trust_radius=0.5, num_steps=3)
    assert global_norm(trust) < 1e-6


def test_a_component_along_the_step_is_kept() -> None:
    step = random_state(2)
    trust = add_delta({name: torch.zeros_like(t) for name, t in step.items()}, step, 0.1)
    assert flat(without_opposing_component(trust, step)) == flat(trust)


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_a_gradient_that_says_nothing_adds_nothing(value: float) -> None:
    step = random_state(3)
    slope = {name: torch.full_like(tensor, value) for name, tensor in step.items()}
    trust = alignment_steps(step, step, lambda _at: slope, trust_radius=0.5, num_steps=2)
    assert global_norm(trust) == 0.0


def test_a_zero_step_stays_zero() -> None:
    zero = {name: torch.zeros_like(tensor) for name, tensor in random_state(4).items()}
    trust = alignment_steps(zero, zero, lambda _at: zero, trust_radius=0.5, num_steps=2)
    assert global_norm(trust) == 0.0


def margins(worst_scale: float) -> tuple[list[float], "object"]:
    """A probe that dislikes scales above ``worst_scale``; state a starts at 0 and steps by 1."""
    asked: list[float] = []

    def margin(state: dict[str, Tensor]) -> float:
        asked.append(float(state["a"]))
        return 0.5 if asked[-1] <= worst_scale else 0.1

    return asked, margin


START, STEP = {"a": torch.zeros(())}, {"a": torch.ones(())}


@pytest.mark.parametrize(("worst_scale", "scale"), [(1.0, 1.0), (0.6, 0.5), (0.3, 0.25)])
def test_a_step_is_halved_until_the_margin_holds(worst_scale: float, scale: float) -> None:
    _, margin = margins(worst_scale)
    taken = accept_or_halve(START, STEP, margin, margin_before=0.5, tolerance=0.02, max_halvings=3)
    assert (taken.scale, float(taken.state["a"]), taken.margin) == (scale, scale, 0.5)


def test_after_the_last_halving_the_step_is_rejected() -> None:
    asked, margin = margins(0.0)
    taken = accept_or_halve(START, STEP, margin, margin_before=0.5, tolerance=0.02, max_halvings=3)
    assert asked == [1.0, 0.5, 0.25, 0.125]
    assert (taken.scale, float(taken.state["a"]), taken.margin) == (0.0, 0.0, 0.5)


@pytest.mark.parametrize(("fall", "scale"), [(0.0199, 1.0), (0.0201, 0.0)])
def test_the_tolerance_is_the_border(fall: float, scale: float) -> None:
    taken = accept_or_halve(
        START, STEP, lambda _s: 0.5 - fall, margin_before=0.5, tolerance=0.02, max_halvings=0
    )
    assert taken.scale == scale


def test_a_margin_that_is_not_a_number_is_never_accepted() -> None:
    taken = accept_or_halve(
        START, STEP, lambda _s: math.nan, margin_before=0.5, tolerance=10.0, max_halvings=2
    )
    assert taken.scale == 0.0
