"""``crafts-sim``: see what a federation would give, before anybody joins one."""

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from crafts_core.errors import CraftsError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help=__doc__,
    # A traceback with local variables would show what must not be shown.
    pretty_exceptions_enable=False,
)


@app.callback()
def main() -> None:
    """Simulate hospitals that train one generator together, with the real programs' code."""


@app.command()
def run(
    scenario: Annotated[
        str, typer.Argument(help="Shipped scenario (quickstart, real-tiles) or a TOML file.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for everything; a finished part is kept.")],
    tiles: Annotated[
        Path | None, typer.Option(exists=True, file_okay=False, help="Folder of real tiles.")
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="CSV or TSV: file, patient, label."),
    ] = None,
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
    epsilon: Annotated[
        float | None, typer.Option(min=1e-3, help="Target epsilon of each site's promise.")
    ] = None,
    no_privacy: Annotated[
        bool, typer.Option("--no-privacy", help="Train without noise, as a baseline.")
    ] = False,
    sites: Annotated[int | None, typer.Option(min=1, help="Number of hospitals.")] = None,
    device: Annotated[str, typer.Option(help="Torch device, for example cpu or cuda.")] = "cpu",
    processes: Annotated[int, typer.Option(min=1, help="Slides or tiles read at a time.")] = 2,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Show what goes wrong at a site, with tracebacks.")
    ] = False,
) -> None:
    """Run a scenario from slides to report. Interrupted, the same command goes on."""
    if epsilon is not None and no_privacy:
        raise typer.BadParameter("--epsilon and --no-privacy exclude each other")
    if (tiles is None) != (labels is None):
        raise typer.BadParameter("--tiles and --labels belong together")
    if verbose:
        logging.basicConfig(level=logging.WARNING)
        logging.getLogger("crafts_client").setLevel(logging.DEBUG)
    with _one_line_errors(out):
        # Torch and diffusers take seconds to import; `crafts-sim --help` should not.
        from crafts_client.ingest import TableColumns
        from crafts_simulations.report import headline
        from crafts_simulations.run import run_scenario
        from crafts_simulations.scenario import load_scenario
        from crafts_simulations.sites import TileSource

        wanted = load_scenario(scenario).changed(
            epsilon=epsilon, private=not no_privacy, num_sites=sites
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
        with _Steps() as steps:
            report = run_scenario(
                wanted,
                out,
                source=source,
                device=device,
                num_processes=processes,
                progress=steps.show,
            )
    if as_json:
        typer.echo(report.model_dump_json())
    else:
        typer.echo(headline(report.evaluation))
        typer.echo(f"Report: {out / 'report.html'}")


class _Steps:
    """One bar for what is being done now; nothing where nobody watches."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> "_Steps":
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def show(self, what: str, done: int, total: int) -> None:
        """Move the bar of this step, making it on first sight.

        Steps named "round ..." are passing news and share one bar.
        """
        key = "round" if what.startswith("round ") else what
        if key not in self._tasks:
            self._tasks[key] = self._bars.add_task(what, total=total)
        self._bars.update(self._tasks[key], description=what, completed=done, total=total)


@contextlib.contextmanager
def _one_line_errors(out: Path) -> Iterator[None]:
    """Failures that a person can act on: on stderr, exit code 1. Ctrl-C keeps what is done."""
    try:
        yield
    except CraftsError as error:
        typer.echo(f"crafts-sim: {error}", err=True)
        raise typer.Exit(1) from error
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        typer.echo(
            f"crafts-sim: {error.strerror or error}{where}; what is finished in {out} is kept: "
            "mend it and run the same command again",
            err=True,
        )
        raise typer.Exit(1) from error
    except KeyboardInterrupt as error:
        typer.echo(
            f"crafts-sim: interrupted; run the same command again to go on in {out}", err=True
        )
        raise typer.Exit(1) from error
