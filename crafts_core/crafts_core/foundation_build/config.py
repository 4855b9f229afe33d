"""Sizes and training lengths of the embedded foundation."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=1)]


class BuildConfig(BaseModel):
    """Everything that decides the result. The defaults made the shipped foundation."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    seed: Annotated[int, Field(ge=0)] = 20261123
    tile_px: Count = 64
    mpp: Annotated[float, Field(gt=0)] = 1.0
    num_regions: Count = 1600
    region_tiles: Count = 4
    """A region is region_tiles x region_tiles tiles of one phenotype and one stain."""
    normal_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.12
    bare_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.25
    """Regions whose caption says only what it is: hospitals often know no more."""
    num_probe: Count = 60

    max_tokens: Count = 32
    vocab_size: Count = 1200
    text_width: Count = 96
    text_layers: Count = 2
    vision_width: Count = 96
    vision_layers: Count = 3
    embedding_dim: Count = 64
    aligner_batch: Count = 128
    aligner_steps: Count = 1500

    latent_channels: Count = 4
    vae_channels: tuple[int, ...] = (24, 48, 64)
    vae_batch: Count = 16
    vae_steps: Count = 3000

    unet_channels: tuple[int, ...] = (32, 96, 128)
    unet_batch: Count = 64
    unet_steps: Count = 3000
    latent_aligner_steps: Count = 500
