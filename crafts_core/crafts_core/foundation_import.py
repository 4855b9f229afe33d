"""Turns local diffusers weights and a CLIP-layout aligner into a foundation directory.

Every part is read with its stock class from safetensors and written anew, so what ends up in the
foundation is weights and configuration and nothing else. What a diffusers directory lacks is made
from public parts: the prompt bank and probe of the embedded foundation, and a latent aligner fitted
on that probe.

Shape letters: N tiles, C H W channels and pixels or latent, D embedding, K anchors.
"""

import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional
from transformers import CLIPModel, CLIPTokenizer

from crafts_core.aligner import Aligner, LatentAligner, pearson, profile
from crafts_core.denoisers import DenoiserKind, kind_in
from crafts_core.foundation_manifest import (
    FoundationError,
    FoundationManifest,
    embedded_path,
    write_manifest,
)
from crafts_core.generator import Generator, check_parts_fit
from crafts_core.pretrained import pipeline_kind, read_part, readable
from crafts_core.probe import Probe, correlation_range, load_probe, save_probe
from crafts_core.quiet import quiet_transformers

LATENT_ALIGNER_WIDTH = 48


def import_diffusers(
    directory: Path,
    *,
    aligner: Path | None,
    out: Path,
    name: str,
    licence: str,
    mpp: float = 0.5,
    public_parts: Path | None = None,
    seed: int = 0,
    fit_steps: int = 300,
) -> FoundationManifest:
    """Import a Stable Diffusion 1.5/2.1 or PixArt class directory.

    Args:
        directory: Local diffusers layout (``unet/`` or ``transformer/``, ``vae/ text_encoder/
            tokenizer/ scheduler/``).
        aligner: Local CLIP layout (``config.json``, ``model.safetensors``, tokenizer files).
        out: Foundation directory to write; must not exist.
        name: Name of the foundation.
        licence: Licence of the imported weights.
        mpp: Microns per pixel that the generator's tiles stand for.
        public_parts: A foundation whose prompt bank and probe are taken; the embedded one if not
            given.
        seed: Public randomness of the latent aligner's fit.
        fit_steps: Length of that fit.

    Raises:
        FoundationError: a part is missing, is not safetensors, or does not fit the others.
        FileExistsError: ``out`` is there already.
    """
    if aligner is None:
        raise FoundationError("an imported foundation needs an aligner; pass a CLIP-layout DIR")
    if out.exists():
        raise FileExistsError(f"{out} exists; remove it or name another directory")
    kind = kind_in(directory)
    if kind is None:
        raise FoundationError(
            f"{directory} is {_named(directory)}; expected Stable Diffusion 1.5 or 2.1 (unet/) or "
            "PixArt (transformer/)"
        )
    staging = out.with_name(out.name + ".importing")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        with quiet_transformers():
            _copy_generator(directory, staging, kind)
            _copy_aligner(aligner, staging / "aligner")
        manifest = _complete(
            staging,
            public_parts=public_parts or embedded_path(),
            seed=seed,
            fit_steps=fit_steps,
            name=name,
            licence=licence,
            mpp=mpp,
        )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise FoundationError(f"cannot import {directory}: {_first_line(error)}") from error
    finally:
        if staging.exists() and not (staging / "foundation.json").exists():
            shutil.rmtree(staging)
    staging.rename(out)
    return manifest


def _copy_generator(source: Path, target: Path, kind: DenoiserKind) -> None:
    """Read each part with its own class, whatever its config names, and write it anew."""
    network_class = kind.network_class
    with readable(source / kind.folder):
        config = json.loads((source / kind.folder / "config.json").read_text(encoding="utf-8"))
        found = config.get("_class_name")
    if found != network_class.__name__:
        raise FoundationError(f"{kind.folder}: expected a {network_class.__name__}, got {found}")
    denoiser = read_part(network_class, source / kind.folder, dtype=torch.float32)
    vae = read_part(AutoencoderKL, source / "vae", dtype=torch.float32)
    text_encoder = read_part(kind.text_class, source / "text_encoder", dtype="auto")
    check_parts_fit(denoiser, vae, text_encoder)
    denoiser.save_pretrained(target / kind.folder)
    vae.save_pretrained(target / "vae")
    text_encoder.save_pretrained(target / "text_encoder")
    with readable(source / "tokenizer"):
        tokenizer = kind.tokenizer_class.from_pretrained(
            source / "tokenizer", local_files_only=True
        )
    tokenizer.save_pretrained(target / "tokenizer")
    # Latents have no bounds; the scheduler's own default would clip them.
    scheduler = DDPMScheduler.from_pretrained(
        source / "scheduler", local_files_only=True, clip_sample=False
    )
    scheduler.save_pretrained(target / "scheduler")


def _copy_aligner(source: Path, target: Path) -> None:
    read_part(CLIPModel, source, dtype="auto").save_pretrained(target)
    CLIPTokenizer.from_pretrained(source, local_files_only=True).save_pretrained(target)
    preparation = source / "preprocessor_config.json"
    if preparation.exists():
        values = json.loads(preparation.read_text(encoding="utf-8"))
        kept = {key: values[key] for key in ("image_mean", "image_std") if key in values}
        (target / preparation.name).write_text(json.dumps(kept, indent=1) + "\n")


def _complete(
    staging: Path,
    *,
    public_parts: Path,
    seed: int,
    fit_steps: int,
    name: str,
    licence: str,
    mpp: float,
) -> FoundationManifest:
    """Add prompt bank, probe and latent aligner, then the manifest."""
    generator = Generator.from_directory(staging)
    aligner = Aligner.from_directory(staging / "aligner")
    shutil.copyfile(public_parts / "prompt_bank.json", staging / "prompt_bank.json")
    bank = json.loads((staging / "prompt_bank.json").read_text(encoding="utf-8"))
    anchors_KD = aligner.embed_captions([record["text"] for record in bank])
    probe = _resized(load_probe(public_parts / "probe"), generator.tile_px)
    save_probe(staging / "probe", probe)
    head = fit_latent_aligner(generator, aligner, probe, anchors_KD, seed=seed, num_steps=fit_steps)
    save_file(head.state_dict(), staging / "latent_aligner.safetensors")
    r_lo, r_hi = correlation_range(aligner, probe, anchors_KD)
    return write_manifest(
        staging,
        name=name,
        licence=licence,
        kind="imported",
        tile_px=generator.tile_px,
        mpp=mpp,
        latent_shape=generator.latent_shape,
        latent_aligner={
            "in_channels": generator.latent_shape[0],
            "width": LATENT_ALIGNER_WIDTH,
            "embedding_dim": aligner.embedding_dim,
        },
        alignment={"r_lo": r_lo, "r_hi": r_hi},
    )


def fit_latent_aligner(
    generator: Generator,
    aligner: Aligner,
    probe: Probe,
    anchors_KD: Tensor,
    *,
    seed: int,
    num_steps: int,
) -> LatentAligner:
    """A head whose profiles of (slightly noisy) probe latents match the aligner's of the tiles."""
    rng = torch.Generator().manual_seed(seed)
    tiles = torch.split(probe.tiles_NCHW, 8)
    latents = torch.cat([generator.encode_images(part / 127.5 - 1.0) for part in tiles])
    target_NK = profile(torch.cat([aligner.embed_images(part) for part in tiles]), anchors_KD)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = LatentAligner(latents.shape[1], LATENT_ALIGNER_WIDTH, aligner.embedding_dim)
    optimizer = torch.optim.AdamW(head.parameters(), lr=2e-3, weight_decay=0.01)
    for _ in range(num_steps):
        rows = torch.randint(len(latents), (16,), generator=rng)
        level = 0.5 * torch.rand(16, 1, 1, 1, generator=rng)
        noise = torch.randn(latents[rows].shape, generator=rng)
        turned = torch.rot90(
            latents[rows] + level * noise,
            int(torch.randint(4, (1,), generator=rng)),
            dims=(2, 3),
        )
        loss = 1.0 - pearson(profile(head(turned), anchors_KD), target_NK[rows]).mean()
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        optimizer.step()
    return head.eval().requires_grad_(False)


def _resized(probe: Probe, tile_px: int) -> Probe:
    tiles_NCHW = functional.interpolate(
        probe.tiles_NCHW.float(), (tile_px, tile_px), mode="bicubic", antialias=True
    )
    return Probe(
        tiles_NCHW=tiles_NCHW.round().clamp(0, 255).to(torch.uint8), captions=probe.captions
    )


def _named(directory: Path) -> str:
    named = pipeline_kind(directory)
    return f"a {named}" if named else "no diffusers directory"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
