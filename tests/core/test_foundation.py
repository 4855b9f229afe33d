"""A foundation is exactly its manifest, byte for byte, or it is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from crafts_core.foundation import (
    Foundation,
    FoundationError,
    FoundationManifest,
    Probe,
    load,
    read_manifest,
    save_probe,
    verify,
    write_manifest,
)
from crafts_core.foundation_manifest import parse_manifest
from crafts_core.probe import correlation_range, load_probe


@pytest.fixture
def directory(foundation: Foundation, tmp_path: Path) -> Path:
    return Path(shutil.copytree(foundation.path, tmp_path / "copy"))


def test_loading_twice_gives_the_same_foundation(foundation: Foundation) -> None:
    again = load(foundation.path)
    assert again.manifest == foundation.manifest
    torch.testing.assert_close(again.anchors_KD, foundation.anchors_KD, rtol=0, atol=0)
    assert again.probe.captions == foundation.probe.captions


def test_shapes_of_the_loaded_foundation(foundation: Foundation) -> None:
    assert foundation.generator.latent_shape == (4, 8, 8)
    assert foundation.anchors_KD.shape == (30, 16)
    assert foundation.null_text_LD.shape == (16, 32)
    assert {prompt.cancer_code for prompt in foundation.prompt_bank} >= {"LUAD", "COAD"}


def test_no_weight_of_a_foundation_requires_a_gradient(foundation: Foundation) -> None:
    parts = (
        foundation.generator.denoiser,
        foundation.generator.vae,
        foundation.generator.text_encoder,
        foundation.aligner.model,
        foundation.latent_aligner,
    )
    assert not any(weight.requires_grad for part in parts for weight in part.parameters())


def test_hash_is_stable_and_covers_every_field(foundation: Foundation) -> None:
    manifest = foundation.manifest
    assert manifest.hash == read_manifest(foundation.path).hash
    others = (
        manifest.model_copy(update={"licence": "other"}),
        manifest.model_copy(update={"mpp": 0.5}),
        manifest.model_copy(update={"files": {**manifest.files, "unet/config.json": "0" * 64}}),
    )
    assert len({manifest.hash, *(other.hash for other in others)}) == 4


@pytest.mark.parametrize(
    "victim",
    [
        "unet/diffusion_pytorch_model.safetensors",
        "aligner/model.safetensors",
        "tokenizer/tokenizer.json",
        "probe/probe.safetensors",
        "prompt_bank.json",
        "latent_aligner.safetensors",
    ],
)
def test_one_flipped_bit_is_refused(directory: Path, victim: str) -> None:
    content = bytearray((directory / victim).read_bytes())
    content[len(content) // 2] ^= 1
    (directory / victim).write_bytes(content)
    with pytest.raises(FoundationError, match=f"{victim} does not match"):
        load(directory)


def test_missing_file_is_named(directory: Path) -> None:
    (directory / "vae/config.json").unlink()
    with pytest.raises(FoundationError, match=r"vae/config\.json is missing"):
        verify(directory)


def test_unknown_file_is_refused(directory: Path) -> None:
    (directory / "unet/extra.json").write_text("{}")
    with pytest.raises(FoundationError, match=r"unet/extra\.json is not in foundation\.json"):
        verify(directory)


@pytest.mark.parametrize("name", ["model.bin", "unet/model.ckpt", "x.pt", "vae/y.pkl"])
def test_pickled_weights_are_refused(directory: Path, name: str) -> None:
    (directory / name).write_bytes(b"\x80\x04")
    with pytest.raises(FoundationError, match="is a pickle"):
        verify(directory)


def test_code_is_refused(directory: Path) -> None:
    (directory / "unet/modeling.py").write_text("print('hello')")
    with pytest.raises(FoundationError, match="expected one of"):
        verify(directory)


def test_link_is_refused(directory: Path) -> None:
    target = directory / "vae/config.json"
    moved = directory.parent / "elsewhere.json"
    target.rename(moved)
    target.symlink_to(moved)
    with pytest.raises(FoundationError, match="is a link"):
        verify(directory)


def test_missing_foundation_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FoundationError, match="crafts-server foundation build"):
        load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"format_version": 2}', "\xff", "[" * 200_000, "1" * 6000]
)
def test_broken_manifest_is_one_line(directory: Path, text: str) -> None:
    (directory / "foundation.json").write_text(text, encoding="latin-1")
    for read in (verify, lambda path: parse_manifest((path / "foundation.json").read_bytes())):
        with pytest.raises(FoundationError) as caught:
            read(directory)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "path",
    [
        "../secret.json",
        "/etc/passwd.json",
        "a/../b.json",
        "./a.json",
        "a\\..\\b.json",
        "a\0",
        "a\n",
    ],
)
def test_manifest_paths_stay_inside(foundation: Foundation, path: str) -> None:
    values = foundation.manifest.model_dump()
    with pytest.raises(ValidationError, match="must be relative"):
        FoundationManifest.model_validate({**values, "files": {path: "0" * 64}})
    with pytest.raises(ValidationError, match="cannot list itself"):
        FoundationManifest.model_validate({**values, "files": {"foundation.json": "0" * 64}})


def test_unknown_manifest_key_is_refused(directory: Path) -> None:
    values = json.loads((directory / "foundation.json").read_text())
    (directory / "foundation.json").write_text(json.dumps({**values, "auto_map": "evil"}))
    with pytest.raises(FoundationError, match="auto_map: unknown key"):
        verify(directory)


def test_empty_alignment_range_is_refused(foundation: Foundation) -> None:
    values = foundation.manifest.model_dump()
    with pytest.raises(ValidationError, match="r_lo < r_hi"):
        FoundationManifest.model_validate({**values, "alignment": {"r_lo": 0.5, "r_hi": 0.5}})


def test_probe_round_trip(tmp_path: Path) -> None:
    tiles = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8)
    save_probe(tmp_path, Probe(tiles_NCHW=tiles, captions=("a", "b", "a")))
    probe = load_probe(tmp_path)
    assert torch.equal(probe.tiles_NCHW, tiles)
    assert probe.captions == ("a", "b", "a")


def test_mismatched_captions_always_say_something_else() -> None:
    captions = ("a", "a", "b", "a", "a", "c", "a")
    probe = Probe(tiles_NCHW=torch.zeros(7, 3, 8, 8, dtype=torch.uint8), captions=captions)
    assert all(own != other for own, other in zip(captions, probe.mismatched_captions, strict=True))


def test_probe_of_one_caption_is_refused() -> None:
    with pytest.raises(ValueError, match="two different captions"):
        Probe(tiles_NCHW=torch.zeros(2, 3, 8, 8, dtype=torch.uint8), captions=("a", "a"))


def test_correlation_range_is_ordered(foundation: Foundation) -> None:
    r_lo, r_hi = correlation_range(foundation.aligner, foundation.probe, foundation.anchors_KD)
    assert -1 <= r_lo < r_hi <= 1
    assert r_hi - r_lo >= 0.05 - 1e-3


@pytest.mark.parametrize("tokenizer", ["tokenizer", "aligner"])
def test_a_token_without_an_embedding_is_refused(directory: Path, tokenizer: str) -> None:
    """Captions with it would be errors, and no others: whoever has one would be told apart."""
    file = directory / tokenizer / "tokenizer.json"
    values = json.loads(file.read_text())
    values["model"]["vocab"]["one-patients-word"] = 10**6
    file.write_text(json.dumps(values))
    about = read_manifest(directory).model_dump(exclude={"format_version", "versions", "files"})
    (directory / "foundation.json").unlink()
    write_manifest(directory, **about)
    with pytest.raises(FoundationError, match="the tokenizer has token"):
        load(directory)
