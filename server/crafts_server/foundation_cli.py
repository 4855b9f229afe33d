"""``crafts-server foundation`` and ``pool``: what is public, and where studies start from."""

from pathlib import Path
from typing import Annotated

import typer

from crafts_core.command_line import one_line_errors, progress_bars, say_done
from crafts_server.audit_log import Event
from crafts_server.commands import DEFAULT_HOME, AsJson, Home

foundation_app = typer.Typer(no_args_is_help=True, help="Build, import or verify a foundation.")
pool_app = typer.Typer(no_args_is_help=True, help="Open tiles that plans may pick from.")


@foundation_app.command("build")
def foundation_build(
    out: Annotated[Path, typer.Argument(help="Directory to write; must not exist.")],
    tiles: Annotated[
        Path | None,
        typer.Option(help="Table of open tiles (docs/foundation.md). Without it all is drawn."),
    ] = None,
    name: Annotated[str, typer.Option(help="Name of the foundation.")] = "embedded",
    work: Annotated[
        Path | None,
        typer.Option(help="Keeps what is done, so an interrupted build goes on. OUT.work."),
    ] = None,
    device: Annotated[
        str, typer.Option(help="cpu or cuda; auto takes a GPU if there is.")
    ] = "auto",
    seed: Annotated[int | None, typer.Option(min=0, help="Another seed than the default.")] = None,
    open_probe: Annotated[
        bool,
        typer.Option("--open-probe", help="Up to 40 held-out tiles go into the foundation."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Build a public foundation from open tiles and drawings. No patient, no download."""
    with one_line_errors("crafts-server"):
        import torch

        from crafts_core.foundation_build import BuildConfig, build, read_table

        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        with progress_bars() as report:
            manifest = build(
                out,
                work=work or out.with_name(out.name + ".work"),
                rows=() if tiles is None else read_table(tiles),
                config=BuildConfig(
                    seed=BuildConfig().seed if seed is None else seed, open_probe=open_probe
                ),
                name=name,
                device=device,
                progress=report,
            )
    say_done(
        f"{out}: {manifest.hash}", {"foundation": str(out), "hash": manifest.hash}, as_json=as_json
    )


@foundation_app.command("import")
def foundation_import(
    out: Annotated[Path, typer.Argument(help="Directory to write; must not exist.")],
    diffusers: Annotated[
        Path, typer.Option(help="Local Stable Diffusion 1.5/2.1 or PixArt directory.")
    ],
    name: Annotated[str, typer.Option(help="Name of the foundation.")],
    licence: Annotated[str, typer.Option(help="Licence of the weights.")],
    aligner: Annotated[
        Path | None, typer.Option(help="Local CLIP-layout directory of a frozen aligner.")
    ] = None,
    mpp: Annotated[float, typer.Option(min=0.01, help="Microns per pixel of its tiles.")] = 0.5,
    as_json: AsJson = False,
) -> None:
    """Import local diffusers weights. Safetensors only; pickles are refused."""
    with one_line_errors("crafts-server"):
        from crafts_core.foundation import import_diffusers

        manifest = import_diffusers(
            diffusers, aligner=aligner, out=out, name=name, licence=licence, mpp=mpp
        )
    say_done(
        f"{out}: {manifest.hash}", {"foundation": str(out), "hash": manifest.hash}, as_json=as_json
    )


@foundation_app.command("verify")
def foundation_verify(
    directory: Annotated[
        Path | None, typer.Argument(help="A foundation; the embedded one if not given.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare every file of a foundation with its manifest."""
    from crafts_core.foundation_manifest import embedded_path, verify

    with one_line_errors("crafts-server"):
        manifest = verify(directory or embedded_path())
    say_done(
        f"{manifest.name}: {len(manifest.files)} files as signed off; hash {manifest.hash}",
        {"name": manifest.name, "hash": manifest.hash, "num_files": len(manifest.files)},
        as_json=as_json,
    )


@pool_app.command("add")
def pool_add(
    table: Annotated[
        Path, typer.Argument(help="Table of open images (docs/foundation.md); no private tile.")
    ],
    home: Home = DEFAULT_HOME,
    as_json: AsJson = False,
) -> None:
    """Cut open images into tiles that stage retrieval may pick from; prints the plan's pool."""
    with one_line_errors("crafts-server"):
        from crafts_core.foundation_manifest import read_manifest
        from crafts_core.public_pool import read_pool
        from crafts_server.home import CoordinatorHome

        opened = CoordinatorHome.open(home)
        manifest = read_manifest(opened.foundation_path)
        with progress_bars() as report:
            pool = read_pool(table, tile_px=manifest.tile_px, mpp=manifest.mpp, progress=report)
        pool.keep(opened.pools)
        licences = sorted({each.licence for each in pool.sources})
        num_cases = len({each.case for each in pool.sources})
        facts = {"pool": pool.hash, "tiles": len(pool), "cases": num_cases, "licences": licences}
        opened.audit_log.write(Event.POOLED, **facts)
    say_done(
        (
            f"{len(pool)} tiles of {num_cases} cases, under {'; '.join(licences)}",
            f'for [study] of a plan with stage retrieval: pool = "{pool.hash}"',
        ),
        facts,
        as_json=as_json,
    )
