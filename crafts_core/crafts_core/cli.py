"""``crafts``: use a generator. Sample images, measure them, compare two generators."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from crafts_core.errors import CraftsError

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)


@app.callback()
def main() -> None:
    """Use a generator of synthetic histology: sample, evaluate, compare."""


@app.command()
def sample(
    generator_dir: Annotated[
        Path, typer.Argument(exists=True, file_okay=False, help="Exported generator or foundation.")
    ],
    prompt: Annotated[list[str], typer.Option("--prompt", "-p", help="Caption; repeat for more.")],
    out: Annotated[Path, typer.Option(help="Folder for the images.")] = Path("samples"),
    num: Annotated[int, typer.Option(min=1, help="Images per prompt.")] = 4,
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same images.")] = 0,
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Denoising steps.")] = 30,
    guidance: Annotated[float, typer.Option(min=1.0, help="Classifier-free guidance.")] = 3.0,
    device: Annotated[str, typer.Option(help="Torch device, for example cpu or cuda.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print the files as JSON.")] = False,
) -> None:
    """Draw images from captions. Every PNG says in its metadata that it is synthetic."""
    with _one_line_errors():
        files = _sample_to_files(
            generator_dir,
            [text for text in prompt for _ in range(num)],
            out,
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
    seed: int,
    steps: int,
    guidance: float,
    device: str,
    columns: int,
) -> list[Path]:
    # Torch and diffusers take seconds to import; `crafts --help` should not.
    from crafts_core.generator import Generator
    from crafts_core.sampling import contact_sheet, sample_images, save_png

    if not (generator_dir / "unet").is_dir():
        raise CraftsError(
            f"no generator at {generator_dir}: expected a diffusers directory (unet/)"
        )
    generator = Generator.from_directory(generator_dir, device=device)
    with Progress(console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task("images", total=len(prompts))
        images = sample_images(
            generator,
            prompts,
            num_inference_steps=steps,
            guidance_scale=guidance,
            seed=seed,
            progress=lambda done, _total: bars.update(task, completed=done),
        )
    out.mkdir(parents=True, exist_ok=True)
    files = [out / f"tile-{index:04d}.png" for index in range(len(prompts))]
    for image, path, prompt in zip(images, files, prompts, strict=True):
        save_png(image, path, prompt=prompt, origin=generator_dir.resolve().name)
    sheet = out / "sheet.png"
    contact_sheet(images, columns).save(sheet)
    return [*files, sheet]


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    """Failures that a person can act on: one line on stderr, exit code 1."""
    try:
        yield
    except (CraftsError, OSError) as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        typer.echo(f"crafts: {first_line}", err=True)
        raise typer.Exit(1) from error
