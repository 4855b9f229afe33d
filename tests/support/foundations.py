"""A foundation directory with random tiny weights: every shape real, no training, no download."""

import itertools
import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from crafts_core.aligner import LatentAligner
from crafts_core.foundation import Foundation, Probe, load, save_probe, write_manifest
from crafts_core.vocabulary import CANCER_TYPES

WORDS = ["tissue", "carcinoma", "lung", "colon", "with", "glands", "sheets", "spindle", "cells"]
START, END = "<|startoftext|>", "<|endoftext|>"
TEXT_WIDTH, EMBEDDING_DIM, MAX_TOKENS = 32, 16, 16


def tiny_foundation(
    path: Path,
    seed: int = 0,
    *,
    tile_px: int = 32,
    prediction_type: str = "v_prediction",
    pixart: bool = False,
) -> Foundation:
    """Write a tiny foundation to ``path`` and load it."""
    return load(
        write_tiny_foundation(
            path, seed, tile_px=tile_px, prediction_type=prediction_type, pixart=pixart
        )
    )


def write_tiny_foundation(
    path: Path,
    seed: int = 0,
    *,
    tile_px: int = 32,
    prediction_type: str = "v_prediction",
    pixart: bool = False,
) -> Path:
    """Write ``foundation.json`` and everything it lists. Latents are (4, tile_px/4, tile_px/4)."""
    write = write_tiny_pixart if pixart else write_tiny_pipeline
    write(path, seed, latent_px=tile_px // 4, prediction_type=prediction_type)
    write_tiny_aligner(path / "aligner", seed, image_px=tile_px)
    generator = torch.Generator().manual_seed(seed + 100)
    head = LatentAligner(in_channels=4, width=8, embedding_dim=EMBEDDING_DIM)
    randomise(head, generator)
    save_file(head.state_dict(), path / "latent_aligner.safetensors")
    bank = [
        {"text": f"{cancer.name} tissue with glands", "cancer_code": cancer.code}
        for cancer in CANCER_TYPES
    ]
    (path / "prompt_bank.json").write_text(json.dumps(bank))
    tiles = torch.randint(0, 256, (8, 3, tile_px, tile_px), generator=generator, dtype=torch.uint8)
    patterns = itertools.cycle(("glands", "sheets", "spindle cells"))
    captions = tuple(f"tissue with {next(patterns)} {row % 4}" for row in range(8))
    save_probe(path / "probe", Probe(tiles_NCHW=tiles, captions=captions))
    write_manifest(
        path,
        name="tiny",
        licence="Apache-2.0",
        kind="embedded",
        tile_px=tile_px,
        mpp=1.0,
        latent_shape=(4, tile_px // 4, tile_px // 4),
        latent_aligner={"in_channels": 4, "width": 8, "embedding_dim": EMBEDDING_DIM},
        alignment={"r_lo": -0.1, "r_hi": 0.3},
    )
    return path


def write_tiny_pipeline(
    path: Path, seed: int = 0, *, latent_px: int = 8, prediction_type: str = "v_prediction"
) -> Path:
    """A stock Stable Diffusion directory with random weights."""
    generator = torch.Generator().manual_seed(seed)
    tokenizer = tiny_tokenizer()
    text_encoder = CLIPTextModel(_text_config(tokenizer))
    vae = _tiny_vae(latent_px)
    unet = UNet2DConditionModel(
        sample_size=latent_px,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    for module in (text_encoder, vae, unet):
        randomise(module, generator)
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=_tiny_scheduler(prediction_type),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(path, safe_serialization=True)
    return path


def write_tiny_pixart(
    path: Path, seed: int = 0, *, latent_px: int = 8, prediction_type: str = "epsilon"
) -> Path:
    """A stock PixArt directory with random weights, which says the noise's variance, too."""
    generator = torch.Generator().manual_seed(seed)
    tokenizer = tiny_t5_tokenizer()
    text_encoder = T5EncoderModel(
        T5Config(vocab_size=len(tokenizer), d_model=24, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    )
    vae = _tiny_vae(latent_px)
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=16,
        sample_size=latent_px,
        caption_channels=24,
    )
    for module in (text_encoder, vae, transformer):
        randomise(module, generator)
    pipeline = PixArtAlphaPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=vae,
        transformer=transformer,
        scheduler=_tiny_scheduler(prediction_type),
    )
    pipeline.save_pretrained(path, safe_serialization=True)
    return path


def tiny_t5_tokenizer() -> T5Tokenizer:
    """One token a letter."""
    letters = sorted({letter for word in (*WORDS, "H&E,0123456789") for letter in word})
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -2.0), ("\u2581", -2.0)]
    return T5Tokenizer(vocab=[*special, *((letter, -3.0) for letter in letters)], extra_ids=0)


def _tiny_vae(latent_px: int) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=latent_px * 4,
    )


def _tiny_scheduler(prediction_type: str) -> DDPMScheduler:
    return DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        rescale_betas_zero_snr=prediction_type == "v_prediction",
        timestep_spacing="trailing",
        steps_offset=1,
        clip_sample=False,
    )


def write_tiny_aligner(path: Path, seed: int = 0, *, image_px: int = 32) -> Path:
    """A CLIP directory with random weights."""
    tokenizer = tiny_tokenizer()
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": image_px,
        "patch_size": 8,
    }
    model = CLIPModel(
        CLIPConfig(
            text_config=_text_config(tokenizer).to_dict(),
            vision_config=vision,
            projection_dim=EMBEDDING_DIM,
        )
    )
    randomise(model, torch.Generator().manual_seed(seed + 1))
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    preparation = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (path / "preprocessor_config.json").write_text(json.dumps(preparation))
    return path


def tiny_tokenizer() -> CLIPTokenizer:
    """Byte-pair tokenizer in CLIP layout whose merges spell a few words."""
    merges: dict[tuple[str, str], None] = {}
    for word in WORDS:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            merges[parts[0], parts[1]] = None
            parts[:2] = [parts[0] + parts[1]]
    alphabet = sorted(ByteLevel.alphabet())
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet)]
    tokens += [*(left + right for left, right in merges), START, END]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(
        vocab=vocabulary, merges=list(merges), model_max_length=MAX_TOKENS, pad_token=END
    )


def randomise(module: nn.Module, generator: torch.Generator) -> None:
    """Every weight from ``generator``: scaled normals, norms near one, no zero layer."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim >= 2:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            elif name.endswith("weight"):
                parameter.copy_(1.0 + 0.1 * noise)
            elif parameter.ndim:
                parameter.copy_(0.02 * noise)


def _text_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=MAX_TOKENS,
        projection_dim=EMBEDDING_DIM,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
