"""``crafts dataset``: an annotated data set on demand."""

import json
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from crafts_core.command_line import one_line_errors, progress_bars, say
from crafts_core.dataset_plan import PACKED
from crafts_core.image_requests import MAX_IMAGES, checked_number
from crafts_core.sample_cli import (
    GO_ON,
    AsJson,
    BatchSize,
    Compile,
    Device,
    Dtype,
    Guidance,
    Scheduler,
    Seed,
    Steps,
    checked_config,
    open_studio,
)
from crafts_core.sampler_config import SamplerConfig

_DEFAULTS = SamplerConfig()


def dataset(
    out: Annotated[Path, typer.Argument(file_okay=False, help="Folder of the data set.")],
    generator: Annotated[
        Path, typer.Option(exists=True, file_okay=False, help="Exported generator or foundation.")
    ],
    types: Annotated[
        list[str],
        typer.Option(
            help="Codes (LUAD), names, 'normal colon', with commas between; all: every cancer type."
        ),
    ],
    per_type: Annotated[int, typer.Option(min=1, max=MAX_IMAGES, help="Images of each type.")],
    splits: Annotated[
        str, typer.Option(help="Shares of the splits.")
    ] = "train=0.8,validation=0.1,test=0.1",
    layout: Annotated[
        list[str] | None,
        typer.Option(help="webdataset or parquet, beside the image folder; repeat for more."),
    ] = None,
    attributes: Annotated[
        bool, typer.Option(help="Captions say growth pattern, grade, stroma and features.")
    ] = True,
    control: Annotated[
        Literal["nuclei"] | None, typer.Option(help="Steer by masks, and annotate with them.")
    ] = None,
    masks: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="Folder of numbered nuclei (PNG, TIFF)."),
    ] = None,
    seed: Seed = 0,
    steps: Steps = _DEFAULTS.num_inference_steps,
    guidance: Guidance = _DEFAULTS.guidance_scale,
    scheduler: Scheduler = _DEFAULTS.scheduler,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    batch_size: BatchSize = None,
    compile_denoiser: Compile = False,
    as_json: AsJson = False,
) -> None:
    """Draw a data set with labels, captions, splits, a card, and a manifest of hashes.

    With --control nuclei and --masks, each image has its mask: 16-bit PNG and COCO annotations, and
    all images of a mask are in one split. Interrupted or killed, the same command goes on.
    """
    sampler = checked_config(scheduler, steps, guidance)
    if (control is None) != (masks is None):
        raise typer.BadParameter("--control and --masks belong together")
    layouts = [each for each in PACKED if each in (layout or ())]
    if unknown := set(layout or ()) - set(PACKED):
        raise typer.BadParameter(
            f"--layout must be {' or '.join(PACKED)}, beside the image folder that always is "
            f"there; got {unknown.pop()}"
        )
    with one_line_errors("crafts", advice=GO_ON), progress_bars() as progress:
        from crafts_core.dataset import draw_dataset
        from crafts_core.dataset_plan import DatasetConfig, list_masks, read_splits
        from crafts_core.tissue_types import read_types

        config = DatasetConfig(
            labels=tuple(read_types(types)),
            per_type=per_type,
            splits=read_splits(splits),
            with_attributes=attributes,
            seed=seed,
        )
        checked_number(len(config.labels) * per_type)
        steered_by = [] if masks is None else list_masks(masks)
        studio = open_studio(generator, device, dtype, compile_denoiser=compile_denoiser)
        made = draw_dataset(
            studio,
            out,
            config,
            sampler,
            layouts=layouts,
            masks=steered_by,
            batch_size=batch_size,
            progress=partial(progress, "images"),
            warn=lambda line: say(f"crafts: {line}", err=True),
        )
    if as_json:
        say(json.dumps({"path": str(out), "num_images": made.manifest.num_images}))
    else:
        shares = ", ".join(f"{split} {count}" for split, count in made.manifest.num_images.items())
        say(f"{len(made)} images ({shares}) in {out}; {out}/README.md describes them")
