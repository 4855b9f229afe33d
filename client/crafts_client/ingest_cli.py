"""``crafts-client ingest``: slides become tiles in the store of this site."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from crafts_client.commands import AsJson, Home
from crafts_client.home import SiteHome
from crafts_client.ingest.choices import Artefact, TissueMethod
from crafts_client.tiles_cli import NUM_CORES, say_ingested, say_skipped
from crafts_core.command_line import one_line_errors, print_result, progress_bars, say

if TYPE_CHECKING:
    from crafts_client.preparation import IngestOptions

ingest_app = typer.Typer()


@ingest_app.command()
def ingest(
    table: Annotated[
        Path, typer.Argument(dir_okay=False, help="CSV or TSV: file, patient, label.")
    ],
    home: Home = Path("site"),
    ready_tiles: Annotated[
        bool, typer.Option("--ready-tiles", help="The files are tiles already, not slides.")
    ] = False,
    root: Annotated[
        Path | None, typer.Option(exists=True, help="Folder that file names start from.")
    ] = None,
    max_tiles: Annotated[
        int | None, typer.Option(min=1, help="Most tiles of one slide; all if absent.")
    ] = None,
    tissue: Annotated[
        TissueMethod, typer.Option(help="How tissue is told from glass.")
    ] = TissueMethod.OTSU,
    keep: Annotated[
        list[Artefact] | None,
        typer.Option(help="Do not leave this out, such as a stain in colours of ink; repeat."),
    ] = None,
    names: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="Names to take out of all captions, one a line; kept in the home from now on.",
        ),
    ] = None,
    processes: Annotated[
        int, typer.Option(min=1, help="Processes that read; all cores if absent.")
    ] = NUM_CORES,
    plan_table: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            file_okay=False,
            help="Only write TABLE: a line for each slide below this folder, to fill in.",
        ),
    ] = None,
    images: Annotated[
        bool,
        typer.Option("--images", help="With --plan-table: list plain images (PNG, JPEG) as well."),
    ] = False,
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help="Only cut the I-th of N parts of the table, beside other machines; tiles join "
            "makes them count.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Cut slides (or take ready tiles) into the tile store and fill the latent cache.

    Interrupted, the same command goes on. What is in the store already is not read again; slides
    that are new in the table are added.
    """
    if plan_table is not None:
        _plan_table(table, plan_table, processes, images=images or ready_tiles)
        return
    if images:
        raise typer.BadParameter("--images has no effect without --plan-table")
    if ready_tiles and (keep or max_tiles is not None or tissue is not TissueMethod.OTSU):
        raise typer.BadParameter(
            "--keep, --max-tiles and --tissue are for slides: every ready tile is taken"
        )
    # Torch and diffusers take seconds to import; `crafts-client --help` should not.
    from crafts_client.preparation import (
        IngestOptions,
        keep_names,
        num_unusable_tiles,
        prepare_site,
    )
    from crafts_core.foundation import load

    options = IngestOptions(
        ready_tiles=ready_tiles,
        max_tiles_per_slide=max_tiles,
        tissue=tissue,
        keep=tuple(sorted(set(keep or ()))),
        num_processes=processes,
    )
    if shard is not None:
        if names is not None:
            raise typer.BadParameter(f"--names is of all shards: copy it to {home}/names.txt first")
        _ingest_shard(home, shard, table, root, options, as_json=as_json)
        return
    with one_line_errors("crafts-client"):
        site = SiteHome.open(home)
        foundation = load(site.foundation_path, device=site.config.device)
        if names is not None:
            keep_names(site, names)
        with progress_bars() as progress:
            report = prepare_site(
                site,
                foundation,
                table=table,
                root=root,
                options=options,
                progress=progress,
            )
        num_unusable = num_unusable_tiles(site)
    say_ingested(site, report, num_unusable, as_json=as_json)
    if not as_json:
        is_enrolled = site.coordinator_path.exists()
        say(f"next: crafts-client {'doctor' if is_enrolled else 'enroll HOST --token TOKEN'}")


def _ingest_shard(
    home: Path,
    shard: str,
    table: Path,
    root: Path | None,
    options: "IngestOptions",
    *,
    as_json: bool,
) -> None:
    from crafts_client.ingest.table_shards import TableShard
    from crafts_client.preparation import prepare_shard
    from crafts_core.foundation import load

    try:
        wanted = TableShard.parse(shard)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--shard") from error
    with one_line_errors("crafts-client"), progress_bars() as progress:
        site = SiteHome.open(home)
        report = prepare_shard(
            site,
            load(site.foundation_path, device=site.config.device),
            wanted,
            table=table,
            root=root,
            options=options,
            progress=progress,
        )
    result = {
        "shard": str(wanted),
        "tiles": report.num_tiles,
        "already_in_the_store": report.already,
        "skipped": len(report.skipped),
    }
    print_result(result, as_json)
    if not as_json:
        say_skipped(report)
        say(f"when all {wanted.count} shards are cut: crafts-client tiles join")


def _plan_table(table: Path, folder: Path, processes: int, *, images: bool) -> None:
    from crafts_client.ingest.folder_search import find_slides
    from crafts_client.ingest.table import write_template

    with one_line_errors("crafts-client"):
        with progress_bars() as progress:
            found = find_slides(folder, images=images, num_processes=processes, progress=progress)
        for path, why in found.left_out:
            say(f"left out {path}: {why}", err=True)
        if found.num_images:
            say(f"left out {found.num_images} plain images; --images lists them, too", err=True)
        if found.num_housekeeping:
            say(
                f"left out {found.num_housekeeping} hidden files, recycle bins and the like, and "
                "what is in them",
                err=True,
            )
        write_template(table, found.paths)
    what = "slides and images" if images else "slides"
    if found.left_out:
        say(f"{len(found.left_out)} files or folders were left out, see above", err=True)
    say(
        f"{table}: {len(found.paths)} {what}; fill in patient, and label or caption (mpp only "
        f"where a slide does not know its scale), then run: crafts-client ingest {table}"
    )
