"""A PixArt-class foundation: imported, trained privately, drawn and exported as stock diffusers."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, PixArtAlphaPipeline

from crafts_core.adapters import Adapter, merged_denoiser
from crafts_core.denoisers import KINDS, PixArtKind, kind_in, kind_of, predict
from crafts_core.foundation import Foundation, FoundationError, import_diffusers, load
from crafts_core.foundation_manifest import DENOISER_FOLDERS
from crafts_core.generator import Generator, check_parts_fit
from crafts_core.plan import Plan
from crafts_core.plan_sections import AdapterConfig
from crafts_core.plan_targets import target_problems
from crafts_core.public_update import PublicUpdateConfig
from crafts_core.sampling import SamplingError, initial_noise, sample_images
from crafts_core.starting_point import initial_state
from crafts_core.state import AdapterError
from support.foundations import (
    tiny_foundation,
    write_tiny_aligner,
    write_tiny_pipeline,
    write_tiny_pixart,
)
from support.sites import control_values

PROMPTS = ["H&E, Lung tissue with glands ", "", "colon carcinoma"]
LORA = AdapterConfig(kind="lora", rank=2, targets=("to_q", "to_v"))


@pytest.fixture(scope="module")
def foundation(tmp_path_factory: pytest.TempPathFactory) -> Foundation:
    return tiny_foundation(tmp_path_factory.mktemp("pixart") / "f", seed=3, pixart=True)


def noisy_of(generator: Generator) -> torch.Tensor:
    noise = [initial_noise(generator, seed=1, index=row) for row in range(len(PROMPTS))]
    return torch.stack(noise)


def test_words_reach_it_and_padding_does_not(foundation: Foundation) -> None:
    """As the stock network says of the caption's own tokens alone, without any mask."""
    generator = foundation.generator
    noisy_BCHW, times_B = noisy_of(generator), torch.tensor([10, 500, 900])
    text_BLD = generator.encode_captions(PROMPTS)
    found_BCHW = predict(generator.denoiser, noisy_BCHW, times_B, text_BLD)
    assert found_BCHW.shape == noisy_BCHW.shape
    for row, prompt in enumerate(PROMPTS):
        small = prompt.lower().strip()  # as its pipeline prepares it
        ids_BL = generator.tokenizer([small], return_tensors="pt").input_ids
        hidden_BLD = generator.text_encoder(input_ids=ids_BL).last_hidden_state
        expected = generator.denoiser(
            noisy_BCHW[row : row + 1],
            encoder_hidden_states=hidden_BLD,
            timestep=times_B[row : row + 1],
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ).sample[:, :4]
        torch.testing.assert_close(found_BCHW[row : row + 1], expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(
        found_BCHW[:1],
        predict(generator.denoiser, noisy_BCHW[:1], times_B[:1], text_BLD[2:]),
        atol=1e-3,
    )


def test_images_are_those_of_the_stock_pipeline(foundation: Foundation) -> None:
    generator = foundation.generator
    ours_NHWC = sample_images(generator, PROMPTS, num_inference_steps=3, guidance_scale=2.0, seed=1)
    pipeline = PixArtAlphaPipeline.from_pretrained(foundation.path)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    pipeline.set_progress_bar_config(disable=True)
    stock_NHWC = pipeline(
        PROMPTS,
        negative_prompt="",
        latents=noisy_of(generator),
        num_inference_steps=3,
        guidance_scale=2.0,
        use_resolution_binning=False,
        clean_caption=False,
        output_type="np",
    ).images
    difference = ours_NHWC.astype(float) - (stock_NHWC * 255).round()
    assert np.abs(difference).max() <= 1


def test_an_adapter_starts_as_the_foundation_and_merges_exactly(foundation: Foundation) -> None:
    generator = foundation.generator
    small = PublicUpdateConfig(num_shifts=2, draws_per_tile=1, max_tiles=4)
    state = initial_state(foundation, LORA, 5, public_work=small)
    adapter = Adapter.attach(copy.deepcopy(generator.denoiser), LORA)
    adapter.load_state(state)
    inputs = (noisy_of(generator), torch.tensor([10, 500, 900]), generator.encode_captions(PROMPTS))
    before = predict(generator.denoiser, *inputs)
    torch.testing.assert_close(adapter.predict(*inputs), before)
    trained = {
        name: tensor + 0.1 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(2))
        for name, tensor in state.items()
    }
    adapter.load_state(trained)
    assert not torch.allclose(adapter.predict(*inputs), before, atol=1e-3)
    merged = merged_denoiser(generator.denoiser, LORA, trained)
    torch.testing.assert_close(
        predict(merged, *inputs), adapter.predict(*inputs), atol=1e-5, rtol=1e-4
    )


def test_a_stock_directory_becomes_a_foundation(tmp_path: Path) -> None:
    source = write_tiny_pixart(tmp_path / "source", seed=4)
    aligner = write_tiny_aligner(tmp_path / "clip")
    public = tiny_foundation(tmp_path / "public").path
    import_diffusers(
        source, aligner=aligner, out=tmp_path / "out", name="pixart", licence="MIT",
        public_parts=public, fit_steps=2,
    )  # fmt: skip
    imported = load(tmp_path / "out").generator
    assert isinstance(kind_of(imported.denoiser), PixArtKind)
    assert kind_in(tmp_path / "out") is kind_of(imported.denoiser)
    stock = DiffusionPipeline.from_pretrained(source)
    for name, tensor in stock.transformer.state_dict().items():
        assert torch.equal(imported.denoiser.state_dict()[name], tensor), name
    assert imported.unread(["lung " * 200]) != [""], "what its pipeline cuts is told"


def test_every_kind_has_its_folder() -> None:
    """Who only asks for the folder knows them without torch."""
    assert tuple(kind.folder for kind in KINDS) == DENOISER_FOLDERS


def test_parts_of_two_kinds_are_refused(foundation: Foundation, tmp_path: Path) -> None:
    pixart = foundation.generator
    other = Generator.from_directory(write_tiny_pipeline(tmp_path / "sd"))
    with pytest.raises(FoundationError, match="captions of width 32, as the text encoder has"):
        check_parts_fit(pixart.denoiser, pixart.vae, other.text_encoder)
    wide = copy.deepcopy(pixart.vae)
    wide.register_to_config(latent_channels=8)
    with pytest.raises(FoundationError, match="latents of 8 channels in"):
        check_parts_fit(pixart.denoiser, wide, pixart.text_encoder)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"out_channels": None}, "once or twice as many out, got 4 and None"),
        ({"use_additional_conditions": True}, "tells the size of latents of 128"),
        ({"sample_size": 128}, "2 halvings, use_additional_conditions True"),
    ],
)
def test_what_its_pipeline_could_not_draw_with_is_refused(
    foundation: Foundation, changes: dict, what: str
) -> None:
    generator = foundation.generator
    config = dict(generator.denoiser.config) | changes
    other = type(generator.denoiser).from_config(config)
    with pytest.raises(FoundationError, match=what):
        check_parts_fit(other, generator.vae, generator.text_encoder)


def test_one_step_is_refused_where_its_pipeline_fails(foundation: Foundation) -> None:
    with pytest.raises(SamplingError, match="draws in 2 steps or more"):
        sample_images(foundation.generator, PROMPTS, num_inference_steps=1)


def test_no_control_net_steers_it_and_a_plan_learns_so_before_it_is_signed(
    foundation: Foundation,
) -> None:
    plan = Plan.parse(control_values(foundation.manifest.hash))
    assert list(target_problems(plan, foundation.path)) == [
        "stage control needs a foundation with a UNet: no ControlNet steers a transformer"
    ]
    with pytest.raises(AdapterError, match="needs a foundation with a UNet"):
        initial_state(foundation, plan.adapter, 3, plan.parts)


def test_a_tokenizer_that_needs_another_library_says_so(tmp_path: Path) -> None:
    source = write_tiny_pixart(tmp_path / "source")
    (source / "tokenizer" / "tokenizer.json").unlink()
    (source / "tokenizer" / "spiece.model").write_bytes(b"no model")
    with pytest.raises(FoundationError, match="tokenizer cannot be read"):
        Generator.from_directory(source)
