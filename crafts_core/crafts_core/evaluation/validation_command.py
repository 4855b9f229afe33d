"""``crafts evaluate --validate``: an encoder's answers as a table that a person reads."""

from collections.abc import Callable
from pathlib import Path

from crafts_core.errors import CraftsError
from crafts_core.evaluation.baselines import reconstruct
from crafts_core.evaluation.encoder import load_encoder
from crafts_core.evaluation.validation import Validation, ValidationConfig, validate
from crafts_core.evaluation.validation_tiles import read_tiles
from crafts_core.foundation import embedded_path, load


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
            reconstruct=lambda images: reconstruct(public.generator, images),
            progress=progress,
        )
    except ValueError as error:
        raise CraftsError(f"{tiles}: {error}") from error


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
