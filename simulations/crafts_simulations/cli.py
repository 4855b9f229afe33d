"""``crafts-sim``: see what a federation would give, before anybody joins one."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from crafts_core.command_line import Version, one_line_errors, progress_bars, say
from crafts_simulations.logs import show_what_goes_wrong

app = typer.Typer(
    no_args_is_help=True,
    help=__doc__,
    # A traceback with local variables would show what must not be shown.
    pretty_exceptions_enable=False,
)


@app.callback()
def main(_version: Version = False) -> None:
    """Simulate hospitals that train one generator together, with the real programs' code."""


ScenarioName = Annotated[
    str,
    typer.Argument(
        help="Shipped scenario (quickstart, real-tiles, many-small, hundred, control) or a TOML "
        "file."
    ),
]
Tiles = Annotated[
    Path | None, typer.Option(exists=True, file_okay=False, help="Folder of real tiles.")
]
Labels = Annotated[
    Path | None,
    typer.Option(exists=True, dir_okay=False, help="CSV or TSV: file, patient, label."),
]
Pool = Annotated[
    Path | None,
    typer.Option(
        exists=True,
        dir_okay=False,
        help="Table of open images that stage retrieval picks from (docs/foundation.md).",
    ),
]
Device = Annotated[str, typer.Option(help="Torch device, for example cpu or cuda.")]


@app.command()
def run(
    scenario: ScenarioName,
    out: Annotated[Path, typer.Option(help="Folder for everything; a finished part is kept.")],
    tiles: Tiles = None,
    labels: Labels = None,
    file_column: Annotated[str | None, typer.Option(help="Column of the tile's file name.")] = None,
    patient_column: Annotated[
        str | None, typer.Option(help="Column that says which patient a tile is of.")
    ] = None,
    label_column: Annotated[
        str | None, typer.Option(help="Column that says what a tile shows.")
    ] = None,
    caption_column: Annotated[
        str | None, typer.Option(help="Column with a free caption, where there is one.")
    ] = None,
    pool: Pool = None,
    epsilon: Annotated[
        float | None, typer.Option(min=1e-3, help="Target epsilon of each site's promise.")
    ] = None,
    no_privacy: Annotated[
        bool, typer.Option("--no-privacy", help="Train without noise, as a baseline.")
    ] = False,
    sites: Annotated[int | None, typer.Option(min=1, help="Number of hospitals.")] = None,
    repeatable: Annotated[
        bool,
        typer.Option("--repeatable", help="Same seed, same bytes, noise included: NOT PRIVATE."),
    ] = False,
    device: Device = "cpu",
    workers: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Processes that read slides, and then train as many hospitals at a time; 0 is "
            "this one alone. Unnamed, two read and this one trains.",
        ),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Train hospitals on Ray: local starts one here, auto or HOST:PORT is a cluster.",
        ),
    ] = None,
    processes: Annotated[
        bool,
        typer.Option("--processes", help="Train with the real programs, on loopback with TLS."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Show what goes wrong at a site, with tracebacks.")
    ] = False,
) -> None:
    """Run a scenario from slides to report. Interrupted, the same command goes on."""
    if epsilon is not None and no_privacy:
        raise typer.BadParameter("--epsilon and --no-privacy exclude each other")
    _check_tiles(tiles, labels)
    if verbose:
        show_what_goes_wrong()
    advice = f"what is finished in {out} is kept: run the same command again to go on"
    with one_line_errors("crafts-sim", advice=advice):
        # Torch and diffusers take seconds to import; `crafts-sim --help` should not.
        from crafts_client.ingest.table import TableColumns
        from crafts_simulations.report import headline
        from crafts_simulations.run import run_scenario
        from crafts_simulations.scenario import load_scenario
        from crafts_simulations.sites import TileSource

        wanted = load_scenario(scenario).changed(
            epsilon=epsilon, private=not no_privacy, num_sites=sites, repeatable=repeatable
        )
        given = {
            "file": file_column,
            "patient": patient_column,
            "label": label_column,
            "caption": caption_column,
        }
        columns = replace(
            TableColumns(), **{key: (name,) for key, name in given.items() if name is not None}
        )
        source = None
        if tiles is not None and labels is not None:
            source = TileSource(folder=tiles, labels=labels, columns=columns)
        with progress_bars() as progress:
            report = run_scenario(
                wanted,
                out,
                source=source,
                pool=pool,
                device=device,
                num_workers=2 if workers is None else workers,
                num_trainers=_num_trainers(workers, ray),
                ray=ray,
                real_processes=processes,
                progress=progress,
            )
    if as_json:
        say(report.model_dump_json())
    else:
        say(headline(report.evaluation))
        say(f"Report: {out / 'report.html'}")


@app.command()
def plan(
    scenario: ScenarioName,
    patients: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Of a site; repeat. Needed where tiles make the sites."),
    ] = None,
    epsilon: Annotated[
        float | None, typer.Option(min=1e-3, help="Target epsilon of each site's promise.")
    ] = None,
    device: Device = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say how large a scenario's noise will be beside a public gradient. Trains nothing."""
    with one_line_errors("crafts-sim"):
        from crafts_simulations.forecast import scenario_forecast

        with progress_bars() as progress:
            found = scenario_forecast(
                scenario, patients or (), epsilon=epsilon, device=device, progress=progress
            )
    say(json.dumps(found.as_json()) if as_json else found.in_words)


@app.command()
def sweep(
    plan: Annotated[
        Path, typer.Argument(exists=True, dir_okay=False, help="TOML: scenario, seeds, arms.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for all runs; a finished one is kept.")],
    tiles: Tiles = None,
    labels: Labels = None,
    pool: Pool = None,
    arm: Annotated[
        list[str] | None,
        typer.Option(help="Run this arm alone; repeat. What else is finished is compared, too."),
    ] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Run this seed alone; repeat.")] = None,
    parallel: Annotated[int, typer.Option(min=1, help="Runs at a time, a process each.")] = 1,
    device: Device = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Run a scenario under arms and seeds, and say what differs. The same command goes on."""
    _check_tiles(tiles, labels)
    advice = f"what is finished in {out} is kept: run the same command again to go on"
    with one_line_errors("crafts-sim", advice=advice):
        from crafts_client.ingest.table import TableColumns
        from crafts_simulations.sites import TileSource
        from crafts_simulations.sweep import load_sweep
        from crafts_simulations.sweep_report import markdown
        from crafts_simulations.sweep_run import run_sweep

        wanted, scenarios = load_sweep(plan)
        source = None
        if tiles is not None and labels is not None:
            source = TileSource(folder=tiles, labels=labels, columns=TableColumns())
        with progress_bars() as progress:
            report = run_sweep(
                wanted,
                scenarios,
                out,
                chosen=wanted.chosen(arm or (), seed or ()),
                source=source,
                pool=pool,
                device=device,
                num_parallel=parallel,
                progress=progress,
            )
    if as_json:
        say(report.model_dump_json())
        return
    for line in [*markdown(report).splitlines(), *report.remarks]:
        say(line)
    say(f"Report: {out / 'sweep.html'}")


def _num_trainers(workers: int | None, ray: str | None) -> int | None:
    """None is as many as Ray has room for."""
    if workers is None:
        return 1 if ray is None else None
    return max(1, workers)


def _check_tiles(tiles: Path | None, labels: Path | None) -> None:
    if (tiles is None) != (labels is None):
        raise typer.BadParameter("--tiles and --labels belong together")


@app.command()
def faults(
    out: Annotated[
        Path, typer.Option(help="Folder for homes and logs; what held in it is not run again.")
    ],
    only: Annotated[
        str, typer.Option(help="Run the faults whose group or name holds this text.")
    ] = "",
    table: Annotated[Path | None, typer.Option(help="Write the table here, as Markdown.")] = None,
    list_only: Annotated[bool, typer.Option("--list", help="Print the faults; run none.")] = False,
) -> None:
    """Make everything go wrong with small studies, and check what must hold; exit 1 if not."""
    with one_line_errors("crafts-sim"):
        from crafts_simulations.faults.matrix import CASES, as_markdown, run_matrix

        cases = [case for case in CASES if only in f"{case.group} {case.fault}"]
        if list_only:
            for case in cases:
                say(f"{case.group:12} {case.fault}")
            return
        outcomes = run_matrix(
            cases,
            out,
            on_outcome=lambda each: say(
                f"{each.verdict:7} {each.seconds:4.0f} s  {each.group:12} {each.fault}: "
                f"{each.observed}"
            ),
        )
        if table is not None:
            table.write_text(as_markdown(outcomes), encoding="utf-8")
    if any(outcome.verdict == "FAILED" for outcome in outcomes):
        raise typer.Exit(1)
