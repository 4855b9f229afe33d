"""``crafts``: use a generator. Sample images, measure them, compare two generators."""

import json
import math
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from crafts_core.command_line import one_line_errors, progress_bars
from crafts_core.errors import CraftsError
from crafts_core.plan import MODALITIES, Modality

if TYPE_CHECKING:
    from crafts_core.evaluation.evaluate import Evaluator
    from crafts_core.foundation import Foundation
    from crafts_core.generator import Generator
    from crafts_core.sampling import Control

GeneratorDir = Annotated[
    Path, typer.Argument(exists=True, file_okay=False, help="Exported generator or foundation.")
]
Tiles = Annotated[
    Path, typer.Option(exists=True, file_okay=False, help="Tile store of held-out patients.")
]
FoundationDir = Annotated[
    Path | None, typer.Option(file_okay=False, help="Foundation; the embedded one if not given.")
]
NumImages = Annotated[int, typer.Option(min=16, help="Images drawn from each generator.")]
MaxTiles = Annotated[int, typer.Option(min=16, help="Real tiles used, a random choice.")]
Seed = Annotated[int, typer.Option(min=0, help="Same seed, same images.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help=__doc__,
    # A traceback with local variables would show what must not be shown.
    pretty_exceptions_enable=False,
)


@app.callback()
def main() -> None:
    """Use a generator of synthetic histology: sample, evaluate, compare."""


@app.command()
def sample(
    generator_dir: GeneratorDir,
    prompt: Annotated[list[str], typer.Option("--prompt", "-p", help="Caption; repeat for more.")],
    out: Annotated[Path, typer.Option(help="Folder for the images.")] = Path("samples"),
    num: Annotated[int, typer.Option(min=1, help="Images per prompt.")] = 4,
    seed: Seed = 0,
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Denoising steps.")] = 30,
    guidance: Annotated[float, typer.Option(min=1.0, help="Classifier-free guidance.")] = 3.0,
    control: Annotated[
        str | None, typer.Option(help="What steers beside text: nuclei or fluorescence.")
    ] = None,
    mask: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, help="Numbered nuclei, or fluorescence (PNG, TIFF)."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="Torch device, for example cpu or cuda.")] = "cpu",
    as_json: AsJson = False,
) -> None:
    """Draw images from captions. Every PNG says in its metadata that it is synthetic.

    With --control and --mask the images follow a mask; what was read of it is condition.png.
    """
    if (control is None) != (mask is None):
        raise typer.BadParameter("--control and --mask belong together")
    if control is not None and control not in MODALITIES:
        raise typer.BadParameter(f"--control must be {' or '.join(MODALITIES)}, got {control}")
    if not math.isfinite(guidance):
        raise typer.BadParameter(f"--guidance must be a number from 1 up, got {guidance}")
    with one_line_errors("crafts"):
        files = _sample_to_files(
            generator_dir,
            [text for text in prompt for _ in range(num)],
            out,
            steered_by=next(
                ((each, mask) for each in MODALITIES if each == control and mask), None
            ),
            seed=seed,
            steps=steps,
            guidance=guidance,
            device=device,
            columns=num,
        )
    if as_json:
        typer.echo(json.dumps({"files": [str(path) for path in files]}))
    else:
        typer.echo(f"{len(files) - 1} images and a contact sheet in {out}")


def _sample_to_files(
    generator_dir: Path,
    prompts: list[str],
    out: Path,
    *,
    steered_by: tuple[Modality, Path] | None,
    seed: int,
    steps: int,
    guidance: float,
    device: str,
    columns: int,
) -> list[Path]:
    # Torch and diffusers take seconds to import; `crafts --help` should not.
    from crafts_core.devices import open_device
    from crafts_core.generator import Generator
    from crafts_core.sampling import contact_sheet, sample_images, save_png

    generator = Generator.from_directory(generator_dir, device=open_device(device))
    _tell_what_is_cut(generator, prompts)
    control = None
    if steered_by is not None:
        control = _control(generator_dir, generator, *steered_by, out=out, count=len(prompts))
    with progress_bars() as progress:
        images = sample_images(
            generator,
            prompts,
            control=control,
            num_inference_steps=steps,
            guidance_scale=guidance,
            seed=seed,
            progress=partial(progress, "images"),
        )
    out.mkdir(parents=True, exist_ok=True)
    files = [out / f"tile-{index:04d}.png" for index in range(len(prompts))]
    for image, path, prompt in zip(images, files, prompts, strict=True):
        save_png(image, path, prompt=prompt, origin=generator_dir.resolve().name)
    sheet = out / "sheet.png"
    contact_sheet(images, columns).save(sheet)
    return [*files, sheet]


def _tell_what_is_cut(generator: "Generator", prompts: list[str]) -> None:
    """One line for each prompt that the text encoder does not read to its end."""
    for rest in filter(None, generator.unread(list(dict.fromkeys(prompts)))):
        typer.echo(
            f"crafts: a prompt is longer than the generator reads; left out: {rest!r}", err=True
        )


def _control(
    generator_dir: Path,
    generator: "Generator",
    modality: Modality,
    mask: Path,
    *,
    out: Path,
    count: int,
) -> "Control":
    """The generator's own ControlNet with one mask for all images; ``out`` gets a picture of it."""
    import torch
    from diffusers import ControlNetModel

    from crafts_core.durable import write_file
    from crafts_core.export import CONTROLS
    from crafts_core.pretrained import read_part
    from crafts_core.sampling import Control
    from crafts_core.tiles.conditions import encode_condition, read_condition, to_floats

    directory = generator_dir / CONTROLS / modality
    if not directory.is_dir():
        raise CraftsError(
            f"{generator_dir} has no ControlNet for {modality}: no such stage trained"
        )
    stored_CHW = read_condition(mask, modality, tile_px=generator.tile_px)
    out.mkdir(parents=True, exist_ok=True)
    write_file(out / "condition.png", encode_condition(stored_CHW, modality))
    network = read_part(ControlNetModel, directory, dtype=torch.float32)
    network = network.to(generator.device).eval().requires_grad_(False)
    condition_CHW = torch.from_numpy(to_floats(stored_CHW, modality))
    return Control(network, condition_CHW.expand(count, -1, -1, -1))


@app.command()
def evaluate(
    generator_dir: GeneratorDir,
    tiles: Tiles,
    foundation: FoundationDir = None,
    num: NumImages = 192,
    max_tiles: MaxTiles = 2000,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Measure a generator and its foundation against real tiles that no site trained on."""
    with one_line_errors("crafts"), progress_bars() as progress:
        from crafts_core.generator import Generator

        evaluator, loaded = _evaluator(foundation, tiles, num=num, max_tiles=max_tiles, seed=seed)
        generator = Generator.from_directory(generator_dir)
        result = evaluator.compare(loaded.generator, generator, progress)
    if as_json:
        typer.echo(result.model_dump_json())
        return
    typer.echo(
        f"distance to held-out tiles ({result.metric}, {result.encoder}): "
        f"foundation {result.distance_foundation:.4f}, generator {result.distance_generator:.4f}, "
        f"real against real {result.floor:.4f}\n"
        f"drift: foundation {result.drift_foundation:.3f}, generator {result.drift_generator:.3f}"
    )


@app.command()
def compare(
    generator_dirs: Annotated[
        list[Path],
        typer.Argument(exists=True, file_okay=False, help="Two or more generators."),
    ],
    tiles: Tiles,
    foundation: FoundationDir = None,
    num: NumImages = 192,
    max_tiles: MaxTiles = 2000,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Rank generators by their distance to the same real tiles, nearest first."""
    with one_line_errors("crafts"), progress_bars() as progress:
        from crafts_core.generator import Generator

        evaluator, _ = _evaluator(foundation, tiles, num=num, max_tiles=max_tiles, seed=seed)
        measured = {
            str(path): evaluator.fidelity(Generator.from_directory(path), progress)
            for path in generator_dirs
        }
    if as_json:
        values = {path: fidelity.model_dump(mode="json") for path, fidelity in measured.items()}
        typer.echo(json.dumps(values))
        return
    for path, fidelity in sorted(measured.items(), key=lambda item: item[1].mmd2):
        typer.echo(f"{fidelity.mmd2:.4f}  {path}")


def _evaluator(
    foundation_dir: Path | None, tiles: Path, *, num: int, max_tiles: int, seed: int
) -> "tuple[Evaluator, Foundation]":
    """The held-out tiles of a store, at most ``max_tiles`` of them, as an evaluator."""
    import numpy as np

    from crafts_core.evaluation.evaluate import EvaluationConfig, Evaluator, RealTiles
    from crafts_core.foundation import embedded_path, load
    from crafts_core.tiles import TileStore

    foundation, store = load(foundation_dir or embedded_path()), TileStore.open(tiles)
    if store.tile_px != foundation.manifest.tile_px:
        expected = foundation.manifest.tile_px
        raise CraftsError(f"{tiles}: expected tiles of {expected} px, got {store.tile_px}")
    count = min(max_tiles, store.num_tiles)
    rows = np.sort(np.random.default_rng(seed).choice(store.num_tiles, count, replace=False))
    try:
        return Evaluator(
            foundation,
            RealTiles.read(store, rows),
            EvaluationConfig(num_images=num, seed=seed),
        ), foundation
    except ValueError as error:
        raise CraftsError(f"{tiles}: {error}") from error
