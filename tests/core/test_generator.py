"""The diffusers parts behave as the stock pipeline's do."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from crafts_core.foundation import Foundation, FoundationError
from crafts_core.generator import Generator


def test_captions_are_encoded_as_the_stock_pipeline_does(foundation: Foundation) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(foundation.path, safety_checker=None)
    captions = ["tissue with glands", "lung carcinoma, spindle cells"]
    stock, stock_null = pipeline.encode_prompt(captions, torch.device("cpu"), 1, True)
    ours = foundation.generator.encode_captions(captions)
    torch.testing.assert_close(ours, stock)
    torch.testing.assert_close(foundation.null_text_LD, stock_null[0])


def test_latents_are_scaled_means(foundation: Foundation) -> None:
    vae = foundation.generator.vae
    images = foundation.probe.tiles_NCHW / 127.5 - 1.0
    expected = vae.encode(images).latent_dist.mean * vae.config.scaling_factor
    torch.testing.assert_close(foundation.generator.encode_images(images), expected)


def test_decoding_undoes_the_scale_and_stays_in_range(foundation: Foundation) -> None:
    latents = 50 * torch.randn(2, 4, 8, 8)
    images = foundation.generator.decode_latents(latents)
    assert images.shape == (2, 3, 32, 32)
    assert float(images.abs().max()) <= 1.0


def test_shift_factor_is_inverted_by_decoding(foundation: Foundation) -> None:
    generator = foundation.generator
    images = foundation.probe.tiles_NCHW[:2] / 127.5 - 1.0
    plain = generator.decode_latents(generator.encode_images(images))
    vae = type(generator.vae).from_config({**generator.vae.config, "shift_factor": 0.25})
    vae.load_state_dict(generator.vae.state_dict())
    shifted = replace(generator, vae=vae.eval())
    moved = shifted.encode_images(images)
    assert not torch.allclose(moved, generator.encode_images(images))
    torch.testing.assert_close(shifted.decode_latents(moved), plain, rtol=1e-4, atol=1e-4)


def test_tile_size_follows_from_the_parts(foundation: Foundation) -> None:
    assert foundation.generator.tile_px == 32
    assert foundation.generator.num_train_timesteps == 1000


def test_sample_prediction_is_refused(foundation: Foundation, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(foundation.path, tmp_path / "copy"))
    path = copy / "scheduler/scheduler_config.json"
    config = {**json.loads(path.read_text()), "prediction_type": "sample"}
    path.write_text(json.dumps(config))
    with pytest.raises(FoundationError, match="expected prediction_type"):
        Generator.from_directory(copy)


def test_half_precision_files_are_widened(foundation: Foundation, tmp_path: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(foundation.path, safety_checker=None)
    pipeline.to(torch.float16).save_pretrained(tmp_path / "half")
    generator = Generator.from_directory(tmp_path / "half")
    parts = (generator.denoiser, generator.vae, generator.text_encoder)
    assert {weight.dtype for part in parts for weight in part.parameters()} == {torch.float32}
