"""Runs the trainings in order and writes the foundation directory."""

import copy
import hashlib
import json
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from crafts_core.aligner import Aligner, tokenize
from crafts_core.foundation_build.aligner_training import (
    Progress,
    save_aligner,
    train_aligner,
    train_tokenizer,
)
from crafts_core.foundation_build.config import BuildConfig
from crafts_core.foundation_build.diffusion_training import (
    encode_tiles,
    new_scheduler,
    train_latent_aligner,
    train_unet,
    train_vae,
)
from crafts_core.foundation_build.public_tiles import PublicTiles, render_public_tiles
from crafts_core.foundation_manifest import FoundationManifest, write_manifest
from crafts_core.probe import Probe, correlation_range, save_probe
from crafts_core.vocabulary import corpus, prompt_bank

_RENDERERS = ("procedural.py", "vocabulary.py")


def _silent(_text: str, _done: int, _total: int) -> None:
    pass


def build(
    out: Path,
    *,
    work: Path,
    config: BuildConfig | None = None,
    device: torch.device | str = "cpu",
    progress: Progress = _silent,
) -> FoundationManifest:
    """Build the embedded foundation into ``out``.

    Args:
        out: Directory to write; must not exist.
        work: Finished parts are kept here and used again by the next call with the same config.
        config: Sizes and lengths; the default made the shipped foundation.
        device: Where the trainings run.
        progress: Called with (what, done, total).

    Raises:
        FileExistsError: ``out`` is there already, or ``work`` is of another recipe.
    """
    config = config or BuildConfig()
    device = torch.device(device)
    if out.exists():
        raise FileExistsError(f"{out} exists; remove it or name another directory")
    _claim(work, config)
    all_tiles = render_public_tiles(config, work, progress)
    tiles, probe = _hold_out_probe(all_tiles, config)

    tokenizer, aligner = _aligner(tiles, config, work, device, progress)
    vae = _vae(tiles, config, work, device, progress)
    text_ULD, null_LD = _text(aligner, tokenizer, tiles.captions, config)
    latents_NCHW = encode_tiles(vae, tiles.image_NHWC, device) * vae.config.scaling_factor
    unet = _unet(vae, latents_NCHW, tiles, text_ULD, null_LD, config, work, device, progress)

    staging = out.with_name(out.name + ".building")
    shutil.rmtree(staging, ignore_errors=True)
    save_aligner(aligner, tokenizer, staging / "aligner")
    _save_pipeline(staging, vae, unet, aligner, tokenizer)
    embedding_ND = _embed(Aligner.from_directory(staging / "aligner"), tiles.image_NHWC)
    head = train_latent_aligner(
        unet, latents_NCHW, tiles.caption_N, text_ULD, embedding_ND, config,
        device=device, progress=progress,
    )  # fmt: skip
    _save_half(head.cpu().state_dict(), staging / "latent_aligner.safetensors")
    bank = prompt_bank()
    records = json.dumps([asdict(prompt) for prompt in bank], indent=1) + "\n"
    (staging / "prompt_bank.json").write_text(records)
    save_probe(staging / "probe", probe)
    stored = Aligner.from_directory(staging / "aligner")
    anchors_KD = stored.embed_captions([prompt.text for prompt in bank])
    r_lo, r_hi = correlation_range(stored, probe, anchors_KD)
    manifest = write_manifest(
        staging,
        name="embedded",
        licence="Apache-2.0",
        kind="embedded",
        tile_px=config.tile_px,
        mpp=config.mpp,
        latent_shape=tuple(latents_NCHW.shape[1:]),
        latent_aligner={
            "in_channels": config.latent_channels,
            "width": 48,
            "embedding_dim": config.embedding_dim,
        },
        alignment={"r_lo": r_lo, "r_hi": r_hi},
    )
    staging.rename(out)
    return manifest


def _claim(work: Path, config: BuildConfig) -> None:
    """Refuse parts that other settings or other code made."""
    work.mkdir(parents=True, exist_ok=True)
    stamp = work / "recipe.json"
    package = Path(__file__).parent
    sources = [*sorted(package.glob("*.py")), *map(package.parent.joinpath, _RENDERERS)]
    code = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()
    text = json.dumps({"code": code, "config": config.model_dump(mode="json")}, indent=1) + "\n"
    if stamp.exists() and stamp.read_text(encoding="utf-8") != text:
        raise FileExistsError(
            f"{work} holds parts of a build with other settings or code; name another directory"
        )
    stamp.write_text(text, encoding="utf-8")


def _hold_out_probe(tiles: PublicTiles, config: BuildConfig) -> tuple[PublicTiles, Probe]:
    """Keep one tile of each of the last regions as the probe; train on the other regions."""
    num_regions = int(tiles.region_N.max()) + 1
    probe_regions = range(num_regions - config.num_probe, num_regions)
    first_rows = [int(np.flatnonzero(tiles.region_N == region)[0]) for region in probe_regions]
    probe = Probe(
        tiles_NCHW=torch.from_numpy(tiles.image_NHWC[first_rows]).permute(0, 3, 1, 2).contiguous(),
        captions=tuple(tiles.captions[tiles.caption_N[row]] for row in first_rows),
    )
    kept = tiles.region_N < probe_regions.start
    return (
        PublicTiles(
            image_NHWC=tiles.image_NHWC[kept],
            caption_N=tiles.caption_N[kept],
            captions=tiles.captions,
            region_N=tiles.region_N[kept],
        ),
        probe,
    )


def _aligner(
    tiles: PublicTiles, config: BuildConfig, work: Path, device: torch.device, progress: Progress
) -> tuple[CLIPTokenizer, CLIPModel]:
    path = work / "aligner"
    if not (path / "config.json").exists():
        tokenizer = train_tokenizer(sorted({*corpus(), *tiles.captions}), config)
        tokenizer.save_pretrained(path)
        model = train_aligner(tiles, tokenizer, config, device=device, progress=progress)
        model.cpu().save_pretrained(path)
    return CLIPTokenizer.from_pretrained(path), CLIPModel.from_pretrained(path).eval()


def _vae(
    tiles: PublicTiles, config: BuildConfig, work: Path, device: torch.device, progress: Progress
) -> AutoencoderKL:
    path = work / "vae"
    if not (path / "config.json").exists():
        train_vae(tiles, config, device=device, progress=progress).save_pretrained(path)
    return AutoencoderKL.from_pretrained(path).to(device).eval()


def _unet(
    vae: AutoencoderKL,
    latents_NCHW: Tensor,
    tiles: PublicTiles,
    text_ULD: Tensor,
    null_LD: Tensor,
    config: BuildConfig,
    work: Path,
    device: torch.device,
    progress: Progress,
) -> UNet2DConditionModel:
    path = work / "unet"
    if not (path / "config.json").exists():
        turned_NHWC = np.rot90(tiles.image_NHWC, axes=(1, 2))[:, :, ::-1].copy()
        turned_NCHW = encode_tiles(vae, turned_NHWC, device) * vae.config.scaling_factor
        views_VNCHW = torch.stack([latents_NCHW, turned_NCHW])
        unet = train_unet(
            views_VNCHW, tiles.caption_N, text_ULD, null_LD, config,
            device=device, progress=progress,
        )  # fmt: skip
        unet.save_pretrained(path)
    return UNet2DConditionModel.from_pretrained(path).to(device).eval()


@torch.no_grad()
def _text(
    aligner: CLIPModel, tokenizer: CLIPTokenizer, captions: tuple[str, ...], config: BuildConfig
) -> tuple[Tensor, Tensor]:
    """Token states of every caption (U, L, D) and of the empty one (L, D)."""
    ids_UT = tokenize(tokenizer, ["", *captions], config.max_tokens)
    states = [aligner.text_model(ids).last_hidden_state for ids in ids_UT.split(256)]
    joined = torch.cat(states)
    return joined[1:], joined[0]


@torch.no_grad()
def _embed(aligner: Aligner, image_NHWC: np.ndarray) -> Tensor:
    tiles_NCHW = torch.from_numpy(image_NHWC).permute(0, 3, 1, 2)
    return torch.cat([aligner.embed_images(part) for part in tiles_NCHW.split(256)])


def _save_pipeline(
    out: Path,
    vae: AutoencoderKL,
    unet: UNet2DConditionModel,
    aligner: CLIPModel,
    tokenizer: CLIPTokenizer,
) -> None:
    """Stock Stable Diffusion layout in half precision; the aligner's text tower is the encoder."""
    pipeline = StableDiffusionPipeline(
        vae=vae.cpu(),
        text_encoder=copy.deepcopy(aligner.text_model),
        tokenizer=tokenizer,
        unet=unet.cpu(),
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(torch.float16)
    pipeline.save_pretrained(out, safe_serialization=True)
    pipeline.to(torch.float32)
    for part in ("unet", "vae"):  # where a part was read from is nobody's business
        path = out / part / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        config.pop("_name_or_path", None)
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _save_half(state: dict[str, Tensor], path: Path) -> None:
    save_file({name: tensor.half().contiguous() for name, tensor in state.items()}, path)
