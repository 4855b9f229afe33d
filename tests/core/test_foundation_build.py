"""The foundation's build, small enough to run: whole, resumable, and refused when mixed."""

from pathlib import Path

import numpy as np
import pytest
import torch

from crafts_core.foundation import embedded_path, load, verify
from crafts_core.foundation_build import BuildConfig, build
from crafts_core.foundation_build.aligner_training import train_tokenizer
from crafts_core.foundation_build.diffusion_training import other_laboratories
from crafts_core.sampling import sample_images
from crafts_core.vocabulary import CANCER_TYPES, compose_caption, corpus

SMALL = BuildConfig(
    num_regions=24,
    region_tiles=2,
    num_probe=4,
    text_width=32,
    vision_width=32,
    embedding_dim=16,
    aligner_batch=16,
    aligner_steps=2,
    vae_channels=(8, 16, 16),
    vae_batch=4,
    vae_steps=2,
    unet_channels=(32, 64, 64),
    unet_batch=4,
    unet_steps=2,
    latent_aligner_steps=2,
)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def built(work: Path) -> Path:
    build(work / "foundation", work=work / "parts", config=SMALL)
    return work / "foundation"


@pytest.mark.slow
def test_what_is_built_verifies_loads_and_draws(built: Path) -> None:
    foundation = load(built)
    assert foundation.manifest.latent_shape == (4, 16, 16)
    assert len(foundation.probe.captions) == 4
    images = sample_images(foundation.generator, ["H&E, sarcoma"], num_inference_steps=1)
    assert images.shape == (1, 64, 64, 3)


@pytest.mark.slow
def test_finished_parts_are_used_again_and_give_the_same_weights(built: Path, work: Path) -> None:
    seen: list[str] = []
    again = build(
        work / "again",
        work=work / "parts",
        config=SMALL,
        progress=lambda what, _done, _total: seen.append(what),
    )
    assert (
        again.files["unet/diffusion_pytorch_model.safetensors"]
        == (verify(built).files["unet/diffusion_pytorch_model.safetensors"])
    )
    assert not any(what.startswith(("public tiles", "aligner", "VAE", "UNet")) for what in seen)


@pytest.mark.slow
def test_parts_of_another_recipe_are_refused(built: Path, work: Path) -> None:
    other = SMALL.model_copy(update={"unet_steps": 3})
    with pytest.raises(FileExistsError, match="other settings or code"):
        build(work / "third", work=work / "parts", config=other)
    with pytest.raises(FileExistsError, match="exists"):
        build(built, work=work / "parts", config=SMALL)


def test_corpus_words_are_single_tokens_and_any_text_is_accepted() -> None:
    tokenizer = train_tokenizer(sorted(corpus()), BuildConfig())
    caption = compose_caption(CANCER_TYPES[9], None)
    assert len(tokenizer.tokenize(caption)) == len(caption.replace(",", " ,").split()) + 2
    strange = tokenizer("Zyxqv 42 \u00e9", truncation=True, max_length=32).input_ids
    assert tokenizer.eos_token_id not in strange[1:-1]


def test_other_laboratories_change_colour_and_stay_images() -> None:
    torch.manual_seed(0)
    pixels = torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, (4, 3, 8, 8))).float()
    shifted = other_laboratories(pixels)
    assert shifted.min() >= -1.01
    assert shifted.max() <= 1.01
    assert (shifted - pixels).abs().mean() > 0.02


def test_the_shipped_foundation_verifies_and_is_small() -> None:
    verify(embedded_path())
    size = sum(file.stat().st_size for file in embedded_path().rglob("*") if file.is_file())
    assert size <= 16 * 2**20
