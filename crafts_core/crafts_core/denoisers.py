"""The networks that take noise out of a latent, and what each needs beside it.

One seam: all that depends on the denoiser's kind stands here. A diffusers directory says the kind
by the name of a folder:

* ``unet/``: Stable Diffusion 1.5 and 2.1 (``UNet2DConditionModel``), words from CLIP's text tower;
* ``transformer/``: PixArt-alpha and PixArt-sigma (``PixArtTransformer2DModel``), words from a T5
  encoder. What it says of the noise's variance is left aside, as its own pipeline does.

What a denoiser reads of a caption is one tensor (B, L, D), made by ``encode`` and read by
``predict`` of the same kind, and opaque to everybody between them. T5 pads captions with tokens
that must not be looked at: its last column is 1 where a token counts.

Shape letters: B batch, C H W latent, L tokens, D text.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch
from diffusers import AutoencoderKL, ControlNetModel, PixArtTransformer2DModel, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

from crafts_core.aligner import tokenize
from crafts_core.foundation_manifest import FoundationError

Denoiser: TypeAlias = UNet2DConditionModel | PixArtTransformer2DModel
TextEncoder: TypeAlias = CLIPTextModel | T5EncoderModel
Tokenizer: TypeAlias = CLIPTokenizer | T5Tokenizer
_PIXART_TOKENS = 120
"""As many as PixArt's pipeline reads of a prompt."""
_TOLD_SIZE, _HALVINGS = 128, 3
"""Latents whose size PixArt is told, in pixels, and how often its VAE halves an image."""


class DenoiserKind(Protocol):
    """What differs between kinds."""

    folder: str
    """Of the denoiser in a diffusers directory."""
    network_class: Any
    text_class: Any
    tokenizer_class: Any
    takes_control: bool
    """Whether a ControlNet can steer it."""
    reads_lora: bool
    """Whether its pipeline loads a LoRA file."""
    fewest_steps: int
    """That its pipeline draws in."""
    card_arguments: str
    """What its pipeline has to be called with beside prompt, steps and guidance."""

    def check(self, network: Any, vae: AutoencoderKL, text_width: int) -> None:
        """The denoiser takes and gives the VAE's latents, and the text encoder's words alone.

        Raises:
            FoundationError: what it is instead.
        """
        ...

    def most_tokens(self, text_encoder: Any) -> int:
        """Of a caption, with those that begin and end it."""
        ...

    def encode(self, text_encoder: Any, tokenizer: Any, captions: list[str]) -> Tensor:
        """What ``predict`` reads of captions, (B, L, D)."""
        ...

    def predict(
        self,
        network: Any,
        noisy_BCHW: Tensor,
        timesteps_B: Tensor,
        text_BLD: Tensor,
        *,
        through: Callable[..., Any] | None = None,
        steering: dict[str, Any] | None = None,
    ) -> Tensor:
        """Noise or velocity, as the noise schedule says; ``through`` is a compiled ``network``."""
        ...

    def pipeline(
        self, network: Any, parts: dict[str, Any], control: ControlNetModel | None = None
    ) -> Any:
        """Its stock pipeline; ``parts`` are VAE, text encoder, tokenizer and scheduler."""
        ...

    def arguments(self, text_BLD: Tensor, negative_BLD: Tensor) -> dict[str, Any]:
        """What the pipeline is called with for these words."""
        ...


class UNetKind:
    """Stable Diffusion's."""

    folder = "unet"
    network_class = UNet2DConditionModel
    text_class = CLIPTextModel
    tokenizer_class = CLIPTokenizer
    takes_control = True
    reads_lora = True
    fewest_steps = 1
    card_arguments = ""

    def check(self, network: Any, vae: AutoencoderKL, text_width: int) -> None:
        """See :class:`DenoiserKind`."""
        config, channels = network.config, int(vae.config.latent_channels)
        if not config.in_channels == config.out_channels == channels:
            raise FoundationError(
                f"unet: expected latents of {channels} channels in and out, as the VAE has, got "
                f"{config.in_channels} in and {config.out_channels} out (inpainting and depth "
                "weights take more; use the plain text-to-image ones)"
            )
        added = [
            name
            for name in ("addition_embed_type", "class_embed_type", "encoder_hid_dim_type")
            if getattr(config, name, None) is not None
        ]
        if config.cross_attention_dim != text_width or added:
            raise FoundationError(
                f"unet: expected cross attention of width {text_width} and no added conditions, "
                f"got {config.cross_attention_dim} and {', '.join(added) or 'none'} "
                "(Stable Diffusion 1.5 or 2.1 class is what fits)"
            )

    def most_tokens(self, text_encoder: Any) -> int:
        """See :class:`DenoiserKind`."""
        return int(text_encoder.config.max_position_embeddings)

    def encode(self, text_encoder: Any, tokenizer: Any, captions: list[str]) -> Tensor:
        """See :class:`DenoiserKind`."""
        ids_BL = tokenize(tokenizer, captions, self.most_tokens(text_encoder))
        hidden_BLD: Tensor = text_encoder(
            input_ids=ids_BL.to(text_encoder.device)
        ).last_hidden_state
        return hidden_BLD

    def predict(
        self,
        network: Any,
        noisy_BCHW: Tensor,
        timesteps_B: Tensor,
        text_BLD: Tensor,
        *,
        through: Callable[..., Any] | None = None,
        steering: dict[str, Any] | None = None,
    ) -> Tensor:
        """See :class:`DenoiserKind`."""
        found: Tensor = (through or network)(
            noisy_BCHW, timesteps_B, text_BLD, **(steering or {})
        ).sample
        return found

    def pipeline(
        self, network: Any, parts: dict[str, Any], control: ControlNetModel | None = None
    ) -> Any:
        """See :class:`DenoiserKind`."""
        from diffusers import StableDiffusionControlNetPipeline, StableDiffusionPipeline

        unchecked: dict[str, Any] = {
            "safety_checker": None,
            "feature_extractor": None,
            "requires_safety_checker": False,
        }
        if control is None:
            return StableDiffusionPipeline(unet=network, **parts, **unchecked)
        return StableDiffusionControlNetPipeline(
            unet=network, controlnet=control, **parts, **unchecked
        )

    def arguments(self, text_BLD: Tensor, negative_BLD: Tensor) -> dict[str, Any]:
        """See :class:`DenoiserKind`."""
        return {"prompt_embeds": text_BLD, "negative_prompt_embeds": negative_BLD}


class PixArtKind:
    """PixArt's. Chen et al., arXiv 2310.00426 and 2403.04692."""

    folder = "transformer"
    network_class = PixArtTransformer2DModel
    text_class = T5EncoderModel
    tokenizer_class = T5Tokenizer
    takes_control = False
    reads_lora = False
    fewest_steps = 2
    card_arguments = ", clean_caption=False, use_resolution_binning=False"

    def check(self, network: Any, vae: AutoencoderKL, text_width: int) -> None:
        """See :class:`DenoiserKind`."""
        config, channels = network.config, int(vae.config.latent_channels)
        if config.in_channels != channels or config.out_channels not in (channels, 2 * channels):
            raise FoundationError(
                f"transformer: expected latents of {channels} channels in, as the VAE has, and "
                f"once or twice as many out, got {config.in_channels} and {config.out_channels}"
            )
        is_large, factor = config.sample_size == _TOLD_SIZE, len(vae.config.block_out_channels) - 1
        if network.use_additional_conditions != is_large or (is_large and factor != _HALVINGS):
            raise FoundationError(
                f"transformer: its pipeline tells the size of latents of {_TOLD_SIZE}, of a VAE "
                f"that halves {_HALVINGS} times, and of no others; got latents of "
                f"{config.sample_size}, {factor} halvings, use_additional_conditions "
                f"{network.use_additional_conditions}"
            )
        if config.caption_channels != text_width:
            raise FoundationError(
                f"transformer: expected captions of width {text_width}, as the text encoder has, "
                f"got {config.caption_channels}"
            )

    def most_tokens(self, text_encoder: Any) -> int:  # noqa: ARG002
        """See :class:`DenoiserKind`. T5 has relative positions, hence no limit of its own."""
        return _PIXART_TOKENS

    def encode(self, text_encoder: Any, tokenizer: Any, captions: list[str]) -> Tensor:
        """See :class:`DenoiserKind`."""
        # As its pipeline prepares a prompt, and as it was trained.
        small = [caption.lower().strip() for caption in captions]
        ids_BL = tokenize(tokenizer, small, _PIXART_TOKENS).to(text_encoder.device)
        counts_BL = ids_BL != tokenizer.pad_token_id
        hidden_BLD: Tensor = text_encoder(
            input_ids=ids_BL, attention_mask=counts_BL.long()
        ).last_hidden_state
        return torch.cat([hidden_BLD, counts_BL[..., None].to(hidden_BLD)], dim=-1)

    def predict(
        self,
        network: Any,
        noisy_BCHW: Tensor,
        timesteps_B: Tensor,
        text_BLD: Tensor,
        *,
        through: Callable[..., Any] | None = None,
        steering: dict[str, Any] | None = None,
    ) -> Tensor:
        """See :class:`DenoiserKind`."""
        if steering:
            raise ValueError("no ControlNet steers a PixArt transformer")
        found: Tensor = (through or network)(
            noisy_BCHW,
            encoder_hidden_states=text_BLD[..., :-1],
            encoder_attention_mask=text_BLD[..., -1],
            timestep=timesteps_B,
            added_cond_kwargs=_size_of(network, noisy_BCHW),
        ).sample
        return found[:, : noisy_BCHW.shape[1]]

    def pipeline(
        self, network: Any, parts: dict[str, Any], control: ControlNetModel | None = None
    ) -> Any:
        """See :class:`DenoiserKind`."""
        from diffusers import PixArtAlphaPipeline

        if control is not None:
            raise ValueError("no ControlNet steers a PixArt transformer")
        return PixArtAlphaPipeline(transformer=network, **parts)

    def arguments(self, text_BLD: Tensor, negative_BLD: Tensor) -> dict[str, Any]:
        """See :class:`DenoiserKind`."""
        return {
            "prompt_embeds": text_BLD[..., :-1],
            "prompt_attention_mask": text_BLD[..., -1],
            "negative_prompt": None,
            "negative_prompt_embeds": negative_BLD[..., :-1],
            "negative_prompt_attention_mask": negative_BLD[..., -1],
            "use_resolution_binning": False,
        }


KINDS: tuple[DenoiserKind, ...] = (UNetKind(), PixArtKind())


def kind_of(network: nn.Module) -> DenoiserKind:
    """The kind of a loaded denoiser."""
    return next(kind for kind in KINDS if isinstance(network, kind.network_class))


def kind_in(directory: Path) -> DenoiserKind | None:
    """The kind whose folder a diffusers directory has, if it has one."""
    return next((kind for kind in KINDS if (directory / kind.folder).is_dir()), None)


def predict(
    network: Denoiser, noisy_BCHW: Tensor, timesteps_B: Tensor, text_BLD: Tensor, **how: Any
) -> Tensor:
    """What a denoiser of any kind says; see ``DenoiserKind.predict``."""
    return kind_of(network).predict(network, noisy_BCHW, timesteps_B, text_BLD, **how)


def _size_of(network: Any, noisy_BCHW: Tensor) -> dict[str, Tensor | None]:
    """The large PixArt-alpha is told the image's size; here it is always its own, and square."""
    if not network.use_additional_conditions:
        return {"resolution": None, "aspect_ratio": None}
    side_px = float(noisy_BCHW.shape[-1] << _HALVINGS)
    rows = len(noisy_BCHW)
    return {
        "resolution": noisy_BCHW.new_full((rows, 2), side_px),
        "aspect_ratio": noisy_BCHW.new_ones(rows, 1),
    }
