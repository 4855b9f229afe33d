"""``crafts``: use a generator. Draw images and data sets, measure them, compare generators."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from crafts_core import dataset_cli, sample_cli
from crafts_core.command_line import Version, one_line_errors, progress_bars, say
from crafts_core.errors import CraftsError
from crafts_core.sample_cli import AsJson, Seed

if TYPE_CHECKING:
    from crafts_core.evaluation.evaluate import Evaluator
    from crafts_core.foundation import Foundation

Tiles = Annotated[
    Path, typer.Option(exists=True, file_okay=False, help="Tile store of held-out patients.")
]
FoundationDir = Annotated[
    Path | None, typer.Option(file_okay=False, help="Foundation; the embedded one if not given.")
]
NumImages = Annotated[int, typer.Option(min=16, help="Images drawn from each generator.")]
MaxTiles = Annotated[int, typer.Option(min=16, help="Real tiles used, a random choice.")]
EncoderSpec = Annotated[
    str, typer.Option("--encoder", help="What sees tiles: a name, or a local path.")
]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help=__doc__,
    # A traceback with local variables would show what must not be shown.
    pretty_exceptions_enable=False,
)


@app.callback()
def main(_version: Version = False) -> None:
    """Use a generator of synthetic histology: draw, measure, compare."""


for _command in (
    sample_cli.sample,
    dataset_cli.dataset,
    sample_cli.prompts,
    sample_cli.provenance,
):
    app.command()(_command)


@app.command()
def evaluate(
    tiles: Tiles,
    generator_dir: Annotated[
        Path | None,
        typer.Argument(
            exists=True, file_okay=False, help="Exported generator; not with --validate."
        ),
    ] = None,
    training: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            file_okay=False,
            help="Tile store of patients that were trained on: teaches judges and colour map.",
        ),
    ] = None,
    foundation: FoundationDir = None,
    encoder: EncoderSpec = "embedded",
    num: NumImages = 192,
    max_tiles: MaxTiles = 2000,
    seed: Seed = 0,
    validate: Annotated[
        bool, typer.Option("--validate", help="Judge the encoder itself, on --tiles.")
    ] = False,
    mpp: Annotated[
        float | None, typer.Option(min=0.05, help="With --validate: scale of tiles without one.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure a generator and its foundation against real tiles that no site trained on.

    With --validate: how far the encoder puts real tiles that are recoloured, blurred, shuffled;
    --tiles may then be a folder with a table (docs/encoders.md), and no generator is needed.
    """
    if validate:
        _validate(tiles, encoder, foundation, mpp=mpp, seed=seed, as_json=as_json)
        return
    if generator_dir is None:
        raise typer.BadParameter("expected a generator, or --validate", param_hint="GENERATOR_DIR")
    with one_line_errors("crafts"), progress_bars() as progress:
        from crafts_core.evaluation.table import markdown, remarks
        from crafts_core.generator import Generator

        evaluator, loaded = _evaluator(
            foundation,
            tiles,
            encoder,
            num=num,
            max_tiles=max_tiles,
            seed=seed,
            training=training,
        )
        generator = Generator.from_directory(generator_dir)
        result = evaluator.compare(loaded.generator, generator, progress)
    if as_json:
        say(result.model_dump_json())
        return
    say(*markdown(result).splitlines(), *remarks(result))


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


@app.command()
def compare(
    generator_dirs: Annotated[
        list[Path],
        typer.Argument(exists=True, file_okay=False, help="Two or more generators."),
    ],
    tiles: Tiles,
    foundation: FoundationDir = None,
    encoder: EncoderSpec = "embedded",
    num: NumImages = 192,
    max_tiles: MaxTiles = 2000,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Rank generators by how far their structure is from the same real tiles, nearest first."""
    with one_line_errors("crafts"), progress_bars() as progress:
        from crafts_core.generator import Generator

        evaluator, _ = _evaluator(
            foundation, tiles, encoder, num=num, max_tiles=max_tiles, seed=seed
        )
        measured = {
            str(path): evaluator.fidelity(Generator.from_directory(path), progress)
            for path in generator_dirs
        }
    if as_json:
        values = {path: fidelity.model_dump(mode="json") for path, fidelity in measured.items()}
        say(json.dumps(values))
        return
    say("structure  colour")
    for path, fidelity in sorted(measured.items(), key=lambda item: item[1].structure):
        say(f"{fidelity.structure:9.4f}  {fidelity.colour:6.4f}  {path}  ({fidelity.encoder})")


def _evaluator(
    foundation_dir: Path | None,
    tiles: Path,
    encoder: str,
    *,
    num: int,
    max_tiles: int,
    seed: int,
    training: Path | None = None,
) -> "tuple[Evaluator, Foundation]":
    """The held-out tiles of a store, at most ``max_tiles`` of them, as an evaluator."""
    from crafts_core.evaluation.encoder import load_encoder
    from crafts_core.evaluation.evaluate import EvaluationConfig, Evaluator
    from crafts_core.evaluation.real_tiles import RealTiles, require_others, rows_by_content
    from crafts_core.evaluation.validation import warning_of
    from crafts_core.foundation import embedded_path, load
    from crafts_core.tiles import TileStore

    seen_by = load_encoder(encoder)
    if warning := warning_of(seen_by):
        say(f"crafts: {warning}", err=True)
    foundation = load(foundation_dir or embedded_path())

    def read(path: Path, count: int) -> RealTiles:
        store = TileStore.open(path)
        if store.tile_px != foundation.manifest.tile_px:
            expected = foundation.manifest.tile_px
            raise CraftsError(f"{path}: expected tiles of {expected} px, got {store.tile_px}")
        return RealTiles.read(store, rows_by_content(store, count, seed=seed))

    if training is not None:
        require_others(TileStore.open(training), TileStore.open(tiles))
    config = EvaluationConfig(encoder=encoder, num_images=num, seed=seed)
    try:
        return Evaluator(
            foundation,
            read(tiles, max_tiles),
            config,
            seen_by,
            training=None if training is None else read(training, config.num_training_tiles),
        ), foundation
    except ValueError as error:
        raise CraftsError(f"{tiles}: {error}") from error
