"""Stage control: nothing changes at the start, averaging is exact, and stock diffusers draws."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

from crafts_core.adapters import Adapter, Condition, merged_control_net
from crafts_core.cli import app
from crafts_core.export import model_card, save_pipeline
from crafts_core.foundation import Foundation
from crafts_core.generator import Generator
from crafts_core.plan import Plan, PlanError
from crafts_core.plan_sections import AdapterConfig
from crafts_core.sampler_config import SamplerConfig
from crafts_core.sampling import Control, Sampler, sample_images
from crafts_core.stages.batch import TileBatch
from crafts_core.stages.objective import BatchCoupledLossError, Objective, assert_per_tile
from crafts_core.starting_point import initial_state
from crafts_core.state import (
    AdapterError,
    State,
    add_delta,
    control_state,
    factor_names,
    generator_state,
    lora_tensors,
    modalities_in,
)
from crafts_core.tiles.conditions import nuclei_condition

CONFIG = AdapterConfig(kind="lora", rank=2, first_factor="random")
BOTH = ("generator", "nuclei")
LABELS = np.kron(np.arange(16, dtype=np.uint16).reshape(4, 4), np.tri(8, dtype=np.uint16))


def attached(foundation: Foundation, parts=BOTH, config: AdapterConfig = CONFIG) -> Adapter:
    unet = copy.deepcopy(foundation.generator.denoiser)
    return Adapter.attach(unet, config, parts, num_halvings=2)


def moved(state: State, seed: int = 1, scale: float = 0.1) -> State:
    """A state in which everything that may train has moved."""
    source = torch.Generator().manual_seed(seed)
    return {
        name: tensor
        if name.endswith(".first")
        else tensor + scale * torch.randn(tensor.shape, generator=source)
        for name, tensor in state.items()
    }


@pytest.fixture(scope="module")
def start(foundation: Foundation) -> State:
    return initial_state(foundation, CONFIG, 0, BOTH)


@pytest.fixture(scope="module")
def inputs(foundation: Foundation) -> tuple[Tensor, Tensor, Tensor]:
    source = torch.Generator().manual_seed(0)
    text = foundation.generator.encode_captions(["lung tissue with glands", "colon"])
    return torch.randn(2, 4, 8, 8, generator=source), torch.tensor([3, 700]), text


def conditions(count: int = 2) -> Tensor:
    whole = torch.from_numpy(nuclei_condition(LABELS))
    return torch.stack([whole.rot90(turn, (1, 2)) for turn in range(count)])


def test_at_the_start_nothing_changes(foundation, start, inputs) -> None:
    adapter = attached(foundation)
    adapter.load_state(start)
    steered = adapter.predict(*inputs, Condition("nuclei", conditions()))
    torch.testing.assert_close(steered, foundation.generator.denoiser(*inputs).sample)


def test_a_trained_condition_changes_the_prediction(foundation, start, inputs) -> None:
    adapter = attached(foundation)
    adapter.load_state(moved(start))
    one, other = (
        adapter.predict(*inputs, Condition("nuclei", images))
        for images in (conditions(), conditions().flip(0))
    )
    assert not torch.allclose(one, other, atol=1e-4)
    assert not torch.allclose(one, adapter.predict(*inputs), atol=1e-4)


def test_what_trains_is_stem_zero_convolutions_and_second_factors(foundation, start) -> None:
    adapter = attached(foundation)
    adapter.load_state(start)
    names = set(adapter.trainable("nuclei"))
    assert names == set(factor_names(start, "nuclei"))
    assert all(name.startswith("control.nuclei.") for name in names)
    assert not any(name.endswith(".first") for name in names)
    for part in ("controlnet_cond_embedding", "controlnet_down_blocks", "controlnet_mid_block"):
        assert any(part in name for name in names)
    assert any(name.endswith(".second") for name in names)
    open_ = {id(p) for p in adapter.network.parameters() if p.requires_grad}
    assert open_ == {id(parameter) for parameter in adapter.trainable("nuclei").values()}


def test_the_generators_factors_are_those_without_control(foundation, start) -> None:
    alone = initial_state(foundation, CONFIG, 0)
    assert generator_state(start).keys() == alone.keys()
    assert all(torch.equal(start[name], alone[name]) for name in alone)
    assert factor_names(start, "second") == factor_names(alone, "second")
    assert lora_tensors(start).keys() == lora_tensors(alone).keys()


def test_a_plan_of_control_alone_carries_no_generator(foundation) -> None:
    state = initial_state(foundation, CONFIG, 0, ("nuclei",))
    assert generator_state(state) == {}
    assert modalities_in(state) == ("nuclei",)
    assert attached(foundation, ("nuclei",)).state().keys() == state.keys()
    for factor in ("second", "all", "fluorescence"):
        with pytest.raises(AdapterError):
            factor_names(state, factor)


def test_averaging_sites_is_averaging_weights(foundation, start) -> None:
    """The mean of two sites' deltas gives the ControlNet whose every weight is their mean."""
    names = factor_names(start, "nuclei")
    one, two = moved(start, 1), moved(start, 2)
    mean = add_delta(one, {name: two[name] - one[name] for name in names}, 0.5)
    merged = [
        merged_control_net(foundation, CONFIG, state, "nuclei").state_dict()
        for state in (one, two, mean)
    ]
    for name, weight in merged[2].items():
        torch.testing.assert_close(weight, (merged[0][name] + merged[1][name]) / 2)


def test_both_modalities_live_side_by_side(foundation, inputs) -> None:
    parts = ("generator", "nuclei", "fluorescence")
    state = initial_state(foundation, CONFIG, 0, parts)
    adapter = attached(foundation, parts)
    adapter.load_state(moved(state))
    eight = torch.cat([conditions(), conditions(), conditions()[:, :2]], dim=1)
    assert adapter.predict(*inputs, Condition("fluorescence", eight)).isfinite().all()
    assert set(factor_names(state, "nuclei")).isdisjoint(factor_names(state, "fluorescence"))


def test_full_weights_go_with_a_control_stage(foundation, inputs) -> None:
    config = AdapterConfig(kind="full", first_factor="random")
    state = initial_state(foundation, config, 0, BOTH)
    adapter = attached(foundation, config=config)
    adapter.load_state(moved(state, scale=0.01))
    assert all(not name.startswith("control.") for name in adapter.trainable("all"))
    assert adapter.predict(*inputs, Condition("nuclei", conditions())).isfinite().all()


def test_a_layer_named_like_one_of_the_stem_gets_factors_and_the_stem_none(foundation) -> None:
    config = AdapterConfig(kind="lora", rank=2, control_targets=("conv_in",), first_factor="random")
    adapter = attached(foundation, ("nuclei",), config)
    factors = [name for name, _ in adapter.network.named_parameters() if ".lora_" in name]
    assert len(factors) == 2
    assert not any("controlnet_cond_embedding" in name for name in factors)


@pytest.mark.parametrize("targets", [(), ("conv_out",)], ids=["none", "only of the stem"])
def test_targets_outside_the_encoder_are_refused(foundation, targets: tuple[str, ...]) -> None:
    config = AdapterConfig(kind="lora", control_targets=targets, first_factor="random")
    for use in (attached, lambda *a: initial_state(a[0], a[2], 0, a[1])):
        with pytest.raises(AdapterError, match="control_targets match no layer"):
            use(foundation, ("nuclei",), config)


def test_public_first_factors_of_the_encoder_are_those_of_the_denoiser(foundation) -> None:
    config = AdapterConfig(kind="lora", rank=2, targets=("to_q",), control_targets=("to_q",))
    state = initial_state(foundation, config, 0, BOTH)
    shared = [name for name in generator_state(state) if name.startswith("down_blocks")]
    assert shared
    for name in shared:
        rows, ours = (s.flatten(1) for s in (state[name], state["control.nuclei." + name]))
        torch.testing.assert_close(
            rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-9),
            ours / ours.norm(dim=1, keepdim=True).clamp(min=1e-9),
        )


# ---- the loss ------------------------------------------------------------------------------------


def batch_of(foundation: Foundation, count: int = 3) -> TileBatch:
    source = torch.Generator().manual_seed(4)
    return TileBatch(
        latents_BCHW=torch.randn(count, 4, 8, 8, generator=source),
        text_BLD=foundation.generator.encode_captions(["lung tissue"] * count),
        null_text_LD=foundation.null_text_LD,
        weight_B=torch.full((count,), 1 / count),
        condition_BCHW=conditions(count),
    )


def control_plan(**changes: object) -> dict[str, object]:
    return {
        "study": {"name": "tiny", "foundation": "0" * 64, "seed": 3},
        "adapter": {"kind": "lora"},
        "stage": [
            {"name": "control", "modality": "nuclei", "rounds": 2, "local_steps": 1,
             "learning_rate": 0.1},
        ],
        "privacy": {"mechanism": "none", "max_grad_norm": 1.0, "sample_rate": 0.5,
                    "tiles_per_patient": 2, "draws_per_tile": 1},
        "aggregation": {"rule": "uniform", "min_sites": 1},
    } | changes  # fmt: skip


STAGE = Plan.parse(control_plan()).stage[0]


def test_the_loss_belongs_to_one_tile_with_its_condition(foundation, start) -> None:
    adapter = attached(foundation)
    adapter.load_state(moved(start))
    objective = Objective(foundation, adapter, STAGE)
    batch = batch_of(foundation)
    draws = objective.draw(batch, torch.Generator().manual_seed(0))
    assert_per_tile(objective.loss_per_tile, batch, draws)

    def coupled(tiles: TileBatch, its_draws) -> Tensor:
        assert tiles.condition_BCHW is not None
        return objective.loss_per_tile(tiles, its_draws) + tiles.condition_BCHW.mean()

    with pytest.raises(BatchCoupledLossError):
        assert_per_tile(coupled, batch, draws)


def test_a_batch_without_conditions_is_refused(foundation, start) -> None:
    adapter = attached(foundation)
    objective = Objective(foundation, adapter, STAGE)
    bare = TileBatch.cat([batch_of(foundation)])
    bare = TileBatch(
        latents_BCHW=bare.latents_BCHW, text_BLD=bare.text_BLD, null_text_LD=bare.null_text_LD,
        weight_B=bare.weight_B,
    )  # fmt: skip
    with pytest.raises(ValueError, match="conditions"):
        objective.loss_per_tile(bare, objective.draw(bare, torch.Generator()))


# ---- the plan ------------------------------------------------------------------------------------


def test_control_drops_half_of_the_captions_unless_told_otherwise() -> None:
    plan = Plan.parse(control_plan())
    assert plan.stage[0].caption_dropout == 0.5
    assert [entry.factor for entry in plan.rounds()] == ["nuclei", "nuclei"]
    assert plan.parts == ("nuclei",)
    assert not plan.gives_lora
    told = [control_plan()["stage"][0] | {"caption_dropout": 0.2}]  # type: ignore[index]
    assert Plan.parse(control_plan(stage=told)).stage[0].caption_dropout == 0.2


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"lambda_align": 0.1}, "alignment and retrieval only"),
        ({"lambda_drift": 0.1}, "alignment only"),
        ({"modality": None}, "needs modality"),
        ({"modality": "x-ray"}, "nuclei"),
        ({"name": "pretraining"}, "no other stage"),
    ],
)
def test_impossible_control_stages_are_refused(changes: dict, message: str) -> None:
    stage = control_plan()["stage"][0] | changes  # type: ignore[index]
    with pytest.raises(PlanError, match=message):
        Plan.parse(control_plan(stage=[stage]))


def test_control_comes_after_what_it_learns_to_steer() -> None:
    first = {"name": "pretraining", "rounds": 1, "local_steps": 1, "learning_rate": 0.1}
    control = control_plan()["stage"][0]  # type: ignore[index]
    plan = Plan.parse(control_plan(stage=[first, control]))
    assert plan.parts == ("generator", "nuclei")
    with pytest.raises(PlanError, match="must come after"):
        Plan.parse(control_plan(stage=[control, first]))


# ---- export --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(foundation, start, tmp_path_factory) -> Path:
    directory: Path = tmp_path_factory.mktemp("export") / "generator"
    save_pipeline(directory, foundation, adapter=CONFIG, state=moved(start), card="")
    return directory


def test_stock_diffusers_draws_from_a_mask_what_we_draw(foundation, start, exported) -> None:
    control = ControlNetModel.from_pretrained(exported / "controlnet" / "nuclei")
    pipeline = StableDiffusionControlNetPipeline.from_pretrained(exported, controlnet=control)
    pipeline.set_progress_bar_config(disable=True)
    channels = np.rint(nuclei_condition(LABELS) * 255).astype(np.uint8)
    mask = Image.fromarray(np.moveaxis(channels, 0, -1))
    source = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 4, 8, 8, generator=source)
    theirs = pipeline(
        "lung tissue", image=mask, latents=noise, num_inference_steps=3, guidance_scale=2.0,
        output_type="np",
    ).images[0]  # fmt: skip

    generator = Generator.from_directory(exported)
    image = torch.from_numpy(channels)[None].float() / 255
    config = SamplerConfig(scheduler="ddim", num_inference_steps=3, guidance_scale=2.0)
    latents = Sampler(generator, config, control=control).denoise(
        noise,
        generator.encode_captions(["lung tissue"]),
        generator.encode_captions([""]),
        image,
    )
    ours = (generator.decode_latents(latents)[0].permute(1, 2, 0).numpy() + 1) / 2
    np.testing.assert_allclose(theirs, ours, atol=2e-3)


def test_the_exported_control_net_is_the_trained_one(foundation, start, exported, inputs) -> None:
    adapter = attached(foundation)
    adapter.load_state(moved(start))
    control = ControlNetModel.from_pretrained(exported / "controlnet" / "nuclei")
    generator = Generator.from_directory(exported)
    steered = control(*inputs, conditions())
    found = generator.denoiser(
        *inputs,
        down_block_additional_residuals=steered.down_block_res_samples,
        mid_block_additional_residual=steered.mid_block_res_sample,
    ).sample
    expected = adapter.predict(*inputs, Condition("nuclei", conditions()))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


def test_images_depend_on_their_own_condition_alone(exported) -> None:
    generator = Generator.from_directory(exported)
    control = ControlNetModel.from_pretrained(exported / "controlnet" / "nuclei")
    options = {"num_inference_steps": 2, "batch_size": 1}
    two = sample_images(
        generator, ["lung", "lung"], control=Control(control, conditions()), **options
    )
    swapped = Control(control, conditions()[[0, 0]])
    other = sample_images(generator, ["lung", "lung"], control=swapped, **options)
    assert np.array_equal(two[0], other[0])
    assert not np.array_equal(two[1], other[1])
    with pytest.raises(ValueError, match="expected 1 conditions"):
        sample_images(generator, ["lung"], control=swapped)


def test_the_card_says_how_to_steer(foundation) -> None:
    about = {"study": "s", "foundation": foundation, "sites": [], "privacy": "p", "rounds": 1}
    assert "ControlNetModel" not in model_card(**about)
    card = model_card(**about, modalities=("nuclei", "fluorescence"))
    for part in ("StableDiffusionControlNetPipeline", "controlnet/nuclei", "255 inside nuclei"):
        assert part in card


def test_the_program_draws_from_a_mask(exported, tmp_path) -> None:
    Image.fromarray(LABELS).save(tmp_path / "mask.png")
    arguments = ["sample", str(exported), "-p", "lung tissue", "--num", "1", "--steps", "1"]
    steered = [*arguments, "--control", "nuclei", "--mask", str(tmp_path / "mask.png")]
    result = CliRunner().invoke(app, [*steered, "--out", str(tmp_path / "a")])
    assert result.exit_code == 0, result.output
    plain = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "b")])
    assert plain.exit_code == 0
    one, other = (np.asarray(Image.open(tmp_path / each / "tile-0000.png")) for each in "ab")
    assert not np.array_equal(one, other)
    with Image.open(tmp_path / "a" / "condition.png") as picture:
        expected = np.rint(nuclei_condition(LABELS) * 255).astype(np.uint8)
        assert np.array_equal(np.moveaxis(np.asarray(picture), -1, 0), expected)


@pytest.mark.parametrize(
    "options, code",
    [(["--control", "nuclei"], 2), (["--control", "x", "--mask", "M"], 2),
     (["--control", "fluorescence", "--mask", "M"], 1)],
)  # fmt: skip
def test_impossible_control_is_refused(exported, tmp_path, options: list[str], code: int) -> None:
    Image.fromarray(LABELS).save(tmp_path / "mask.png")
    given = [str(tmp_path / "mask.png") if option == "M" else option for option in options]
    arguments = ["sample", str(exported), "-p", "lung", "--out", str(tmp_path / "o"), *given]
    assert CliRunner().invoke(app, arguments).exit_code == code
    assert not (tmp_path / "o").exists()


def test_state_of_a_modality_is_found_by_its_prefix(start) -> None:
    ours = control_state(start, "nuclei")
    assert ours.keys() | generator_state(start).keys() == start.keys()
    assert control_state(start, "fluorescence") == {}
