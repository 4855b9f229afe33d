"""``crafts evaluate downstream``: what a generator's images add to work on real tiles."""

from pathlib import Path
from typing import Annotated

import typer

from crafts_core.command_line import one_line_errors, progress_bars, say
from crafts_core.evaluate_cli import EncoderSpec, FoundationDir, MaxTiles, Mpp, in_range
from crafts_core.sample_cli import AsJson, Device, Seed


def downstream(
    generator: Annotated[
        Path, typer.Argument(exists=True, file_okay=False, help="Exported generator or foundation.")
    ],
    real: Annotated[
        Path,
        typer.Option(
            exists=True,
            help="Store, folder or table of images, with patients, that no generator trained on.",
        ),
    ],
    against: Annotated[
        list[Path] | None,
        typer.Option(exists=True, file_okay=False, help="Another generator; may be repeated."),
    ] = None,
    foundation: FoundationDir = None,
    encoder: EncoderSpec = "embedded",
    num: Annotated[int, typer.Option(min=4, help="Images drawn of each class.")] = 64,
    seeds: Annotated[int, typer.Option(min=2, max=1000, help="Random splits of the patients.")] = 5,
    pretraining_steps: Annotated[
        int, typer.Option(min=1, help="Batches that each self-supervised network sees.")
    ] = 200,
    max_tiles: MaxTiles = 2000,
    seed: Seed = 0,
    mpp: Mpp = None,
    device: Device = "cpu",
    out: Annotated[
        Path | None,
        typer.Option(
            file_okay=False,
            help="Folder for downstream.html, downstream.json and the images; another run with it "
            "does not draw them again.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Do a generator's images help to classify, retrieve, pretrain and answer questions?

    Real tiles only, images only, and both, with 1, 5, 20 and all patients a class, asked about
    other patients. docs/evaluation.md says how. Minutes for each generator.
    """
    with (
        one_line_errors("crafts", advice="the same command goes on" if out else ""),
        progress_bars() as progress,
    ):
        from crafts_core.durable import write_file
        from crafts_core.evaluation.downstream.measure import (
            DownstreamConfig,
            DownstreamSettings,
            measure_downstream,
        )
        from crafts_core.evaluation.downstream.report import plain_text, remarks, write_page

        with in_range():
            settings = DownstreamSettings(
                config=DownstreamConfig(
                    encoder=encoder,
                    num_images=num,
                    splits=seeds,
                    seed=seed,
                    pretraining_steps=pretraining_steps,
                ),
                foundation=foundation,
                max_tiles=max_tiles,
                mpp=mpp,
                device=device,
                images=None if out is None else out / "images",
            )
        found = measure_downstream([generator, *(against or [])], real, settings, progress)
        if out is not None:
            names = {"subject": generator.resolve().name, "real": real.resolve().name}
            write_page(found, out / "downstream.html", **names)
            write_file(out / "downstream.json", found.model_dump_json(indent=1) + "\n", mode=0o600)
    if as_json:
        say(found.model_dump_json())
        return
    say(*plain_text(found), *remarks(found))
