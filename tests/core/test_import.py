"""Local diffusers weights become a foundation, or are refused with the reason."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from crafts_core.foundation import Foundation, FoundationError, import_diffusers, load, verify
from support.foundations import write_tiny_aligner, write_tiny_pipeline


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_tiny_pipeline(tmp_path / "sd", seed=3, latent_px=16, prediction_type="epsilon")


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    path = write_tiny_aligner(tmp_path / "clip", seed=4, image_px=24)
    (path / "preprocessor_config.json").unlink()
    return path


def run(foundation: Foundation, source: Path, clip: Path | None, out: Path) -> Path:
    import_diffusers(
        source,
        aligner=clip,
        out=out,
        name="imported",
        licence="openrail",
        mpp=0.5,
        public_parts=foundation.path,
        fit_steps=3,
    )
    return out


def test_imported_directory_loads_as_a_foundation(
    foundation: Foundation, source: Path, clip: Path, tmp_path: Path
) -> None:
    loaded = load(run(foundation, source, clip, tmp_path / "out"))
    manifest = loaded.manifest
    assert (manifest.kind, manifest.name, manifest.licence) == ("imported", "imported", "openrail")
    assert (manifest.tile_px, manifest.mpp, manifest.latent_shape) == (64, 0.5, (4, 16, 16))
    assert loaded.generator.prediction_type == "epsilon"
    assert loaded.probe.tiles_NCHW.shape == (8, 3, 64, 64)
    assert loaded.prompt_bank == foundation.prompt_bank
    assert loaded.aligner.mean == pytest.approx((0.4815, 0.4578, 0.4082), abs=1e-4)
    latents = loaded.generator.encode_images(loaded.probe.tiles_NCHW / 127.5 - 1)
    assert loaded.latent_aligner(latents).shape == (8, loaded.anchors_KD.shape[1])


@pytest.mark.slow
def test_imported_weights_are_the_sources(
    foundation: Foundation, source: Path, clip: Path, tmp_path: Path
) -> None:
    loaded = load(run(foundation, source, clip, tmp_path / "out"))
    again = load(run(foundation, source, clip, tmp_path / "again"))
    assert loaded.manifest.hash == again.manifest.hash
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(source / "unet")
    for name, tensor in loaded.generator.denoiser.state_dict().items():
        assert torch.equal(tensor, unet.state_dict()[name])


def test_import_does_not_touch_global_randomness(
    foundation: Foundation, source: Path, clip: Path, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    run(foundation, source, clip, tmp_path / "out")
    assert torch.equal(torch.rand(1), expected)


def test_flipped_bit_after_import_is_refused(
    foundation: Foundation, source: Path, clip: Path, tmp_path: Path
) -> None:
    out = run(foundation, source, clip, tmp_path / "out")
    weights = out / "text_encoder/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(FoundationError, match="does not match its SHA-256"):
        verify(out)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("suffix", [".bin", ".ckpt", ".pt"])
def test_pickled_weights_are_refused_unread(
    foundation: Foundation, source: Path, clip: Path, tmp_path: Path, part: str, suffix: str
) -> None:
    (weights,) = (source / part).glob("*.safetensors")
    weights.unlink()
    (source / part / f"model{suffix}").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    with pytest.raises(FoundationError, match="pickled weights can run code"):
        run(foundation, source, clip, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_pickle_beside_safetensors_is_left_behind(
    foundation: Foundation, source: Path, clip: Path, tmp_path: Path
) -> None:
    (source / "unet/diffusion_pytorch_model.bin").write_bytes(b"\x80\x04")
    out = run(foundation, source, clip, tmp_path / "out")
    assert not list(out.rglob("*.bin"))


def test_missing_safetensors_is_named(
    foundation: Foundation, source: Path, clip: Path, tmp_path: Path
) -> None:
    next((source / "vae").glob("*.safetensors")).unlink()
    with pytest.raises(FoundationError, match=r"vae holds no \*\.safetensors"):
        run(foundation, source, clip, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_missing_part_is_named(
    foundation: Foundation, source: Path, clip: Path, tmp_path: Path, part: str
) -> None:
    shutil.rmtree(source / part)
    with pytest.raises(FoundationError, match=part) as caught:
        run(foundation, source, clip, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip", "sd"]


def test_no_aligner_is_refused(foundation: Foundation, source: Path, tmp_path: Path) -> None:
    with pytest.raises(FoundationError, match="needs an aligner"):
        run(foundation, source, None, tmp_path / "out")


def test_torn_weights_are_one_clear_line(
    foundation: Foundation, source: Path, clip: Path, tmp_path: Path
) -> None:
    weights = source / "unet/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(
        FoundationError, match=r"unet cannot be read .* is the copy whole"
    ) as caught:
        run(foundation, source, clip, tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_other_architecture_is_refused(
    foundation: Foundation, source: Path, clip: Path, tmp_path: Path
) -> None:
    path = source / "unet/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "_class_name": "FluxTransformer"}))
    with pytest.raises(FoundationError, match="expected a UNet2DConditionModel"):
        run(foundation, source, clip, tmp_path / "out")


def test_text_encoder_of_another_width_is_refused(
    foundation: Foundation, source: Path, clip: Path, tmp_path: Path
) -> None:
    path = source / "text_encoder/config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "hidden_size": 64}))
    with pytest.raises(FoundationError):
        run(foundation, source, clip, tmp_path / "out")


def test_weights_with_a_hole_are_refused(
    foundation: Foundation, source: Path, clip: Path, tmp_path: Path
) -> None:
    """Without the check the library fills the hole with random numbers and goes on."""
    path = source / "text_encoder/model.safetensors"
    weights = load_file(path)
    del weights[sorted(weights)[0]]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(FoundationError, match="is missing or has another shape"):
        run(foundation, source, clip, tmp_path / "out")


def test_weights_that_are_not_finite_are_refused(
    foundation: Foundation, source: Path, clip: Path, tmp_path: Path
) -> None:
    path = source / "vae/diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights[sorted(weights)[0]].view(-1)[0] = float("nan")
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(FoundationError, match="NaN or infinity"):
        run(foundation, source, clip, tmp_path / "out")


def test_inpainting_weights_are_refused_by_their_channels(
    foundation: Foundation, source: Path, clip: Path, tmp_path: Path
) -> None:
    config, path = source / "unet/config.json", source / "unet/diffusion_pytorch_model.safetensors"
    config.write_text(json.dumps({**json.loads(config.read_text()), "in_channels": 9}))
    weights = load_file(path)
    stem = weights["conv_in.weight"]
    weights["conv_in.weight"] = torch.cat([stem, stem, stem[:, :1]], dim=1)
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(
        FoundationError, match=r"expected latents of 4 channels.*got 9 in and 4 out"
    ):
        run(foundation, source, clip, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["fp16", "bf16"])
@pytest.mark.parametrize("sharded", [False, True])
def test_half_precision_file_names_are_read(
    foundation: Foundation, source: Path, clip: Path, tmp_path: Path, variant: str, sharded: bool
) -> None:
    plain = load(run(foundation, source, clip, tmp_path / "plain"))
    for part, stem in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        path = source / part / f"{stem}.safetensors"
        if not sharded:
            path.rename(source / part / f"{stem}.{variant}.safetensors")
            continue
        name = f"{stem}.{variant}-00001-of-00001.safetensors"
        path.rename(source / part / name)
        keys = load_file(source / part / name)
        index = {"metadata": {}, "weight_map": dict.fromkeys(keys, name)}
        (source / part / f"{stem}.safetensors.index.{variant}.json").write_text(json.dumps(index))
    found = load(run(foundation, source, clip, tmp_path / "out"))
    assert found.manifest.hash == plain.manifest.hash


def test_weights_of_two_variants_ask_for_one(
    foundation: Foundation, source: Path, clip: Path, tmp_path: Path
) -> None:
    path = source / "unet/diffusion_pytorch_model.safetensors"
    shutil.copyfile(path, source / "unet/diffusion_pytorch_model.fp16.safetensors")
    path.rename(source / "unet/diffusion_pytorch_model.non_ema.safetensors")
    with pytest.raises(FoundationError, match=r"several variants \(fp16, non_ema\).*keep one"):
        run(foundation, source, clip, tmp_path / "out")


def test_weights_under_a_strange_name_say_what_to_rename_them_to(
    foundation: Foundation, source: Path, clip: Path, tmp_path: Path
) -> None:
    path = source / "unet/diffusion_pytorch_model.safetensors"
    path.rename(source / "unet/v1-5-pruned.safetensors")
    with pytest.raises(FoundationError, match=r"rename it to diffusion_pytorch_model\.safetensors"):
        run(foundation, source, clip, tmp_path / "out")


def test_a_pointer_in_place_of_weights_is_named(
    foundation: Foundation, source: Path, clip: Path, tmp_path: Path
) -> None:
    path = source / "text_encoder/model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")
    with pytest.raises(FoundationError, match="Git LFS pointer"):
        run(foundation, source, clip, tmp_path / "out")


def test_another_kind_of_pipeline_is_named(
    foundation: Foundation, source: Path, clip: Path, tmp_path: Path
) -> None:
    shutil.move(source / "unet", source / "prior")
    (source / "model_index.json").write_text(json.dumps({"_class_name": "KandinskyPipeline"}))
    with pytest.raises(FoundationError, match="is a KandinskyPipeline; expected Stable Diff"):
        run(foundation, source, clip, tmp_path / "out")


def test_noise_schedule_of_another_sampler_is_taken_over(
    foundation: Foundation, source: Path, clip: Path, tmp_path: Path
) -> None:
    schedule = {"beta_start": 0.001, "beta_end": 0.02, "beta_schedule": "linear"}
    path = source / "scheduler/scheduler_config.json"
    path.write_text(
        json.dumps({"_class_name": "PNDMScheduler", "skip_prk_steps": True, **schedule})
    )
    config = load(run(foundation, source, clip, tmp_path / "out")).generator.scheduler.config
    assert schedule.items() <= dict(config).items()
    assert config.prediction_type == "epsilon"
    assert config.clip_sample is False


def test_existing_directory_is_not_overwritten(
    foundation: Foundation, source: Path, clip: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError):
        run(foundation, source, clip, tmp_path / "out")
