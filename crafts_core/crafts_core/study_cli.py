"""``crafts study``: readers tell real images from synthetic ones."""

import csv
import io
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from crafts_core.command_line import one_line_errors, progress_bars, say
from crafts_core.durable import write_file
from crafts_core.errors import CraftsError
from crafts_core.installing import how_to_install
from crafts_core.sample_cli import AsJson, Seed

if TYPE_CHECKING:
    from crafts_core.study.study_file import StudyFile

_FORMULA = tuple("=+-@\t\r\n＝＋－＠")
"""What spreadsheets take for the beginning of one (CWE-1236)."""
StudyPath = Annotated[
    Path, typer.Argument(exists=True, dir_okay=False, help="File that `create` made.")
]

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def main() -> None:
    """Let readers tell real images from synthetic ones, blinded, on a page of this machine."""


@app.command()
def create(
    out: Annotated[Path, typer.Argument(dir_okay=False, help="File of the study, such as s.db.")],
    synthetic: Annotated[
        Path, typer.Option(exists=True, file_okay=False, help="Folder of synthetic images.")
    ],
    real: Annotated[
        Path, typer.Option(exists=True, file_okay=False, help="Folder of real images.")
    ],
    num: Annotated[int, typer.Option(min=5, max=2000, help="Images of each kind that count.")] = 50,
    readers: Annotated[int, typer.Option(min=1, max=100, help="Readers, a code each.")] = 1,
    calibration: Annotated[
        int, typer.Option(min=0, max=100, help="Images to practise on first, with the truth.")
    ] = 6,
    repeats: Annotated[
        float, typer.Option(min=0, max=0.5, help="Share of images that are shown twice.")
    ] = 0.2,
    ratings: Annotated[
        bool, typer.Option(help="Ask to rate nuclei, architecture, stain and artefacts.")
    ] = True,
    types: Annotated[bool, typer.Option(help="Ask for the tissue type.")] = False,
    fit: Annotated[
        Literal["crop", "scale"] | None,
        typer.Option(help="What to do with images that are larger than the smallest."),
    ] = None,
    name: Annotated[
        str, typer.Option(help="What readers see as the study's name.")
    ] = "Reader study",
    seed: Seed = 0,
) -> None:
    """Make a study: one file that holds images, truth, readers' orders, and later their answers.

    Images are written anew without metadata, in one size and format. Whoever has the file can read
    the truth: it stays with the coordinator, readers get links.
    """
    with one_line_errors("crafts"), extra_is_there(), progress_bars() as progress:
        from crafts_core.study.creation import StudyConfig, create_study
        from crafts_core.study.questions import Questions

        config = StudyConfig(
            name=name,
            per_kind=num,
            calibration=calibration,
            repeats=repeats,
            readers=readers,
            questions=Questions(ratings=ratings, types=types),
            seed=seed,
            fit=fit,
        )
        study = create_study(
            out,
            synthetic,
            real,
            config,
            progress=partial(progress, "images"),
            warn=lambda line: say(f"crafts: {line}", err=True),
        )
        found = study.readers()
        study.close()
    say(f"{num} real and {num} synthetic images, {calibration} to practise on, in {out}")
    say(*(f"reader {reader.number}: code {reader.code}" for reader in found))
    say(f"`crafts study serve {out}` shows it to them")


@app.command()
def serve(
    study: StudyPath,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="On 127.0.0.1; 0 takes a free one.")
    ] = 8765,
) -> None:
    """Show a study to its readers until Ctrl-C; only this machine reaches it.

    Every answer is on disk at once: after an interruption, or a kill, the same command and the same
    link go on at the same image.
    """
    with one_line_errors("crafts"), opened(study) as opened_study:
        from crafts_core.study.serving import link, loopback_socket, server

        with loopback_socket(port) as listening:
            taken = listening.getsockname()[1]
            say(f"anybody with a code: {link(opened_study, taken)}")
            for reader in opened_study.readers():
                position = opened_study.position(reader)
                read = f"{position.done} of {position.total} read"
                say(f"reader {reader.number} ({read}): {link(opened_study, taken, reader)}")
            say("Ctrl-C ends it; nothing is lost", err=True)
            with suppress(KeyboardInterrupt):  # the way to end it
                server(opened_study).run(sockets=[listening])


@app.command()
def export(
    study: StudyPath,
    out: Annotated[Path, typer.Option(dir_okay=False, help="CSV to write.")],
) -> None:
    """Write all answers beside the truth as CSV, a row each; calibration is left out."""
    with one_line_errors("crafts"), opened(study) as opened_study:
        from crafts_core.study.records import Reading

        _refuse_study(study, out)

        rows = [
            {name: _as_text(value) for name, value in asdict(reading).items()}
            for reading in opened_study.readings()
        ]
        table = io.StringIO(newline="")
        writer = csv.DictWriter(table, list(Reading.__dataclass_fields__))
        writer.writeheader()
        writer.writerows(rows)
        write_file(out, table.getvalue(), mode=0o600)  # the truth, as in the study
    say(f"{len(rows)} answers in {out}")


@app.command()
def analyse(
    study: StudyPath,
    page: Annotated[
        Path | None, typer.Option(dir_okay=False, help="HTML page to write, with plots.")
    ] = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Say what the answers mean so far: how well readers tell, and how far they agree."""
    with one_line_errors("crafts"), opened(study) as opened_study:
        from crafts_core.study.analysis import analyse as analysed
        from crafts_core.study.analysis_page import render_page
        from crafts_core.study.verdict import table

        if page is not None:
            _refuse_study(study, page)
        found = analysed(opened_study.info.name, opened_study.readings(), seed=seed)
        if page is not None:
            write_file(page, render_page(found))
    say(*([found.model_dump_json()] if as_json else table(found)))


def _as_text(value: object) -> object:
    """A name that a spreadsheet would run stays a name; numbers are numbers."""
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value


def _refuse_study(study: Path, out: Path) -> None:
    """Answers are nowhere else."""
    if out.exists() and out.samefile(study):
        raise CraftsError(f"{out} is the study itself, with all answers; name another file")


@contextmanager
def opened(path: Path) -> "Iterator[StudyFile]":
    """A study that is closed again."""
    with extra_is_there():
        from crafts_core.study.study_file import StudyFile

        study = StudyFile.open(path)
        try:
            yield study
        finally:
            study.close()


@contextmanager
def extra_is_there() -> Iterator[None]:
    """A library of the extra that is missing becomes one line."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "crafts").startswith("crafts"):
            raise
        raise CraftsError(
            f"{error.name} is not installed; run: {how_to_install('study')}"
        ) from error
