"""Sizes and training lengths of a built foundation."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0)]


class BuildConfig(BaseModel):
    """Everything that decides the result, beside the tiles."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    seed: Annotated[int, Field(ge=0)] = 20261128
    tile_px: Count = 128
    mpp: Annotated[float, Field(gt=0)] = 1.0
    num_regions: Count = 480
    """Drawn regions, of the types that no open case shows."""
    region_tiles: Count = 2
    """A region is region_tiles x region_tiles tiles of one phenotype and one stain."""
    captions_per_tile: Count = 6
    num_probe: Count = 60
    open_probe: bool = False
    """Held-out tiles in the probe: they are then part of the foundation, pixels and all."""

    structure_seed: Count = 1
    structure_batch: Count = 64
    structure_steps: Count = 1000

    max_tokens: Count = 40
    vocab_size: Count = 1600
    text_width: Count = 128
    text_layers: Count = 2
    vision_width: Count = 128
    vision_layers: Count = 4
    vision_patch_px: Count = 16
    embedding_dim: Count = 64
    aligner_batch: Count = 96
    aligner_steps: Count = 1600

    latent_channels: Count = 8
    vae_channels: tuple[int, ...] = (24, 48, 96)
    vae_crop_px: Count = 64
    """The VAE is convolutional: many small crops teach it more than few whole tiles."""
    vae_batch: Count = 16
    vae_steps: Count = 4800
    vae_perceptual: Rate = 0.6
    decoder_steps: Count = 2000

    unet_channels: tuple[int, ...] = (32, 96, 128, 192)
    unet_batch: Count = 32
    unet_steps: Count = 12000
    unet_views: Count = 4
    """Each tile's latent is computed this often, turned and stained anew."""
    latent_aligner_steps: Count = 600
