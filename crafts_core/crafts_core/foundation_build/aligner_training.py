"""Tokenizer and image-text aligner (CLIP layout), trained contrastively on public tiles.

Shape letters: B batch, T tokens, D embedding.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, trainers
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from torch.nn import functional
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

from crafts_core.aligner import tokenize
from crafts_core.foundation_build.config import BuildConfig
from crafts_core.foundation_build.public_tiles import PublicTiles

Progress = Callable[[str, int, int], None]
START, END = "<|startoftext|>", "<|endoftext|>"


def train_tokenizer(sentences: Iterable[str], config: BuildConfig) -> CLIPTokenizer:
    """Byte-pair tokenizer in CLIP layout: corpus words become single tokens, any text is accepted.

    The trainer yields only the merges; the alphabet is all bytes, inside and at the end of a word,
    because a trained alphabet would map unseen end letters to the end-of-text token.
    """
    backend = _clip_tokenizer([], config).backend_tokenizer
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer, bpe.pre_tokenizer = backend.normalizer, backend.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        min_frequency=1,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator(sentences, trainer)
    merges = [(left, right) for left, right in json.loads(bpe.to_str())["model"]["merges"]]
    return _clip_tokenizer(merges, config)


def _clip_tokenizer(merges: list[tuple[str, str]], config: BuildConfig) -> CLIPTokenizer:
    alphabet = sorted(ByteLevel.alphabet())
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet)]
    tokens += [*(left + right for left, right in merges), START, END]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(
        vocab=vocabulary, merges=merges, model_max_length=config.max_tokens, pad_token=END
    )


def new_aligner(config: BuildConfig, tokenizer: CLIPTokenizer) -> CLIPModel:
    """A small CLIP whose text tower also serves the generator."""
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.text_width,
        intermediate_size=4 * config.text_width,
        num_hidden_layers=config.text_layers,
        num_attention_heads=4,
        max_position_embeddings=config.max_tokens,
        projection_dim=config.embedding_dim,
        **special,
    )
    vision = CLIPVisionConfig(
        hidden_size=config.vision_width,
        intermediate_size=4 * config.vision_width,
        num_hidden_layers=config.vision_layers,
        num_attention_heads=4,
        image_size=config.tile_px,
        patch_size=8,
        projection_dim=config.embedding_dim,
    )
    clip = CLIPConfig(
        text_config=text.to_dict(),
        vision_config=vision.to_dict(),
        projection_dim=config.embedding_dim,
    )
    return CLIPModel(clip)


def train_aligner(
    tiles: PublicTiles,
    tokenizer: CLIPTokenizer,
    config: BuildConfig,
    *,
    device: torch.device,
    progress: Progress,
) -> CLIPModel:
    """Multi-positive InfoNCE: every pair with the same caption in the batch is a match.

    This batch-coupled loss is allowed here, and only here, because every tile is public.
    """
    torch.manual_seed(config.seed)
    model = new_aligner(config, tokenizer).to(device).train()
    ids_UT = tokenize(tokenizer, list(tiles.captions), config.max_tokens).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=1.5e-3, total_steps=config.aligner_steps, pct_start=0.1
    )
    rng = np.random.default_rng(config.seed)
    for step in range(config.aligner_steps):
        rows = rng.choice(len(tiles.caption_N), config.aligner_batch, replace=False)
        pixels_BCHW = augment(to_pixels(tiles.image_NHWC[rows]), rng).to(device)
        caption_B = torch.from_numpy(tiles.caption_N[rows]).to(device)
        output = model(input_ids=ids_UT[caption_B], pixel_values=pixels_BCHW)
        target_BB = (caption_B[:, None] == caption_B[None, :]).float()
        target_BB = target_BB / target_BB.sum(dim=1, keepdim=True)
        loss = functional.cross_entropy(output.logits_per_image, target_BB)
        loss = loss + functional.cross_entropy(output.logits_per_text, target_BB)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress(f"aligner, loss {loss.item() / 2:.3f}", step + 1, config.aligner_steps)
    return model.eval()


def to_pixels(image_BHWC: np.ndarray) -> Tensor:
    """uint8 tiles to float (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(image_BHWC).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def augment(pixels_BCHW: Tensor, rng: np.random.Generator) -> Tensor:
    """One random flip and quarter turn for the whole batch: tissue has no up."""
    turned = torch.rot90(pixels_BCHW, int(rng.integers(4)), dims=(2, 3))
    return turned.flip(3) if rng.random() < 0.5 else turned


def save_aligner(model: CLIPModel, tokenizer: CLIPTokenizer, out: Path) -> None:
    """CLIP directory in half precision, with how to prepare pixels beside it."""
    model.half().save_pretrained(out)
    model.float()
    tokenizer.save_pretrained(out)
    size = model.config.vision_config.image_size
    preparation = {
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "size": {"height": size, "width": size},
    }
    (out / "preprocessor_config.json").write_text(json.dumps(preparation, indent=2) + "\n")
