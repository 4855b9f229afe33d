"""Builds a public foundation from open tissue and drawings: no patient, no download.

``build`` runs the trainings one after the other. Each finished part, and every few minutes the
state of the unfinished one, is kept in a work directory, so an interrupted build goes on:

1. open tiles by a table, measured; drawings of the types that it does not show (``public_tiles``),
2. tokenizer and image-text aligner, contrastively (``aligner_training``),
3. a network that knows tissue by structure (``structure_net``), and the VAE that must keep what it
   sees; then the text-conditioned UNet on the VAE's latents (``diffusion_training``),
4. latent aligner on the UNet's own denoised latents,
5. prompt bank, probe, the gate's correlation range and the card (``assembly``, ``card``).

One seed decides every training: with the same tokenizer, CPU and thread count the same bytes.
"""

from crafts_core.foundation_build.assembly import build
from crafts_core.foundation_build.config import BuildConfig
from crafts_core.foundation_build.tiles_table import read_table

__all__ = ["BuildConfig", "build", "read_table"]
