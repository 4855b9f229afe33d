"""Runs the trainings in order and writes the foundation directory."""

import copy
import hashlib
import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from crafts_core.aligner import Aligner, LatentAligner, tokenize
from crafts_core.foundation_build.aligner_training import (
    save_aligner,
    train_aligner,
    train_tokenizer,
)
from crafts_core.foundation_build.card import write_card
from crafts_core.foundation_build.config import BuildConfig
from crafts_core.foundation_build.decoder_training import train_decoder
from crafts_core.foundation_build.diffusion_training import (
    LATENT_ALIGNER_WIDTH,
    encode_views,
    new_scheduler,
    train_latent_aligner,
    train_unet,
    train_vae,
)
from crafts_core.foundation_build.public_tiles import (
    DRAWN,
    PublicTiles,
    probe_of,
    public_tiles,
)
from crafts_core.foundation_build.structure_net import StructureNet, train_structure_net
from crafts_core.foundation_build.tiles_table import TableRow
from crafts_core.foundation_build.training import Recipe
from crafts_core.foundation_manifest import FoundationManifest, write_manifest
from crafts_core.pixels import channels_first
from crafts_core.probe import Probe, correlation_range, save_probe
from crafts_core.progress import Progress, silent
from crafts_core.vocabulary import corpus, prompt_bank

_RENDERERS = ("procedural.py", "vocabulary.py", "otsu.py", "aligner.py", "probe.py")


def build(
    out: Path,
    *,
    work: Path,
    rows: Sequence[TableRow] = (),
    config: BuildConfig | None = None,
    name: str = "embedded",
    device: torch.device | str = "cpu",
    progress: Progress = silent,
) -> FoundationManifest:
    """Build a public foundation into ``out``.

    Args:
        out: Directory to write; must not exist.
        work: Finished parts and the state of the unfinished one are kept here and used again by
            the next call with the same table and config.
        rows: Open tiles (``tiles_table.read_table``); without any, everything is drawn.
        config: Sizes and lengths; the default made the shipped foundation.
        name: Of the foundation.
        device: Where the trainings run.
        progress: Called with (what, done, total).

    Raises:
        FileExistsError: ``out`` is there already, or ``work`` is of another recipe.
        FoundationError: an image of the table cannot be read.
    """
    config = config or BuildConfig()
    if out.exists():
        raise FileExistsError(f"{out} exists; remove it or name another directory")
    _claim(work, rows, config)
    workshop = _Workshop(rows, config, work, torch.device(device), progress)
    staging = out.with_name(out.name + ".building")
    shutil.rmtree(staging, ignore_errors=True)
    head = workshop.latent_aligner
    save_aligner(workshop.aligner, workshop.tokenizer, staging / "aligner")
    _save_pipeline(staging, workshop.sharp_vae, workshop.unet, workshop.aligner, workshop.tokenizer)
    _save_half(head.cpu().state_dict(), staging / "latent_aligner.safetensors")
    bank = prompt_bank()
    records = json.dumps([asdict(prompt) for prompt in bank], indent=1) + "\n"
    (staging / "prompt_bank.json").write_text(records)
    probe = workshop.probe
    save_probe(staging / "probe", probe)
    stored = Aligner.from_directory(staging / "aligner")
    anchors_KD = stored.embed_captions([prompt.text for prompt in bank])
    r_lo, r_hi = correlation_range(stored, probe, anchors_KD)
    write_card(staging / "README.md", rows, config, name=name)
    manifest = write_manifest(
        staging,
        name=name,
        licence="Apache-2.0",
        kind="embedded",
        tile_px=config.tile_px,
        mpp=config.mpp,
        latent_shape=tuple(workshop.latents.shape[2:]),
        latent_aligner={
            "in_channels": config.latent_channels,
            "width": LATENT_ALIGNER_WIDTH,
            "embedding_dim": config.embedding_dim,
        },
        alignment={"r_lo": r_lo, "r_hi": r_hi},
    )
    staging.rename(out)
    return manifest


def _claim(work: Path, rows: Sequence[TableRow], config: BuildConfig) -> None:
    """Refuse parts that other tiles, other settings or other code made."""
    work.mkdir(parents=True, exist_ok=True)
    stamp = work / "recipe.json"
    package = Path(__file__).parent
    sources = [*sorted(package.glob("*.py")), *map(package.parent.joinpath, _RENDERERS)]
    recipe = {
        "code": _sha256(source.read_bytes() for source in sources),
        "tiles": _sha256(
            part
            for row in rows
            for part in (row.model_dump_json(exclude={"file"}).encode(), row.file.read_bytes())
        ),
        "config": config.model_dump(mode="json"),
    }
    text = json.dumps(recipe, indent=1) + "\n"
    if stamp.exists() and stamp.read_text(encoding="utf-8") != text:
        raise FileExistsError(
            f"{work} holds parts of a build with other tiles, settings or code; "
            "name another directory"
        )
    stamp.write_text(text, encoding="utf-8")


def _sha256(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()


class _Workshop:
    """Every part, trained when it is first asked for or read back from the work directory."""

    def __init__(
        self,
        rows: Sequence[TableRow],
        config: BuildConfig,
        work: Path,
        device: torch.device,
        progress: Progress,
    ) -> None:
        self._rows, self._config, self._work = rows, config, work
        self._device, self._progress = device, progress

    def _recipe(
        self,
        name: str,
        *,
        seed: int,
        steps: int,
        batch: int,
        learning_rate: float,
        ema_decay: float | None = None,
        weight_decay: float = 0.01,
    ) -> Recipe:
        return Recipe(
            name=name,
            state=self._work / f"{name.replace(' ', '-')}.state",
            seed=seed,
            steps=steps,
            batch=batch,
            learning_rate=learning_rate,
            device=self._device,
            progress=self._progress,
            ema_decay=ema_decay,
            weight_decay=weight_decay,
        )

    @cached_property
    def tiles(self) -> PublicTiles:
        return public_tiles(self._rows, self._config, self._work, self._progress)

    @cached_property
    def probe(self) -> Probe:
        return probe_of(self._rows, self._config)

    @cached_property
    def tokenizer(self) -> CLIPTokenizer:
        """Kept like a trained part: the library breaks ties between merges as it pleases."""
        path = self._work / "tokenizer"
        if not path.exists():
            unfinished = path.with_name("tokenizer.writing")
            sentences = sorted({*corpus(), *self.tiles.captions})
            train_tokenizer(sentences, self._config).save_pretrained(unfinished)
            unfinished.rename(path)
        return CLIPTokenizer.from_pretrained(path, local_files_only=True)

    @cached_property
    def aligner(self) -> CLIPModel:
        path, config = self._work / "aligner", self._config
        if not path.exists():
            recipe = self._recipe(
                "aligner", seed=config.seed, steps=config.aligner_steps, batch=config.aligner_batch,
                learning_rate=1.5e-3, weight_decay=0.05,
            )  # fmt: skip
            model = train_aligner(self.tiles, self.tokenizer, config, recipe)
            _finish(path, model.cpu(), recipe)
        return CLIPModel.from_pretrained(path).eval()

    @cached_property
    def structure_net(self) -> StructureNet:
        """Tells open cases and what they show apart; drawings only where there is no table."""
        path, config = self._work / "structure_net.safetensors", self._config
        is_drawn_N = np.char.startswith(self.tiles.kind_N, DRAWN)
        use_N = is_drawn_N if is_drawn_N.all() else ~is_drawn_N
        kinds, class_N = np.unique(self.tiles.kind_N[use_N], return_inverse=True)
        if not path.exists():
            recipe = self._recipe(
                "structure net", seed=config.structure_seed, steps=config.structure_steps,
                batch=config.structure_batch, learning_rate=2e-3,
            )  # fmt: skip
            net = train_structure_net(
                self.tiles.image_NHWC[use_N], class_N.astype(np.int64), recipe
            )
            _store(path, net.cpu().state_dict(), recipe)
        net = StructureNet(len(kinds))
        net.load_state_dict(load_file(path))
        return net.eval().requires_grad_(False)

    @cached_property
    def vae(self) -> AutoencoderKL:
        path, config = self._work / "vae", self._config
        if not path.exists():
            recipe = self._recipe(
                "VAE", seed=config.seed + 1, steps=config.vae_steps, batch=config.vae_batch,
                learning_rate=2e-3, ema_decay=0.995,
            )  # fmt: skip
            _finish(path, train_vae(self.tiles, self.structure_net, config, recipe), recipe)
        return AutoencoderKL.from_pretrained(path).to(self._device).eval()

    @cached_property
    def sharp_vae(self) -> AutoencoderKL:
        """The same encoder; the decoder trained on against a critic."""
        path, config = self._work / "sharp_vae", self._config
        if not path.exists():
            recipe = self._recipe(
                "decoder", seed=config.seed + 7, steps=config.decoder_steps,
                batch=config.vae_batch, learning_rate=3e-4, ema_decay=0.998,
            )  # fmt: skip
            vae = copy.deepcopy(self.vae)
            _finish(
                path, train_decoder(vae, self.tiles, self.structure_net, config, recipe), recipe
            )
        return AutoencoderKL.from_pretrained(path).to(self._device).eval()

    @cached_property
    def latents(self) -> Tensor:
        """(V, N, C, H, W), half precision."""
        path = self._work / "latents.safetensors"
        if not path.exists():
            recipe = self._recipe(
                "latents", seed=self._config.seed + 6, steps=0, batch=64, learning_rate=0.0
            )
            views = encode_views(self.vae, self.tiles.image_NHWC, self._config.unet_views, recipe)
            _store(path, {"latents": views}, recipe)
        latents_VNCHW: Tensor = load_file(path)["latents"]
        return latents_VNCHW

    @cached_property
    def text(self) -> tuple[Tensor, Tensor]:
        """Token states of every caption (U, L, D) and of the empty one (L, D)."""
        ids_UT = tokenize(self.tokenizer, ["", *self.tiles.captions], self._config.max_tokens)
        with torch.no_grad():
            states = [self.aligner.text_model(ids).last_hidden_state for ids in ids_UT.split(256)]
        joined = torch.cat(states)
        return joined[1:], joined[0]

    @cached_property
    def unet(self) -> UNet2DConditionModel:
        path, config = self._work / "unet", self._config
        if not path.exists():
            text_ULD, null_LD = self.text
            recipe = self._recipe(
                "UNet", seed=config.seed + 2, steps=config.unet_steps, batch=config.unet_batch,
                learning_rate=5e-4, ema_decay=0.999,
            )  # fmt: skip
            unet = train_unet(
                self.latents, self.tiles.caption_NV, text_ULD, null_LD, config, recipe
            )
            _finish(path, unet, recipe)
        return UNet2DConditionModel.from_pretrained(path).to(self._device).eval()

    @cached_property
    def latent_aligner(self) -> LatentAligner:
        config = self._config
        recipe = self._recipe(
            "latent aligner", seed=config.seed + 3, steps=config.latent_aligner_steps, batch=64,
            learning_rate=2e-3,
        )  # fmt: skip
        tower = Aligner(
            model=self.aligner, tokenizer=self.tokenizer, mean=(0.5,) * 3, std=(0.5,) * 3
        )
        tiles_NCHW = channels_first(self.tiles.image_NHWC)
        embedding_ND = torch.cat([tower.embed_images(part) for part in tiles_NCHW.split(256)])
        return train_latent_aligner(
            self.unet, self.latents[0], self.tiles.caption_NV[:, 0], self.text[0],
            embedding_ND, config, recipe,
        )  # fmt: skip


def _finish(
    path: Path, model: CLIPModel | AutoencoderKL | UNet2DConditionModel, recipe: Recipe
) -> None:
    """Written beside and renamed: a part that is there is whole. Then its state can go."""
    unfinished = path.with_name(path.name + ".writing")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    unfinished.rename(path)
    recipe.state.unlink(missing_ok=True)


def _store(path: Path, tensors: dict[str, Tensor], recipe: Recipe) -> None:
    """As ``_finish``, for plain tensors."""
    unfinished = path.with_suffix(".writing")
    save_file(tensors, unfinished)
    unfinished.replace(path)
    recipe.state.unlink(missing_ok=True)


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
    for part in ("unet", "vae", "text_encoder"):
        path = out / part / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        config.pop("_name_or_path", None)  # where a part was read from is nobody's business
        if "dtype" in config:  # diffusers widens its own parts; transformers asks this file
            config["dtype"] = "float32"
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _save_half(state: dict[str, Tensor], path: Path) -> None:
    save_file({name: tensor.half().contiguous() for name, tensor in state.items()}, path)
