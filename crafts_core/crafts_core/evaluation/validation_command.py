"""``crafts evaluate --validate``: an encoder's answers as a table that a person reads."""

from pathlib import Path

from crafts_core.errors import CraftsError
from crafts_core.evaluation.baselines import reconstruct
from crafts_core.evaluation.encoder import load_encoder
from crafts_core.evaluation.validation import Answer, Validation, ValidationConfig, validate
from crafts_core.evaluation.validation_tiles import read_tiles
from crafts_core.foundation import embedded_path, load
from crafts_core.progress import Progress


def validate_on(
    tiles: Path,
    encoder: str,
    *,
    foundation: Path | None,
    mpp: float | None,
    config: ValidationConfig,
    progress: Progress | None = None,
) -> Validation:
    """The table of one encoder on tiles of a store or folder, and of a foundation's VAE.

    Raises:
        CraftsError: a part cannot be read, or the tiles are too few or too small.
    """
    public = load(foundation or embedded_path())
    manifest = public.manifest
    real, scale = read_tiles(tiles, mpp=mpp, at_mpp=manifest.mpp, largest_px=manifest.tile_px)
    try:
        return validate(
            load_encoder(encoder),
            real,
            config,
            mpp=scale,
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
        f"in parts of the distance between two patients, {found.two_patients:.3f}; in brackets "
        "90 % intervals over patients",
        f"{'change':<28}{'distance':>10}{'share':>9}{'':<20}{'colours matched':>16}",
    ]
    lines += [_line(answer) for answer in found.answers]
    lines += [f"not to be used as the main figure: {fault}" for fault in found.faults]
    return "\n".join(lines)


def _line(answer: Answer) -> str:
    interval, matched = answer.share_interval, answer.matched_share
    within = "" if interval is None else f" ({interval.low:.1%} to {interval.high:.1%})"
    return (
        f"{answer.change:<28}{answer.distance:>10.4f}{answer.share:>9.1%}{within:<20}"
        f"{'' if matched is None else f'{matched:.1%}':>16}"
    ).rstrip()
