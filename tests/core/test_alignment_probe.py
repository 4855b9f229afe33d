"""The margin asks what the text does; its gradient improves alignment."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from crafts_core.alignment_probe import AlignmentProbe
from crafts_core.exchange import global_norm
from crafts_core.foundation import Foundation
from crafts_core.plan_sections import AdapterConfig
from crafts_core.starting_point import initial_state
from crafts_core.state import add_delta, factor_names

CONFIG = AdapterConfig(kind="lora", rank=2, targets=("attn2.to_v", "conv1"), first_factor="random")


@pytest.fixture(scope="module")
def probe(foundation: Foundation) -> AlignmentProbe:
    return AlignmentProbe(foundation, CONFIG, seed=5, num_draws=2)


def random_state(foundation: Foundation) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(8)
    state = initial_state(foundation, CONFIG, 0)
    delta = {
        name: 0.3 * torch.randn(state[name].shape, generator=generator)
        for name in factor_names(state, "second")
    }
    return add_delta(state, delta)


def test_margin_follows_from_seed_and_state(foundation: Foundation, probe: AlignmentProbe) -> None:
    state, start = random_state(foundation), initial_state(foundation, CONFIG, 0)
    first = probe.margin(state)
    assert probe.margin(start) != first
    assert probe.margin(state) == first
    assert AlignmentProbe(foundation, CONFIG, seed=5).margin(state) == first
    assert AlignmentProbe(foundation, CONFIG, seed=6).margin(state) != first


def test_denoiser_that_ignores_its_text_has_margin_zero(foundation: Foundation) -> None:
    deaf = copy.deepcopy(foundation.generator.denoiser)
    for name, module in deaf.named_modules():
        if name.endswith("attn2.to_out.0"):
            module.weight.zero_()
    generator = replace(foundation.generator, denoiser=deaf)
    probe = AlignmentProbe(replace(foundation, generator=generator), CONFIG, seed=0)
    assert probe.margin(random_state(foundation)) == pytest.approx(0.0, abs=1e-6)


def test_margin_is_between_minus_two_and_two(foundation: Foundation, probe: AlignmentProbe) -> None:
    assert -2 <= probe.margin(random_state(foundation)) <= 2


def test_gradient_is_that_of_finite_differences(
    foundation: Foundation, probe: AlignmentProbe
) -> None:
    state = random_state(foundation)
    _, gradient = probe.gradient(state, "second")
    assert gradient.keys() == set(factor_names(state, "second"))
    norm = sum(float(tensor.square().sum()) for tensor in gradient.values()) ** 0.5
    direction = {name: tensor / norm for name, tensor in gradient.items()}
    ahead, _ = probe.gradient(add_delta(state, direction, 1e-2), "second")
    behind, _ = probe.gradient(add_delta(state, direction, -1e-2), "second")
    assert (ahead - behind) / 2e-2 == pytest.approx(norm, rel=2e-2)


def test_margin_gradient_is_that_of_finite_differences(
    foundation: Foundation, probe: AlignmentProbe
) -> None:
    state = random_state(foundation)
    margin, gradient = probe.margin_gradient(state, "second")
    assert margin == pytest.approx(probe.margin(state), abs=1e-6)
    direction = {name: tensor / global_norm(gradient) for name, tensor in gradient.items()}
    ahead, behind = (probe.margin(add_delta(state, direction, step)) for step in (1e-2, -1e-2))
    assert (ahead - behind) / 2e-2 == pytest.approx(global_norm(gradient), rel=2e-2)


def test_step_against_the_gradient_improves_alignment(
    foundation: Foundation, probe: AlignmentProbe
) -> None:
    state = random_state(foundation)
    before, gradient = probe.gradient(state, "first")
    after, _ = probe.gradient(add_delta(state, gradient, -0.1), "first")
    assert after < before


def test_probe_leaves_the_foundation_untouched(foundation: Foundation) -> None:
    before = copy.deepcopy(foundation.generator.denoiser.state_dict())
    AlignmentProbe(foundation, CONFIG, seed=0, num_draws=1).gradient(
        random_state(foundation), "second"
    )
    after = foundation.generator.denoiser.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(weight.requires_grad for weight in foundation.generator.denoiser.parameters())


def test_no_draws_is_refused(foundation: Foundation) -> None:
    with pytest.raises(ValueError, match="num_draws"):
        AlignmentProbe(foundation, CONFIG, seed=0, num_draws=0)
