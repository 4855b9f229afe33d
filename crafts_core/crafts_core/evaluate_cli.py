"""``crafts evaluate`` and ``compare``: how near images are to real ones."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import ValidationError

from crafts_core.command_line import one_line_errors, progress_bars, say
from crafts_core.errors import CraftsError
from crafts_core.evaluation.show import Show
from crafts_core.fields import describe_first_error
from crafts_core.sample_cli import (
    AsJson,
    Device,
    Guidance,
    Scheduler,
    Seed,
    Steps,
    checked_config,
)
from crafts_core.sampler_config import SamplerConfig

if TYPE_CHECKING:
    from crafts_core.evaluation.bench import Bench, BenchSettings
    from crafts_core.evaluation.figures import Distances

Real = Annotated[
    Path,
    typer.Option(
        "--real",
        exists=True,
        file_okay=False,
        help="Store, or folder of images, of patients that nobody trained on.",
    ),
]
FoundationDir = Annotated[
    Path | None, typer.Option(file_okay=False, help="Foundation; the embedded one if not given.")
]
NumImages = Annotated[
    int, typer.Option(min=16, max=100_000, help="Images drawn from each generator.")
]
MaxTiles = Annotated[int, typer.Option(min=16, help="Real images, or images of a folder, at most.")]
EncoderSpec = Annotated[
    str, typer.Option("--encoder", help="What sees tiles: a name, or a local path.")
]
Mpp = Annotated[
    float | None,
    typer.Option(min=0.05, max=1000, help="Microns per pixel of images that do not say it."),
]

_DEFAULTS = SamplerConfig()


def evaluate(
    real: Real,
    subject: Annotated[
        Path | None,
        typer.Argument(
            exists=True,
            file_okay=False,
            metavar="GENERATOR|FOLDER",
            help="Exported generator, or folder of images; not with --validate.",
        ),
    ] = None,
    training: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            file_okay=False,
            help="Store or folder of patients that were trained on: teaches judges and colour map.",
        ),
    ] = None,
    foundation: FoundationDir = None,
    encoder: EncoderSpec = "embedded",
    num: NumImages = 192,
    max_tiles: MaxTiles = 2000,
    seed: Seed = 0,
    steps: Steps = _DEFAULTS.num_inference_steps,
    guidance: Guidance = _DEFAULTS.guidance_scale,
    scheduler: Scheduler = _DEFAULTS.scheduler,
    mpp: Mpp = None,
    device: Device = "cpu",
    page: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Also write a page with plots and pictures.")
    ] = None,
    show: Annotated[
        Show,
        typer.Option(
            help="Pictures of the page: generated; beside real ones; each beside the nearest real "
            "one; auto shows real ones only if both are folders."
        ),
    ] = "auto",
    validate: Annotated[
        bool, typer.Option("--validate", help="Judge the encoder itself, on --real.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Measure a generator, or any folder of images, against real tiles that nobody trained on.

    Real images are a site's store, or a folder: images as they lie, or with a table of file,
    patient, caption, label, mpp. A folder needs no site. docs/evaluation.md says what is measured.

    With --validate: how far the encoder puts real tiles that are recoloured, blurred, shuffled;
    --real may then be a folder with a table (docs/encoders.md), and no generator is needed.
    """
    if validate:
        _validate(real, encoder, foundation, mpp=mpp, seed=seed, as_json=as_json)
        return
    if subject is None:
        raise typer.BadParameter(
            "expected a generator or a folder of images, or --validate",
            param_hint="GENERATOR|FOLDER",
        )
    if page is None and show != "auto":
        raise typer.BadParameter("--show goes with --page")
    sampler = checked_config(scheduler, steps, guidance)
    with one_line_errors("crafts"), progress_bars() as progress:
        from crafts_core.evaluation.evaluation_page import evaluate_on
        from crafts_core.evaluation.table import plain_text, remarks

        bench = _bench(
            real,
            [subject],
            _settings(
                encoder=encoder,
                foundation=foundation,
                training=training,
                num=num,
                max_tiles=max_tiles,
                seed=seed,
                sampler=sampler,
                mpp=mpp,
                device=device,
            ),
        )
        result = evaluate_on(bench, subject, page=page, show=show, progress=progress)
    if as_json:
        say(result.model_dump_json())
        return
    say(*plain_text(result), *remarks(result))


def compare(
    subjects: Annotated[
        list[Path],
        typer.Argument(
            exists=True,
            file_okay=False,
            metavar="GENERATOR|FOLDER...",
            help="Two or more generators, or folders of images.",
        ),
    ],
    real: Real,
    foundation: FoundationDir = None,
    encoder: EncoderSpec = "embedded",
    num: NumImages = 192,
    max_tiles: MaxTiles = 2000,
    seed: Seed = 0,
    steps: Steps = _DEFAULTS.num_inference_steps,
    guidance: Guidance = _DEFAULTS.guidance_scale,
    scheduler: Scheduler = _DEFAULTS.scheduler,
    mpp: Mpp = None,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Rank generators by how far their structure is from the same real tiles, nearest first.

    In brackets 90 % intervals over patients: where two overlap, neither is seen to be nearer. Real
    tiles of other patients stand first: nobody can be nearer than they are.
    """
    sampler = checked_config(scheduler, steps, guidance)
    with one_line_errors("crafts"), progress_bars() as progress:
        settings = _settings(
            encoder=encoder,
            foundation=foundation,
            training=None,
            num=num,
            max_tiles=max_tiles,
            seed=seed,
            sampler=sampler,
            mpp=mpp,
            device=device,
        )
        bench = _bench(real, subjects, settings)
        measured = {str(path): bench.fidelity(path, progress) for path in subjects}
        if as_json:
            values = {path: each.model_dump(mode="json") for path, each in measured.items()}
            say(json.dumps(values))
            return
        floors = bench.evaluator.yardstick.floors()
    rows: list[tuple[str, Distances]] = [("real tiles of other patients", floors)]
    ranked = sorted(measured.items(), key=lambda item: item[1].structure)
    rows += [(f"{path}  ({fidelity.encoder})", fidelity) for path, fidelity in ranked]
    say(f"{'structure':<28}  {'colour':<28}  smaller is nearer")
    for name, each in rows:
        told = [
            f"{value:.4f} ({low:.4f} to {high:.4f})"
            for value, (low, high) in (
                (each.structure, each.structure_interval),
                (each.colour, each.colour_interval),
            )
        ]
        say(f"{told[0]:<28}  {told[1]:<28}  {name}")


def _settings(
    *,
    encoder: str,
    foundation: Path | None,
    training: Path | None,
    num: int,
    max_tiles: int,
    seed: int,
    sampler: SamplerConfig,
    mpp: float | None,
    device: str,
) -> "BenchSettings":
    """Torch and transformers take seconds to import; ``--help`` should not."""
    from crafts_core.evaluation.bench import BenchSettings
    from crafts_core.evaluation.evaluate import EvaluationConfig

    with in_range():
        return BenchSettings(
            config=EvaluationConfig(
                encoder=encoder, num_images=num, seed=seed, **dataclasses.asdict(sampler)
            ),
            foundation=foundation,
            training=training,
            max_tiles=max_tiles,
            mpp=mpp,
            device=device,
        )


@contextmanager
def in_range() -> Iterator[None]:
    """What settings refuse becomes one line.

    Raises:
        CraftsError: says which, and what is expected.
    """
    try:
        yield
    except ValidationError as error:
        raise CraftsError(describe_first_error(error)) from error
    except ValueError as error:
        raise CraftsError(str(error)) from error


def _bench(real: Path, subjects: Sequence[Path], settings: "BenchSettings") -> "Bench":
    """Ready to measure; what speaks against the encoder is told on stderr."""
    from crafts_core.evaluation.bench import Bench
    from crafts_core.evaluation.validation import warning_of

    bench = Bench.open(real, subjects, settings)
    if warning := warning_of(bench.encoder):
        say(f"crafts: {warning}", err=True)
    return bench


def _validate(
    tiles: Path,
    encoder: str,
    foundation: Path | None,
    *,
    mpp: float | None,
    seed: int,
    as_json: bool,
) -> None:
    with one_line_errors("crafts"), progress_bars() as progress:
        from crafts_core.evaluation.validation import ValidationConfig
        from crafts_core.evaluation.validation_command import table, validate_on

        found = validate_on(
            tiles,
            encoder,
            foundation=foundation,
            mpp=mpp,
            config=ValidationConfig(seed=seed),
            progress=progress,
        )
    say(*([found.model_dump_json()] if as_json else table(found).splitlines()))
