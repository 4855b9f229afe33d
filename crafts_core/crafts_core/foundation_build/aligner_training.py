"""Tokenizer and image-text aligner (CLIP layout), trained contrastively on public tiles.

Shape letters: B batch, T tokens, D embedding.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, trainers
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from torch.nn import functional
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

from crafts_core.aligner import tokenize
from crafts_core.devices import autocast_where_faster
from crafts_core.foundation_build.config import BuildConfig
from crafts_core.foundation_build.public_tiles import PublicTiles
from crafts_core.foundation_build.training import Recipe, Rows, train
from crafts_core.foundation_build.views import other_stains, turned
from crafts_core.pixels import to_pixels

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
        patch_size=config.vision_patch_px,
        projection_dim=config.embedding_dim,
    )
    clip = CLIPConfig(
        text_config=text.to_dict(),
        vision_config=vision.to_dict(),
        projection_dim=config.embedding_dim,
    )
    return CLIPModel(clip)


def train_aligner(
    tiles: PublicTiles, tokenizer: CLIPTokenizer, config: BuildConfig, recipe: Recipe
) -> CLIPModel:
    """Multi-positive InfoNCE: a caption matches every tile of the batch that it is true of.

    This batch-coupled loss is allowed here, and only here, because every tile is public. Stains
    change at every look, so a caption cannot be told by its laboratory.
    """
    torch.manual_seed(recipe.seed)
    model = new_aligner(config, tokenizer).to(recipe.device)
    ids_UT = tokenize(tokenizer, list(tiles.captions), config.max_tokens).to(recipe.device)
    fits_NU = tiles.fits

    def loss_of(rows: Rows, rng: np.random.Generator) -> Tensor:
        pixels_BCHW = other_stains(to_pixels(tiles.image_NHWC[rows]), strength=1.5, grey=0.1)
        caption_B = tiles.caption_NV[rows, rng.integers(config.captions_per_tile, size=len(rows))]
        with autocast_where_faster(recipe.device):
            output = model(
                input_ids=ids_UT[torch.from_numpy(caption_B)],
                pixel_values=turned(pixels_BCHW, rng).to(recipe.device),
            )
        fits_BB = torch.from_numpy(fits_NU[np.ix_(rows, caption_B)]).float().to(recipe.device)
        logits_BB = output.logits_per_image.float()
        return (_spread(logits_BB, fits_BB) + _spread(logits_BB.T, fits_BB.T)) / 2

    train(model, loss_of, len(tiles), recipe)
    return model.eval()


def _spread(logits_BB: Tensor, fits_BB: Tensor) -> Tensor:
    """Cross-entropy against all that fit, each alike."""
    return functional.cross_entropy(logits_BB, fits_BB / fits_BB.sum(dim=1, keepdim=True))


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
