"""What a loss is computed on: tiles, and the random draws that noise them.

Shape letters: B tiles, C H W latent, L tokens, D text width, K anchors.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class TileBatch:
    """Tiles ready for a loss, everything that does not change in training computed once.

    ``tile_embedding_BD`` and ``caption_embedding_BD`` are needed by stage alignment only,
    ``condition_BCHW`` (m, at image resolution) by stage control, ``class_B`` (which of the study's
    captions, or ``alignment.NO_CLASS``) by the contrast of stage alignment.
    ``weight_B`` says how much each tile counts in its patient's mean: it sums to one over a
    patient, and padding weighs zero.
    """

    latents_BCHW: Tensor
    text_BLD: Tensor
    null_text_LD: Tensor
    weight_B: Tensor
    tile_embedding_BD: Tensor | None = None
    caption_embedding_BD: Tensor | None = None
    condition_BCHW: Tensor | None = None
    class_B: Tensor | None = None

    def __len__(self) -> int:
        return self.latents_BCHW.shape[0]

    def repeat(self, draws_per_tile: int) -> "TileBatch":
        """Each tile ``draws_per_tile`` times with its weight divided: J draws, averaged."""
        changes = {
            name: tensor.repeat_interleave(draws_per_tile, dim=0)
            for name, tensor in self._per_tile().items()
        }
        changes["weight_B"] = changes["weight_B"] / draws_per_tile
        return replace(self, **changes)

    def select(self, rows: Tensor) -> "TileBatch":
        """The tiles of some rows."""
        return replace(self, **{name: tensor[rows] for name, tensor in self._per_tile().items()})

    @classmethod
    def cat(cls, batches: Sequence["TileBatch"]) -> "TileBatch":
        """All tiles in order; the weights stay those within each batch."""
        parts = [batch._per_tile() for batch in batches]
        return replace(
            batches[0], **{name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        )

    def to(self, device: torch.device) -> "TileBatch":
        moved = {name: tensor.to(device) for name, tensor in self._per_tile().items()}
        return replace(self, null_text_LD=self.null_text_LD.to(device), **moved)

    def mean(self, loss_B: Tensor) -> Tensor:
        """The patient's loss: the weighted mean over its tiles."""
        return (self.weight_B * loss_B).sum()

    def _per_tile(self) -> Mapping[str, Tensor]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        del values["null_text_LD"]
        return {name: tensor for name, tensor in values.items() if tensor is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Draws:
    """The randomness of one loss evaluation, one row per tile."""

    noise_BCHW: Tensor
    timesteps_B: Tensor
    drop_caption_B: Tensor

    @classmethod
    def cat(cls, draws: Sequence["Draws"]) -> "Draws":
        """All rows in order."""
        return cls(
            **{
                field.name: torch.cat([getattr(each, field.name) for each in draws])
                for field in fields(cls)
            }
        )

    def text(self, batch: TileBatch) -> Tensor:
        """The captions' hidden states, the empty prompt where the caption is dropped."""
        return torch.where(self.drop_caption_B[:, None, None], batch.null_text_LD, batch.text_BLD)


def draw(
    batch: TileBatch, *, num_timesteps: int, caption_dropout: float, generator: torch.Generator
) -> Draws:
    """Noise, uniform timesteps and caption drops for every tile of the batch.

    The numbers come from ``generator``'s device and are then moved, so that a seed on the CPU gives
    the same draws on every machine.
    """
    latents, source = batch.latents_BCHW, generator.device
    count = latents.shape[0]
    noise = torch.randn(latents.shape, generator=generator, device=source)
    timesteps = torch.randint(num_timesteps, (count,), generator=generator, device=source)
    dropped = torch.rand(count, generator=generator, device=source) < caption_dropout
    return Draws(
        noise_BCHW=noise.to(latents.device, latents.dtype),
        timesteps_B=timesteps.to(latents.device),
        drop_caption_B=dropped.to(latents.device),
    )
