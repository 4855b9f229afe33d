"""Directions from noisy means: against torch's optimizers, and against the noise itself."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from crafts_privacy.optimizers import AdamBC, Momentum, Optimizer


def gradients(steps: int, num: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(num, generator=generator, dtype=torch.float64) for _ in range(steps)]


def test_without_noise_it_is_torch_adam() -> None:
    weights = nn.Parameter(torch.zeros(50, dtype=torch.float64))
    theirs = torch.optim.Adam([weights], lr=0.1, betas=(0.8, 0.95), eps=1e-12)
    ours, adam = torch.zeros(50, dtype=torch.float64), AdamBC(0.8, 0.95)
    for grad in gradients(6, 50):
        weights.grad = grad.clone()
        theirs.step()
        ours -= 0.1 * adam.direction(grad, 0.0)
    torch.testing.assert_close(ours, weights.detach(), rtol=1e-5, atol=1e-6)


def test_momentum_is_torch_sgd() -> None:
    weights = nn.Parameter(torch.zeros(50, dtype=torch.float64))
    theirs = torch.optim.SGD([weights], lr=0.1, momentum=0.7)
    ours, momentum = torch.zeros(50, dtype=torch.float64), Momentum(0.7)
    for grad in gradients(6, 50):
        weights.grad = grad.clone()
        theirs.step()
        ours -= 0.1 * momentum.direction(grad, 3.0)
    torch.testing.assert_close(ours, weights.detach(), rtol=1e-5, atol=1e-6)


def test_the_noises_share_of_the_second_moment_is_taken_away() -> None:
    """A constant gradient under noise of its own size steps by 1, as Adam does without noise."""
    generator = torch.Generator().manual_seed(1)
    adam = AdamBC(0.0, 0.999, floor=0.1)
    corrected = torch.zeros(20_000)
    for _ in range(400):
        noise = torch.randn(20_000, generator=generator, dtype=torch.float64)
        corrected = adam.direction(2.0 + 2.0 * noise, 2.0)
    assert float(corrected.mean()) == pytest.approx(1.0, abs=0.02)
    plain = 2.0 / math.sqrt(2.0**2 + 2.0**2)
    assert abs(float(corrected.mean()) - plain) > 0.2, "plain Adam would take a smaller step"


def test_where_there_is_only_noise_the_step_stays_bounded() -> None:
    generator = torch.Generator().manual_seed(2)
    adam = AdamBC(0.0, 0.999, floor=1.0)
    for _ in range(50):
        noise = 1e-3 * torch.randn(1000, generator=generator, dtype=torch.float64)
        direction = adam.direction(noise, 1e-3)
    assert float(direction.abs().max()) < 5
    assert bool(direction.isfinite().all())


def test_an_exactly_zero_gradient_does_not_divide_by_zero() -> None:
    assert torch.equal(AdamBC().direction(torch.zeros(3).double(), 0.0), torch.zeros(3))


@pytest.mark.parametrize("bad", [1.0, -0.1, math.nan])
def test_decays_are_checked(bad: float) -> None:
    with pytest.raises(ValueError, match="momentum"):
        Momentum(bad)
    with pytest.raises(ValueError, match="second_moment_decay"):
        AdamBC(0.9, bad)
    with pytest.raises(ValueError, match="floor"):
        AdamBC(floor=-bad if bad > 0 else bad)


@pytest.mark.parametrize("make", [lambda: Momentum(0.7), lambda: AdamBC(0.8, 0.95)])
def test_a_state_that_is_loaded_goes_on_to_the_last_bit(make: Callable[[], Optimizer]) -> None:
    whole, state = make(), {}
    for grad in gradients(5, 50):
        expected = whole.direction(grad, 0.5).clone()
        piece = make()
        piece.load_state(state)
        assert torch.equal(piece.direction(grad, 0.5), expected)
        state = piece.state()


def test_a_state_is_a_copy_and_of_one_optimizer() -> None:
    momentum = Momentum(0.7)
    assert momentum.state() == {}
    first, second = gradients(2, 4)
    momentum.direction(first, 0.5)
    state = momentum.state()
    momentum.direction(second, 0.5)
    assert torch.equal(state["velocity"], first.float())
    with pytest.raises(ValueError, match="expected the state"):
        AdamBC().load_state(state)
    with pytest.raises(ValueError, match="expected the state"):
        momentum.load_state({"first": first})
    momentum.load_state({})
    assert momentum.state() == {}
