"""The frozen image-text aligner, correlation profiles, and the latent aligner.

Our reading of the correlation-regulated alignment of CRAFTS (design section 6): a *profile* is an
embedding seen from the public prompt bank, ``p = A e``, and two profiles agree by their Pearson
correlation over the anchors.

Shape letters: B batch, C H W channels and pixels, D embedding, K anchors, L tokens.
"""

import base64
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from tokenizers import normalizers
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPModel, CLIPTokenizer, PreTrainedTokenizerBase

from crafts_core.panics import panics_as_errors
from crafts_core.pretrained import read_part, readable
from crafts_core.quiet import quiet_transformers

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
"""What CLIP weights expect when their directory does not say otherwise."""
_PREPARATION = "preprocessor_config.json"
_MOST_REPLACEMENT_BYTES = 256
"""Of a letter; Unicode's longest takes 33."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Aligner:
    """A frozen dual encoder in transformers' CLIP layout. Embeddings have unit norm."""

    model: CLIPModel
    tokenizer: CLIPTokenizer
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def from_directory(cls, path: Path, *, device: torch.device | str = "cpu") -> Self:
        """Load safetensors weights, tokenizer and pixel preparation from a local directory."""
        model = read_part(CLIPModel, path, dtype=torch.float32)
        with readable(path), quiet_transformers():
            tokenizer = CLIPTokenizer.from_pretrained(path, local_files_only=True)
            check_vocabulary(tokenizer, int(model.config.text_config.vocab_size))
        preparation: dict[str, list[float]] = {}
        if (path / _PREPARATION).exists():
            preparation = json.loads((path / _PREPARATION).read_text(encoding="utf-8"))
        return cls(
            model=model.to(device).eval().requires_grad_(False),
            tokenizer=tokenizer,
            mean=tuple(preparation.get("image_mean", OPENAI_MEAN)),
            std=tuple(preparation.get("image_std", OPENAI_STD)),
        )

    @property
    def embedding_dim(self) -> int:
        return int(self.model.config.projection_dim)

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.logit_scale.device
        return device

    @torch.no_grad()
    def embed_images(self, images_BCHW: Tensor) -> Tensor:
        """Unit embeddings (B, D) of uint8 images or of float images in [-1, 1], any size."""
        pixels_BCHW = images_BCHW.to(self.device, torch.float32)
        unit = 255.0 if images_BCHW.dtype == torch.uint8 else 2.0
        shift = 0.0 if images_BCHW.dtype == torch.uint8 else 0.5
        prepared_BCHW = self._prepare(pixels_BCHW / unit + shift)
        pooled_BD = self.model.vision_model(pixel_values=prepared_BCHW).pooler_output
        return functional.normalize(self.model.visual_projection(pooled_BD), dim=1)

    @torch.no_grad()
    def embed_captions(self, captions: list[str]) -> Tensor:
        """Unit embeddings (B, D). Long captions are cut at the text tower's length."""
        ids_BL = tokenize(
            self.tokenizer, captions, int(self.model.config.text_config.max_position_embeddings)
        )
        pooled_BD = self.model.text_model(input_ids=ids_BL.to(self.device)).pooler_output
        return functional.normalize(self.model.text_projection(pooled_BD), dim=1)

    def _prepare(self, unit_BCHW: Tensor) -> Tensor:
        """From [0, 1] to what the vision tower expects: square, resized, normalised."""
        side = int(self.model.config.vision_config.image_size)
        if unit_BCHW.shape[-2:] != (side, side):
            unit_BCHW = functional.interpolate(
                unit_BCHW, (side, side), mode="bicubic", antialias=True, align_corners=False
            ).clamp(0.0, 1.0)
        mean_C11 = unit_BCHW.new_tensor(self.mean)[:, None, None]
        std_C11 = unit_BCHW.new_tensor(self.std)[:, None, None]
        return (unit_BCHW - mean_C11) / std_C11


class LatentAligner(nn.Module):
    """Head from a clean (or denoised) latent to the aligner's space. Any H and W.

    Differentiable: stage alignment sends its gradient through this head into the denoiser.
    """

    def __init__(self, in_channels: int, width: int, embedding_dim: int) -> None:
        super().__init__()
        groups = next(count for count in (8, 4, 2, 1) if width % count == 0)
        self.layers = nn.Sequential(
            nn.Conv2d(in_channels, width, 3, padding=1),
            nn.GroupNorm(groups, width),
            nn.SiLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.GroupNorm(groups, 2 * width),
            nn.SiLU(),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            nn.GroupNorm(groups, 2 * width),
            nn.SiLU(),
        )
        self.projection = nn.Linear(2 * width, embedding_dim)

    def forward(self, latents_BCHW: Tensor) -> Tensor:
        """Unit embeddings (B, D)."""
        features_BC: Tensor = self.layers(latents_BCHW).mean(dim=(2, 3))
        return functional.normalize(self.projection(features_BC), dim=1)


def profile(embedding_BD: Tensor, anchors_KD: Tensor) -> Tensor:
    """How each embedding correlates with each anchor: ``p = A e``, shape (B, K)."""
    return embedding_BD @ anchors_KD.T


def pearson(p_BK: Tensor, q_BK: Tensor) -> Tensor:
    """Pearson correlation of matching rows, in [-1, 1].

    A constant row correlates with nothing: its result is 0 and its gradient finite.
    """
    p_BK = p_BK - p_BK.mean(dim=1, keepdim=True)
    q_BK = q_BK - q_BK.mean(dim=1, keepdim=True)
    return functional.cosine_similarity(p_BK, q_BK, dim=1, eps=1e-8)


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Every token must have an embedding: else some captions, and no others, would be errors.

    Of a folder without any file the library makes a tokenizer that knows no word.

    Raises:
        ValueError: the tokenizer knows more tokens than the text tower, tells no two captions
            apart, or makes a long text of one letter.
    """
    largest = max(tokenizer.get_vocab().values())
    if largest >= vocab_size:
        raise ValueError(f"the tokenizer has token {largest}, its text tower {vocab_size} tokens")
    with panics_as_errors():
        first, second = tokenizer(["normal colon", "lung adenocarcinoma"]).input_ids
    if set(first) == set(second):
        raise ValueError("the tokenizer knows no words")
    longest = _longest_replacement(tokenizer)
    if longest > _MOST_REPLACEMENT_BYTES:
        raise ValueError(f"the tokenizer puts {longest} bytes in place of one letter")


def _longest_replacement(tokenizer: PreTrainedTokenizerBase) -> int:
    """Bytes of what T5's table of characters puts in place of a letter; 0 without such a table.

    It comes with a foundation. Of a few megabytes for one letter a caption with it takes gigabytes.
    """
    normalizer = tokenizer.backend_tokenizer.normalizer
    if not isinstance(normalizer, normalizers.Precompiled):
        return 0
    table = base64.b64decode(json.loads(normalizer.__getstate__())["precompiled_charsmap"])
    num_bytes = int.from_bytes(table[:4], "little")  # of the letters; what they become follows
    return max(map(len, table[4 + num_bytes :].split(b"\0")))


def tokenize(tokenizer: PreTrainedTokenizerBase, captions: list[str], max_tokens: int) -> Tensor:
    """Token ids (B, L), padded and cut to what both tokenizer and text tower can take."""
    with panics_as_errors():  # files of a foundation can make a tokenizer panic over one caption
        encoded = tokenizer(
            captions,
            padding="max_length",
            truncation=True,
            max_length=min(max_tokens, int(tokenizer.model_max_length)),
            return_tensors="pt",
        )
    ids_BL: Tensor = encoded.input_ids
    return ids_BL
