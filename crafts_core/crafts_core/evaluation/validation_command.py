"""``crafts evaluate --validate``: an encoder's answers as a table that a person reads."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from crafts_core.errors import CraftsError
from crafts_core.evaluation.encoder import Images, load_encoder
from crafts_core.evaluation.validation import Validation, ValidationConfig, validate
from crafts_core.evaluation.validation_tiles import read_tiles
from crafts_core.foundation import embedded_path, load
from crafts_core.generator import Generator

_BATCH = 32


def validate_on(
    tiles: Path,
    encoder: str,
    *,
    foundation: Path | None,
    mpp: float | None,
    config: ValidationConfig,
    progress: Callable[[str, int, int], None] | None = None,
) -> Validation:
    """The table of one encoder on tiles of a store or folder, and of a foundation's VAE.

    Raises:
        CraftsError: a part cannot be read, or the tiles are too few or too small.
    """
    public = load(foundation or embedded_path())
    manifest = public.manifest
    real = read_tiles(tiles, mpp=mpp, at_mpp=manifest.mpp, largest_px=manifest.tile_px)
    try:
        return validate(
            load_encoder(encoder),
            real,
            config,
            reconstruct=lambda images: reconstructed(public.generator, images),
            progress=progress,
        )
    except ValueError as error:
        raise CraftsError(f"{tiles}: {error}") from error


def reconstructed(generator: Generator, images_NHWC: Images) -> Images:
    """Images through the VAE and back."""
    found = []
    for start in range(0, len(images_NHWC), _BATCH):
        part = torch.from_numpy(images_NHWC[start : start + _BATCH]).permute(0, 3, 1, 2)
        latents_BCHW = generator.encode_images(part / 127.5 - 1.0)
        decoded_BCHW = (generator.decode_latents(latents_BCHW) + 1.0) * 127.5
        found.append(decoded_BCHW.round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy())
    return np.concatenate(found)


def table(found: Validation) -> str:
    """The answers, one a line, and what they say."""
    lines = [
        f"{found.encoder} ({found.encoder_hash[:12]}), {found.metric}, {found.tiles} tiles of "
        f"{found.patients} patients in {found.classes} classes, {found.tile_px} px at "
        f"{found.mpp:g} microns per pixel",
        f"{'change':<28}{'distance':>10}{'floors':>10}",
    ]
    lines += [
        f"{answer.change:<28}{answer.distance:>10.4f}{answer.floors:>10.1f}"
        for answer in found.answers
    ]
    lines += [f"not to be used as the main figure: {fault}" for fault in found.faults]
    return "\n".join(lines)
