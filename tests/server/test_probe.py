"""The real probe: deterministic, split, cheap to ask twice, and its gradient points uphill."""

import pytest
import torch

from crafts_core.exchange import global_norm
from crafts_core.foundation import Foundation
from crafts_core.plan_sections import AdapterConfig
from crafts_core.starting_point import initial_state
from crafts_core.state import State, add_delta, factor_names
from crafts_server.probe import FoundationProbe, ProbeSize

CONFIG = AdapterConfig(kind="lora", rank=2, targets=("to_q", "to_v"), first_factor="random")
SIZE = ProbeSize(margin_tiles=4, margin_draws=2, step_tiles=2, step_draws=2)


def probe(foundation: Foundation, *, seed: int = 1) -> FoundationProbe:
    return FoundationProbe(foundation, CONFIG, seed=seed, size=SIZE)


def moved_state(foundation: Foundation) -> State:
    state = initial_state(foundation, CONFIG, 0)
    generator = torch.Generator().manual_seed(2)
    return {
        name: tensor + 0.3 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in state.items()
    }


def test_the_same_seed_gives_the_same_margin_in_another_process(foundation: Foundation) -> None:
    state = moved_state(foundation)
    assert probe(foundation).margin(state) == probe(foundation).margin(state)


def test_the_margin_is_that_of_the_state_asked_for(foundation: Foundation) -> None:
    """The last answer is remembered; another state must not get it."""
    one, state = probe(foundation), moved_state(foundation)
    other = add_delta(state, state)
    first = one.margin(state)
    assert one.margin(other) == probe(foundation).margin(other) != first
    assert one.margin(state) == first


def test_steps_draw_anew_each_round_and_the_margin_does_not(foundation: Foundation) -> None:
    one, state = probe(foundation), moved_state(foundation)
    assert one.for_round(1).margin(state) == one.for_round(2).margin(state)
    slopes = [one.for_round(number).alignment_gradient(state, "second") for number in (1, 1, 2)]
    name = factor_names(state, "second")[0]
    assert torch.equal(slopes[0][name], slopes[1][name])
    assert not torch.equal(slopes[0][name], slopes[2][name])


def test_the_gradient_covers_exactly_the_trained_factor(foundation: Foundation) -> None:
    state = moved_state(foundation)
    slope = probe(foundation).for_round(1).alignment_gradient(state, "first")
    assert sorted(slope) == factor_names(state, "first")


def test_what_sites_told_takes_the_place_of_the_probes_own_loss(foundation: Foundation) -> None:
    """In alignment steps alone: the margin that accepts a step stays where it was."""
    state, asked = moved_state(foundation), []

    class Told:
        def gradient(self, _state: State, factor: str, *, num_tiles: int, seed: int) -> State:
            asked.append((num_tiles, seed))
            return {name: torch.ones_like(state[name]) for name in factor_names(state, factor)}

    told = FoundationProbe(foundation, CONFIG, seed=1, size=SIZE, told_loss=lambda _: Told())
    slopes = [told.for_round(number).alignment_gradient(state, "second") for number in (1, 1, 2)]
    assert all((tensor == 1).all() for slope in slopes for tensor in slope.values())
    assert asked[0] == asked[1] != asked[2]
    assert told.margin(state) == probe(foundation).margin(state)


def test_a_step_against_the_gradient_lowers_the_loss(foundation: Foundation) -> None:
    state = moved_state(foundation)
    steps = probe(foundation).steps_of(1)
    loss, slope = steps.gradient(state, "second")
    after, _ = steps.gradient(add_delta(state, slope, -1e-2 / global_norm(slope)), "second")
    assert after < loss


def test_the_margins_gradient_is_of_the_margin_in_every_round(foundation: Foundation) -> None:
    """A small step along it raises what ``margin`` measures by as much as it says."""
    one, state = probe(foundation), moved_state(foundation)
    first, second = (one.for_round(n).margin_gradient(state, "second") for n in (1, 2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert sorted(first) == factor_names(state, "second")
    norm = global_norm(first)
    ahead, behind = (one.margin(add_delta(state, first, way * 1e-2 / norm)) for way in (1, -1))
    assert (ahead - behind) / 2e-2 == pytest.approx(norm, rel=2e-2)


def test_a_control_net_does_not_move_the_margin(foundation) -> None:
    parts = ("generator", "nuclei")
    state = initial_state(foundation, CONFIG, 0, parts)
    probe = FoundationProbe(foundation, CONFIG, seed=1, size=SIZE, parts=parts)
    moved = {
        name: value + 1 if name.startswith("control.") else value for name, value in state.items()
    }
    assert probe.margin(moved) == probe.margin(state)
    gradient = probe.for_round(1).alignment_gradient(state, "second")
    assert gradient.keys() == set(factor_names(state, "second"))
    alone = initial_state(foundation, CONFIG, 0, ("nuclei",))
    only = FoundationProbe(foundation, CONFIG, seed=1, size=SIZE, parts=("nuclei",))
    assert only.margin(alone) == pytest.approx(probe.margin(state), abs=1e-6)
