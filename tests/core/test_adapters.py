"""The weights that travel: exact, named, removable, and starting from public directions."""

import copy

import pytest
import torch
from torch import Tensor

from crafts_core.adapters import Adapter, merged_denoiser, target_layers
from crafts_core.foundation import Foundation
from crafts_core.plan_sections import AdapterConfig
from crafts_core.public_update import (
    PublicUpdateConfig,
    influence,
    leading_right_directions,
    public_update,
)
from crafts_core.stages.schedule import NoiseSchedule
from crafts_core.starting_point import initial_state
from crafts_core.state import AdapterError, add_delta, factor_names

LORA = AdapterConfig(
    kind="lora", rank=3, targets=("to_q", "to_out.0", "conv1", "conv_in", "ff.net.2")
)
FULL = AdapterConfig(kind="full")
FAST = PublicUpdateConfig(num_shifts=2, draws_per_tile=1, max_tiles=4)


def random_state(foundation: Foundation, *, seed: int = 0) -> dict[str, Tensor]:
    config = LORA.model_copy(update={"first_factor": "random"})
    state = initial_state(foundation, config, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    return {
        name: 0.2 * torch.randn(tensor.shape, generator=generator) for name, tensor in state.items()
    }


def attached(foundation: Foundation, state: dict[str, Tensor] | None = None) -> Adapter:
    adapter = Adapter.attach(copy.deepcopy(foundation.generator.denoiser), LORA)
    if state is not None:
        adapter.load_state(state)
    return adapter


def inputs(foundation: Foundation) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(9)
    latents = torch.randn(2, *foundation.generator.latent_shape, generator=generator)
    text = foundation.generator.encode_captions(["tissue with glands", "lung"])
    return latents, torch.tensor([10, 700]), text


def test_adapter_with_zero_second_factor_changes_nothing(foundation: Foundation) -> None:
    state = initial_state(foundation, LORA, 0, public_work=FAST)
    expected = foundation.generator.denoiser(*inputs(foundation)).sample
    got = attached(foundation, state).predict(*inputs(foundation))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


def test_merged_weights_are_base_plus_product(foundation: Foundation) -> None:
    state = random_state(foundation)
    merged = merged_denoiser(foundation.generator.denoiser, LORA, state)
    for name, layer in target_layers(foundation.generator.denoiser, LORA).items():
        first, second = state[f"{name}.first"], state[f"{name}.second"]
        product = (second.flatten(1) @ first.flatten(1)).reshape(layer.weight.shape)
        torch.testing.assert_close(merged.get_submodule(name).weight, layer.weight + product)


@pytest.mark.slow
def test_merged_denoiser_predicts_what_the_adapter_predicts(foundation: Foundation) -> None:
    adapter = attached(foundation, random_state(foundation))
    expected = adapter.predict(*inputs(foundation))
    plain = foundation.generator.denoiser(*inputs(foundation)).sample
    assert not torch.allclose(expected, plain, atol=1e-3)
    torch.testing.assert_close(adapter.merged()(*inputs(foundation)).sample, expected)
    torch.testing.assert_close(adapter.predict(*inputs(foundation)), expected)


def test_detached_unet_is_the_foundations_again(foundation: Foundation) -> None:
    unet = attached(foundation, random_state(foundation)).detach()
    expected = foundation.generator.denoiser.state_dict()
    assert unet.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in unet.state_dict().items())


def test_plain_unets_can_be_attached_again(foundation: Foundation) -> None:
    """Merging and detaching leave no trace of the library that injected the factors."""
    first = attached(foundation, random_state(foundation))
    for unet in (first.merged(), first.detach()):
        again = Adapter.attach(unet, LORA)
        assert again.state().keys() == random_state(foundation).keys()


@pytest.mark.parametrize(
    ("factor", "endings"),
    [("first", {"first"}), ("second", {"second"}), ("both", {"first", "second"})],
)
def test_exactly_the_asked_factor_trains(
    foundation: Foundation, factor: str, endings: set[str]
) -> None:
    adapter = attached(foundation)
    chosen = adapter.trainable("both")
    chosen = adapter.trainable(factor)
    assert {name.rpartition(".")[2] for name in chosen} == endings
    opened = {id(weight) for weight in adapter.denoiser.parameters() if weight.requires_grad}
    assert opened == {id(weight) for weight in chosen.values()}


def test_training_moves_the_chosen_factor_only(foundation: Foundation) -> None:
    before = random_state(foundation)
    adapter = attached(foundation, before)
    parameters = list(adapter.trainable("second").values())
    adapter.predict(*inputs(foundation)).square().mean().backward()
    torch.optim.SGD(parameters, lr=0.1).step()
    after = adapter.state()
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved == set(factor_names(before, "second"))


def test_full_adapter_trains_every_weight_under_its_own_name(foundation: Foundation) -> None:
    adapter = Adapter.attach(copy.deepcopy(foundation.generator.denoiser), FULL)
    assert adapter.trainable("all").keys() == dict(adapter.denoiser.named_parameters()).keys()
    adapter.load_state(initial_state(foundation, FULL, 0))
    expected = foundation.generator.denoiser(*inputs(foundation)).sample
    torch.testing.assert_close(adapter.predict(*inputs(foundation)), expected)


@pytest.mark.parametrize("config", [LORA, FULL], ids=["lora", "full"])
def test_a_denoiser_with_other_weights_leaves_the_own(foundation: Foundation, config) -> None:
    adapter = Adapter.attach(copy.deepcopy(foundation.generator.denoiser), config)
    own = adapter.state()
    other = {name: tensor + 0.1 for name, tensor in own.items()}
    denoiser = adapter.denoiser_with(other)
    assert all(torch.equal(tensor, own[name]) for name, tensor in adapter.state().items())
    found = denoiser(*inputs(foundation)).sample
    assert not any(parameter.requires_grad for parameter in denoiser.parameters())
    adapter.load_state(other)
    torch.testing.assert_close(found, adapter.predict(*inputs(foundation)))
    adapter.load_state(own)
    assert torch.equal(denoiser(*inputs(foundation)).sample, found), "it shares what trains"


def test_a_denoiser_with_other_weights_costs_no_second_model(foundation: Foundation) -> None:
    adapter = attached(foundation, random_state(foundation))
    denoiser = adapter.denoiser_with(adapter.state())
    shared = {parameter.data_ptr() for parameter in adapter.denoiser.parameters()}
    own = [each for each in denoiser.parameters() if each.data_ptr() not in shared]
    assert sum(map(torch.numel, own)) == sum(map(torch.numel, adapter.state().values()))


def test_states_are_copies(foundation: Foundation) -> None:
    adapter = attached(foundation, random_state(foundation))
    taken = adapter.state()
    name = next(iter(taken))
    taken[name].zero_()
    assert float(adapter.state()[name].abs().sum()) > 0


def test_one_unet_copy_per_run_leaves_the_foundation_untouched(foundation: Foundation) -> None:
    before = copy.deepcopy(foundation.generator.denoiser.state_dict())
    initial_state(foundation, LORA, 0, public_work=FAST)
    attached(foundation, random_state(foundation))
    after = foundation.generator.denoiser.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(weight.requires_grad for weight in foundation.generator.denoiser.parameters())


@pytest.mark.parametrize("damage", ["missing", "unknown", "shape", "nan"])
def test_state_that_does_not_fit_is_refused(foundation: Foundation, damage: str) -> None:
    state = random_state(foundation)
    name = sorted(state)[0]
    if damage == "missing":
        del state[name]
    elif damage == "unknown":
        state["evil.first"] = torch.zeros(1)
    elif damage == "shape":
        state[name] = state[name][..., :1]
    else:
        state[name].view(-1)[0] = torch.nan
    with pytest.raises(AdapterError, match="state does not fit the adapter"):
        attached(foundation).load_state(state)


def test_target_that_matches_nothing_is_named(foundation: Foundation) -> None:
    config = LORA.model_copy(update={"targets": ("to_q", "to_nothing")})
    with pytest.raises(AdapterError, match="'to_nothing' matches no Linear or Conv2d"):
        target_layers(foundation.generator.denoiser, config)


def test_rank_above_a_layers_inputs_is_refused(foundation: Foundation) -> None:
    config = AdapterConfig(kind="lora", rank=64, targets=("conv_in",))
    with pytest.raises(AdapterError, match="rank 64 is more than the 36 inputs of conv_in"):
        target_layers(foundation.generator.denoiser, config)


def test_suffix_matches_whole_name_parts(foundation: Foundation) -> None:
    config = AdapterConfig(kind="lora", rank=1, targets=("conv",))
    names = target_layers(foundation.generator.denoiser, config)
    assert names
    assert all(name.split(".")[-1] == "conv" for name in names)


def test_asking_lora_for_all_or_full_for_a_factor_is_refused(foundation: Foundation) -> None:
    with pytest.raises(AdapterError, match="has no factor 'all'"):
        attached(foundation).trainable("all")
    full = Adapter.attach(copy.deepcopy(foundation.generator.denoiser), FULL)
    with pytest.raises(AdapterError, match="has no factor 'second'"):
        full.trainable("second")


@pytest.mark.parametrize("first_factor", ["public", "random"])
def test_initial_state_follows_from_the_seed(foundation: Foundation, first_factor: str) -> None:
    config = LORA.model_copy(update={"first_factor": first_factor})
    states = [initial_state(foundation, config, seed, public_work=FAST) for seed in (3, 3, 4)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not all(torch.equal(states[0][name], states[2][name]) for name in states[0])


def test_public_first_factor_has_orthogonal_rows_and_fits(foundation: Foundation) -> None:
    state = initial_state(foundation, LORA, 0, public_work=FAST)
    attached(foundation).load_state(state)
    for name in factor_names(state, "first"):
        rows = torch.nn.functional.normalize(state[name].flatten(1), dim=1)
        torch.testing.assert_close(rows @ rows.T, torch.eye(3), rtol=0, atol=1e-5)
    assert all(not state[name].any() for name in factor_names(state, "second"))


def test_public_first_factor_keeps_what_the_best_of_its_rank_keeps(
    foundation: Foundation,
) -> None:
    state = initial_state(foundation, LORA, 5, public_work=FAST)
    layers = list(target_layers(foundation.generator.denoiser, LORA))
    for name, update in public_update(foundation, layers, seed=5, config=FAST).items():
        rows = torch.nn.functional.normalize(state[f"{name}.first"].flatten(1), dim=1)
        kept = (update @ rows.T).square().sum()
        best = torch.linalg.svdvals(update)[: LORA.rank].square().sum()
        torch.testing.assert_close(kept, best, rtol=1e-3, atol=0)


@pytest.mark.slow
def test_influence_is_the_mean_square_of_the_jacobian(foundation: Foundation) -> None:
    """Oracle: the whole Jacobian by finite differences, on the tile and draws that were used."""
    config = PublicUpdateConfig(max_tiles=1, num_projections=300)
    generator = torch.Generator().manual_seed(3)
    rows = {"conv_out": torch.randn(2, 144, generator=generator)}
    estimated = influence(foundation, rows, seed=4, config=config)["conv_out"]

    unet = copy.deepcopy(foundation.generator.denoiser)
    schedule = NoiseSchedule.of(foundation.generator)
    tile = foundation.generator.encode_images(foundation.probe.tiles_NCHW[:1] / 127.5 - 1.0)
    text = foundation.generator.encode_captions(list(foundation.probe.captions[:1]))
    weight = unet.conv_out.weight
    exact = torch.zeros(2)
    num_draws = 40
    noise = torch.randn(num_draws, *tile.shape[1:], generator=generator)
    timesteps = torch.randint(1000, (num_draws,), generator=generator)
    noisy = schedule.noisy(tile.expand_as(noise), noise, timesteps)
    texts = text.expand(num_draws, -1, -1)
    with torch.no_grad():
        base = unet(noisy, timesteps, texts).sample
        for row in range(2):
            for output in range(len(weight)):
                before = weight.clone()
                weight[output] += rows["conv_out"][row].reshape(weight[output].shape)
                moved = unet(noisy, timesteps, texts).sample - base
                exact[row] += moved.square().mean() / len(weight)
                weight.copy_(before)
    torch.testing.assert_close(estimated, exact, rtol=0.25, atol=0)


def test_every_number_of_the_public_adapter_moves_the_prediction_alike(
    foundation: Foundation,
) -> None:
    state = initial_state(foundation, LORA, 0, public_work=FAST)
    rows = {name.removesuffix(".first"): state[name] for name in factor_names(state, "first")}
    found = torch.cat(list(influence(foundation, rows, seed=0, config=FAST).values()))
    torch.testing.assert_close(found, torch.ones_like(found), rtol=1e-3, atol=0)
    other = torch.cat(list(influence(foundation, rows, seed=1, config=FAST).values()))
    assert float(other.max() / other.min()) < 30


def test_public_update_stacks_one_flattened_gradient_per_shift(foundation: Foundation) -> None:
    layers = ["conv_in", "conv_out"]
    updates = public_update(foundation, layers, seed=2, config=FAST)
    assert {name: tuple(update.shape) for name, update in updates.items()} == {
        "conv_in": (2 * 16, 36),
        "conv_out": (2 * 4, 144),
    }
    assert all(float(update.norm()) > 0 for update in updates.values())


def test_leading_directions_are_those_of_the_full_decomposition() -> None:
    generator = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(40, 40, generator=generator))[0]
    right = torch.linalg.qr(torch.randn(30, 30, generator=generator))[0]
    matrix = left[:, :30] @ torch.diag(0.6 ** torch.arange(30.0)) @ right.T
    rows = leading_right_directions(matrix, 4, seed=1)
    expected = torch.linalg.svd(matrix)[2][:4]
    torch.testing.assert_close((rows @ expected.T).abs(), torch.eye(4), rtol=0, atol=1e-3)


@pytest.mark.parametrize("true_rank", [0, 1, 3])
def test_update_of_low_rank_is_completed_with_orthonormal_rows(true_rank: int) -> None:
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(6, true_rank, generator=generator)
    right = torch.randn(true_rank, 12, generator=generator)
    rows = leading_right_directions(left @ right, 5, seed=1)
    torch.testing.assert_close(rows @ rows.T, torch.eye(5), rtol=0, atol=1e-5)
    torch.testing.assert_close(right @ rows.T @ rows, right, rtol=1e-4, atol=1e-4)


def test_averaging_one_factor_averages_the_weights(foundation: Foundation) -> None:
    """Why rounds alternate factors: with A in common, mean(B) A is the mean of B A."""
    one = random_state(foundation, seed=1)
    two = {**one, **{n: 3 * one[n] + 1 for n in factor_names(one, "second")}}
    mean = add_delta(one, {n: two[n] - one[n] for n in factor_names(one, "second")}, 0.5)
    unet = foundation.generator.denoiser
    merged = [merged_denoiser(unet, LORA, state).state_dict() for state in (one, two, mean)]
    for name, tensor in merged[2].items():
        torch.testing.assert_close(tensor, (merged[0][name] + merged[1][name]) / 2)


def test_adding_a_delta_touches_only_its_tensors(foundation: Foundation) -> None:
    state = random_state(foundation)
    name = factor_names(state, "second")[0]
    moved = add_delta(state, {name: torch.ones_like(state[name])}, scale=2.0)
    torch.testing.assert_close(moved[name], state[name] + 2)
    assert all(torch.equal(moved[other], state[other]) for other in state if other != name)


def test_delta_of_another_shape_is_refused(foundation: Foundation) -> None:
    state = random_state(foundation)
    name = next(iter(state))
    with pytest.raises(AdapterError, match="does not fit the state"):
        add_delta(state, {name: torch.ones(1)})


def test_a_delta_in_float64_is_added_exactly() -> None:
    """So a step that was taken elsewhere arrives to the bit, which in float32 it may not."""
    generator = torch.Generator().manual_seed(1)
    start, end = (torch.randn(1000, generator=generator) for _ in range(2))
    exact = add_delta({"w": start}, {"w": end.double() - start.double()})["w"]
    assert torch.equal(exact, end)
    assert not torch.equal(add_delta({"w": start}, {"w": end - start})["w"], end)


def test_a_delta_in_float32_is_scaled_and_added_in_float32() -> None:
    generator = torch.Generator().manual_seed(2)
    start, delta = (torch.randn(1000, generator=generator) for _ in range(2))
    for scale in (1.0, 0.5, 0.3):
        moved = add_delta({"w": start}, {"w": delta}, scale)["w"]
        assert torch.equal(moved, start + scale * delta)
