"""``crafts-client tiles``: look at what ingest made. Numbers and pictures are private."""

import json
import os
import random
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from crafts_client.commands import AsJson, Home
from crafts_client.home import SiteHome
from crafts_core.command_line import (
    confirm,
    one_line_errors,
    print_result,
    progress_bars,
    say,
    say_done,
)

if TYPE_CHECKING:
    from crafts_client.ingest.report import IngestReport

NUM_CORES = (
    len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
)
tiles_app = typer.Typer(no_args_is_help=True, help="Look at the tile store. Nothing leaves.")
_MOST_SHOWN, _TOLD_CAPTIONS = 400, 5
UNUSABLE = (
    "{} tiles cannot be read, or the foundation gives no finite numbers for them: they count as "
    "zero in training; ingest tries them again; where they stay, ask who made the foundation"
)


@tiles_app.command("join")
def tiles_join(
    home: Home = Path("site"),
    processes: Annotated[
        int, typer.Option(min=1, help="Processes that read; all cores if absent.")
    ] = NUM_CORES,
    as_json: AsJson = False,
) -> None:
    """Make what ingest --shard has cut on all machines the store's content, and encode it.

    Killed on the way, the same command goes on.
    """
    from crafts_client.preparation import join_shards, num_unusable_tiles
    from crafts_core.foundation import load

    with one_line_errors("crafts-client"):
        site = SiteHome.open(home)
        with progress_bars() as progress:
            report = join_shards(
                site,
                load(site.foundation_path, device=site.config.device),
                num_processes=processes,
                progress=progress,
            )
        num_unusable = num_unusable_tiles(site)
    if report is None:
        say_done("no shard waits to be joined", {"joined": False}, as_json=as_json)
    else:
        say_ingested(site, report, num_unusable, as_json=as_json)


def say_ingested(
    site: SiteHome, report: "IngestReport", num_unusable: int, *, as_json: bool
) -> None:
    """What became of a table."""
    result = {
        "tiles": report.num_tiles,
        "patients": sum(1 for tiles in report.tiles_per_patient.values() if tiles),
        "already_in_the_store": report.already,
        "skipped": len(report.skipped),
        "unusable_tiles": num_unusable,
        "captions_cut": len(report.cut_captions),
        "report": str(site.ingest_report_path),
        "page": str(site.path / "ingest.html"),
    }
    print_result(result, as_json)
    if as_json:
        return
    say_skipped(report)
    if num_unusable:
        say(UNUSABLE.format(num_unusable))
    for note in report.cut_captions[:_TOLD_CAPTIONS]:
        say(f"cut caption of line {note.line}: the text tower does not read: {note.unread}")
    if len(report.cut_captions) > _TOLD_CAPTIONS:
        say(f"... and {len(report.cut_captions) - _TOLD_CAPTIONS} more, on the page")


def say_skipped(report: "IngestReport") -> None:
    """The sources that gave nothing, and those that a person should look at."""
    for source in report.skipped:
        say(f"skipped line {source.line}: {source.file}: {source.skipped}")
    for source in report.warned:
        say(f"look at line {source.line}: {source.file}: {'; '.join(source.warnings)}")


@tiles_app.command("stats")
def tiles_stats(home: Home = Path("site"), as_json: AsJson = False) -> None:
    """Count tiles by patient and by label."""
    from crafts_core.plan_sections import MODALITIES
    from crafts_core.tiles import TileStore

    with one_line_errors("crafts-client"):
        site = SiteHome.open(home)
        store = TileStore.open(site.tile_store_path)
    rows = range(store.num_tiles)
    steered = {modality: store.has_condition(rows, modality) for modality in MODALITIES}
    per_patient = [len(store.tile_rows_of(index)) for index in range(store.num_patients)]
    labels = [str(label) for label in store.labels]
    values = {
        "tiles": store.num_tiles,
        "patients": store.num_patients,
        "declared_patients": site.config.declared_patients,
        "fewest_tiles_of_a_patient": min(per_patient),
        "most_tiles_of_a_patient": max(per_patient),
        "tile_px": store.tile_px,
        "mpp": store.mpp,
        **{f"tiles_with_{modality}": int(has.sum()) for modality, has in steered.items()},
        **{
            f"patients_with_{modality}": len(set(store.patient_indices(has.nonzero()[0]).tolist()))
            for modality, has in steered.items()
        },
        "tiles_by_label": {label or "-": labels.count(label) for label in sorted(set(labels))},
    }
    if as_json:
        say(json.dumps(values))
        return
    for key, value in values.items():
        say(f"{key:26} {value}")


@tiles_app.command("check")
def tiles_check(
    home: Home = Path("site"),
    repair: Annotated[
        bool,
        typer.Option(
            "--repair", help="Take out what is damaged, so that the next ingest makes it again."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Compare every file of the store and of its latent cache with its hash."""
    if repair:
        _repair(home, as_json)
        return
    from crafts_client.preparation import num_unusable_tiles
    from crafts_core.foundation import verify
    from crafts_core.tiles import TileStore
    from crafts_core.tiles.cache_files import check_cache

    with one_line_errors("crafts-client"):
        site = SiteHome.open(home)
        store = TileStore.open(site.tile_store_path)
        store.verify()
        foundation = verify(site.foundation_path)
        check_cache(store, foundation.hash)
        num_unusable = num_unusable_tiles(site)
    values = {
        "tiles": store.num_tiles,
        "unusable_tiles": num_unusable,
        "index": store.index_hash,
        "foundation": foundation.hash,
    }
    text = f"{store.num_tiles} tiles are as they were written; latents of {foundation.name}"
    say(json.dumps(values) if as_json else text)
    if num_unusable and not as_json:
        say(UNUSABLE.format(num_unusable))


def _repair(home: Path, as_json: bool) -> None:
    from dataclasses import asdict

    from crafts_client.removal import repair

    with one_line_errors("crafts-client"):
        done = repair(SiteHome.open(home))
    if as_json:
        say(json.dumps(asdict(done)))
        return
    for name in done.damaged:
        say(f"damaged: {name}")
    if done.slides:
        say(f"{done.num_tiles} tiles taken out, of: {', '.join(done.slides)}")
    elif done.damaged:
        say("the index is damaged: every slide is cut again")
    if not done.has_latents:
        say("the latent cache was damaged or not finished: it is computed again")
    if done.damaged or not done.has_latents:
        say("now run ingest again with the same table; training waits for it")
    else:
        say("nothing is damaged")


@tiles_app.command("drop")
def tiles_drop(
    file: Annotated[
        Path, typer.Argument(help="The slide's file, or its name in the table of ingest.")
    ],
    home: Home = Path("site"),
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove one slide: its tiles, latents, pictures and report lines. The patient stays.

    A file is known by its content, whatever it is called now.
    """
    from crafts_client.removal import drop, num_tiles_of
    from crafts_core.foundation import load

    with one_line_errors("crafts-client"):
        site = SiteHome.open(home)
        found = num_tiles_of(site, file)
    confirm(f"Remove {found} tiles of {file}, and all else of it?", yes=yes)
    with one_line_errors("crafts-client"), progress_bars() as progress:
        done = drop(
            site, file, lambda: load(site.foundation_path, device=site.config.device), progress
        )
    say_done(
        f"{done.num_tiles} tiles removed; remove its line from your table, or the next ingest "
        "brings it back; restart crafts-client join if it runs",
        {"tiles": done.num_tiles, "to_ingest_again": len(done.others)},
        as_json=as_json,
    )
    if done.others and not as_json:
        say(
            f"{len(done.others)} more images of the patient lay in the same shard: the next ingest "
            "brings them back"
        )


@tiles_app.command("show")
def tiles_show(
    out: Annotated[Path, typer.Argument(help="Picture to write, for example sheet.png.")],
    home: Home = Path("site"),
    number: Annotated[
        int, typer.Option(min=1, max=_MOST_SHOWN, help="Tiles on the sheet, from all patients.")
    ] = 64,
    patient: Annotated[
        str | None, typer.Option(help="One patient's tiles; the name in the table of ingest.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same choice of tiles.")] = 0,
) -> None:
    """Draw a contact sheet of tiles, to see with your own eyes what would train."""
    import math

    import numpy as np

    from crafts_client.ingest.deidentify import Salt
    from crafts_core.sampling import contact_sheet
    from crafts_core.tiles import TileStore, TileStoreError

    with one_line_errors("crafts-client"):
        site = SiteHome.open(home)
        store = TileStore.open(site.tile_store_path)
        rows = list(range(store.num_tiles))
        if patient is not None:
            name = Salt.load(site.salt_path).patient_id(patient)
            if name not in store.patients:
                raise TileStoreError(f"no tile of patient {patient} is in the store")
            rows = store.tile_rows_of(store.patients.index(name)).tolist()
        chosen = sorted(random.Random(seed).sample(rows, min(number, len(rows))))  # noqa: S311
        images_NHWC = store.read_images(np.array(chosen))
        sheet = contact_sheet(images_NHWC, columns=math.ceil(math.sqrt(len(chosen))))
        sheet.save(out)
        out.chmod(0o600)
    say(f"{len(chosen)} of {len(rows)} tiles in {out}; it shows patients, keep it here")


@tiles_app.command("forget")
def tiles_forget(
    patient: Annotated[str, typer.Argument(help="The patient's name in the table of ingest.")],
    home: Home = Path("site"),
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: AsJson = False,
) -> None:
    """Withdraw a patient and remove tiles, latents, pictures and report lines.

    What was spent for the patient stays in the ledger; only the pseudonym is kept, so that the
    patient's slides are never read again.
    """
    with one_line_errors("crafts-client"):
        # Torch is not imported where no disk has room; whoever must forget hears of it in a line.
        from crafts_client.ingest.table_shards import shard_notes
        from crafts_client.removal import forget
        from crafts_core.foundation import load

        site = SiteHome.open(home)
        num_shards = len(shard_notes(site.tile_store_path))
    lost = f", and {num_shards} shards that wait for tiles join are lost" if num_shards else ""
    confirm(f"Remove everything of {patient}{lost}? It cannot be undone", yes=yes)
    with one_line_errors("crafts-client"), progress_bars() as progress:
        num_tiles = forget(
            site,
            patient,
            lambda: load(site.foundation_path, device=site.config.device),
            progress,
        )
    again = f"call {num_shards} shards again, whose tiles are lost; " if num_shards else ""
    say_done(
        f"{num_tiles} tiles removed; {again}remove the patient's lines from your table, and "
        "restart crafts-client join if it runs",
        {"tiles": num_tiles, "shards_lost": num_shards},
        as_json=as_json,
    )
