"""The diffusers parts of a text-to-image generator as one object.

Shape letters: B batch, C H W channels and latent (or image) pixels, L tokens, D text width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, cast

import torch
from diffusers import AutoencoderKL, ControlNetModel, DDIMScheduler, DDPMScheduler
from torch import Tensor

from crafts_core.aligner import check_vocabulary
from crafts_core.denoisers import (
    Denoiser,
    DenoiserKind,
    TextEncoder,
    Tokenizer,
    kind_in,
    kind_of,
)
from crafts_core.foundation_manifest import FoundationError
from crafts_core.pretrained import pipeline_kind, read_part, readable
from crafts_core.quiet import quiet_transformers
from crafts_core.unread_text import unread_tails

PredictionType = Literal["epsilon", "v_prediction"]
"""What the denoiser predicts: the noise (diffusers says ``epsilon``) or the velocity."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generator:
    """Denoiser, VAE, text encoder, tokenizer and noise schedule. All weights frozen."""

    denoiser: Denoiser
    vae: AutoencoderKL
    text_encoder: TextEncoder
    tokenizer: Tokenizer
    scheduler: DDPMScheduler

    @classmethod
    def from_directory(
        cls,
        path: Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """Load a diffusers layout.

        That is ``unet/`` or ``transformer/``, ``vae/ text_encoder/ tokenizer/ scheduler/``.

        Half-precision files are widened to float32: norms and noise are computed there. Who only
        draws may ask for another ``dtype``.

        Raises:
            FoundationError: a part is missing, damaged or of another kind, or the denoiser predicts
                something that the losses do not know.
        """
        kind = kind_in(path)
        if kind is None:
            named = pipeline_kind(path)
            raise FoundationError(
                f"{path} is no generator that can be read here: expected unet/ (or transformer/), "
                "vae/, text_encoder/, tokenizer/ and scheduler/, as Stable Diffusion (or PixArt) "
                "has" + (f"; this is a {named}" if named else "")
            )
        denoiser = read_part(kind.network_class, path / kind.folder, dtype=dtype)
        vae = read_part(AutoencoderKL, path / "vae", dtype=dtype)
        text_encoder = read_part(kind.text_class, path / "text_encoder", dtype=dtype)
        check_parts_fit(denoiser, vae, text_encoder)
        with readable(path / "tokenizer"), quiet_transformers():
            tokenizer = kind.tokenizer_class.from_pretrained(
                path / "tokenizer", local_files_only=True
            )
            check_vocabulary(tokenizer, int(text_encoder.config.vocab_size))
        with readable(path / "scheduler"):
            scheduler = DDPMScheduler.from_pretrained(path / "scheduler", local_files_only=True)
        generator = cls(
            denoiser=denoiser.to(device).eval().requires_grad_(False),
            vae=vae.to(device).eval().requires_grad_(False),
            text_encoder=text_encoder.to(device).eval().requires_grad_(False),
            tokenizer=tokenizer,
            scheduler=scheduler,
        )
        if generator.scheduler.config.prediction_type not in ("epsilon", "v_prediction"):
            raise FoundationError(
                "scheduler: expected prediction_type 'epsilon' or 'v_prediction', "
                f"got {generator.scheduler.config.prediction_type!r}"
            )
        return generator

    @property
    def kind(self) -> DenoiserKind:
        """What depends on the denoiser's architecture."""
        return kind_of(self.denoiser)

    @property
    def device(self) -> torch.device:
        device: torch.device = self.denoiser.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.denoiser.dtype
        return dtype

    @property
    def prediction_type(self) -> PredictionType:
        return cast(PredictionType, self.scheduler.config.prediction_type)

    @property
    def alphas_cumprod(self) -> Tensor:
        """a_t squared for every timestep, float32, on the generator's device."""
        alphas_T: Tensor = self.scheduler.alphas_cumprod
        return alphas_T.to(self.device, torch.float32)

    @property
    def num_train_timesteps(self) -> int:
        return int(self.scheduler.config.num_train_timesteps)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one latent at the denoiser's own size."""
        config = self.denoiser.config
        return int(config.in_channels), int(config.sample_size), int(config.sample_size)

    @property
    def tile_px(self) -> int:
        """Side of an image, in pixels."""
        num_halvings = len(self.vae.config.block_out_channels) - 1
        return int(self.denoiser.config.sample_size) << num_halvings

    @torch.no_grad()
    def encode_images(self, images_BCHW: Tensor) -> Tensor:
        """Scaled latent means of float images in [-1, 1]."""
        posterior = self.vae.encode(images_BCHW.to(self.device, torch.float32)).latent_dist
        scale, shift = self._latent_scale()
        latents_BCHW: Tensor = (posterior.mean - shift) * scale
        return latents_BCHW

    @torch.no_grad()
    def decode_latents(self, latents_BCHW: Tensor) -> Tensor:
        """Float32 images, clamped to [-1, 1], of scaled latents."""
        scale, shift = self._latent_scale()
        decoded: Tensor = self.vae.decode(latents_BCHW / scale + shift).sample
        return decoded.float().clamp(-1.0, 1.0)

    def unread(self, captions: Sequence[str]) -> list[str]:
        """The end of each caption that the text encoder does not read; empty where it reads all."""
        return unread_tails(self.tokenizer, captions, self.kind.most_tokens(self.text_encoder))

    @torch.no_grad()
    def encode_captions(self, captions: list[str]) -> Tensor:
        """What the denoiser reads of captions, (B, L, D). ``""`` is the empty prompt."""
        return self.kind.encode(self.text_encoder, self.tokenizer, captions)

    def sampling_scheduler(self) -> DDIMScheduler:
        """A fresh DDIM scheduler on the same noise schedule; latents are never clipped."""
        return DDIMScheduler.from_config(self.scheduler.config, clip_sample=False)

    def stock_pipeline(
        self,
        scheduler: Any,
        *,
        denoiser: Denoiser | None = None,
        vae: AutoencoderKL | None = None,
        control: ControlNetModel | None = None,
    ) -> Any:
        """The pipeline of diffusers that draws with these parts, or with others in their place."""
        parts = {
            "vae": self.vae if vae is None else vae,
            "text_encoder": self.text_encoder,
            "tokenizer": self.tokenizer,
            "scheduler": scheduler,
        }
        return self.kind.pipeline(self.denoiser if denoiser is None else denoiser, parts, control)

    def _latent_scale(self) -> tuple[float, float]:
        config = self.vae.config
        return float(config.scaling_factor), float(getattr(config, "shift_factor", None) or 0.0)


def check_parts_fit(denoiser: Denoiser, vae: AutoencoderKL, text_encoder: TextEncoder) -> None:
    """The denoiser takes and gives the VAE's latents, and the text encoder's words alone.

    Raises:
        FoundationError: what it is instead.
    """
    kind_of(denoiser).check(denoiser, vae, int(text_encoder.config.hidden_size))
