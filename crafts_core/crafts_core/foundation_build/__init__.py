"""Builds the embedded foundation from procedural public histology: no data, no downloads.

``build`` runs the five trainings one after the other, keeps each finished part in a work
directory (so an interrupted build goes on), and writes a foundation directory:

1. render public tiles with exact captions (``public_tiles``),
2. tokenizer and image-text aligner, contrastively (``aligner_training``),
3. VAE, then the text-conditioned UNet on its latents (``diffusion_training``),
4. latent aligner on the UNet's own denoised latents,
5. prompt bank, probe, and the gate's correlation range (``assembly``).

Takes about an hour on two CPU cores and uses a GPU if there is one. One seed decides everything:
on the same machine and thread count it gives the same bytes.
"""

from crafts_core.foundation_build.assembly import build
from crafts_core.foundation_build.config import BuildConfig

__all__ = ["BuildConfig", "build"]
