"""What all command lines share: progress bars, results, errors as one line, and services."""

import contextlib
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.progress import Progress as Bars

from crafts_core import __version__
from crafts_core.errors import CraftsError
from crafts_core.harmless import MOST_OF_A_SENTENCE, harmless
from crafts_core.progress import Progress


def _print_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"crafts-federated {__version__}")
        raise typer.Exit


Version = Annotated[
    bool,
    typer.Option(
        "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
    ),
]
"""An option of every program."""

_A_LINE_EVERY_S = 30.0
"""In a log, of work that takes longer than that."""


def bars_on_stderr() -> Bars:
    """Bars that are drawn where stderr is a terminal."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    return Bars(*columns, console=console, disable=not console.is_terminal)


@contextlib.contextmanager
def progress_bars() -> Iterator[Progress]:
    """One bar on stderr for each kind of work; where nobody watches, a line now and then."""
    with bars_on_stderr() as bars:
        tasks: dict[str, TaskID] = {}
        told_s = time.monotonic()

        def show(what: str, done: int, total: int) -> None:
            nonlocal told_s
            what = harmless(what, most=MOST_OF_A_SENTENCE)
            if bars.disable and time.monotonic() - told_s > _A_LINE_EVERY_S:
                told_s = time.monotonic()
                say(f"{what}: {done} of {total}", err=True)
            kind = what.partition(",")[0]
            if kind not in tasks:
                tasks[kind] = bars.add_task(what, total=total)
            bars.update(tasks[kind], description=what, completed=done, total=total)

        yield show


def run_as_service(*, debug: bool = False, once_more: str | None = None) -> threading.Event:
    """Log to stderr from now on; the event is set when a person or the system ends the program.

    Args:
        debug: Log details, too.
        once_more: For a program that looks at the event only between long pieces of work which a
            kill cannot harm: what a person is told who asks once. Asked again, or by the system
            (SIGTERM), it ends where it is.
    """
    log_to_stderr("%(asctime)s %(levelname)s %(name)s %(message)s")
    for package in ("crafts_core", "crafts_client", "crafts_server", "crafts_privacy"):
        logging.getLogger(package).setLevel(logging.DEBUG if debug else logging.INFO)
    flower = logging.getLogger("flwr")  # writes each line itself, and again through the root
    flower.handlers.clear()
    flower.setLevel(logging.WARNING)
    stop = threading.Event()

    def end(number: int, _frame: object) -> None:
        if once_more is not None and (stop.is_set() or number == signal.SIGTERM):
            raise SystemExit(0)
        stop.set()  # before anything is said: who reads it may ask again at once
        if once_more is not None:  # not by logging, whose lock may be held where this interrupts
            os.write(2, f"{harmless(once_more)}\n".encode())

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    return stop


def log_to_stderr(line: str) -> None:
    """Log warnings from now on, each as such a line."""
    handler = logging.StreamHandler()
    handler.setFormatter(HarmlessFormat(line))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)


class HarmlessFormat(logging.Formatter):
    """A message is one line whoever wrote it, and no line of a traceback looks like one."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # logging's name
        """Asked for each message, before a traceback is put below it."""
        return harmless(super().formatMessage(record), most=MOST_OF_A_SENTENCE)

    def formatException(self, ei: Any) -> str:  # noqa: N802  # logging's name
        """Asked for each traceback."""
        return "\n".join(f"  | {harmless(x)}" for x in super().formatException(ei).splitlines())


def say(*lines: object, err: bool = False) -> None:
    """Print each as one line, on stdout or stderr. What a program shows goes through here."""
    for line in lines:
        typer.echo(harmless(str(line)), err=err)


def agrees(question: str) -> bool:
    """Whether a person at a terminal says yes; where there is none, nobody does."""
    return sys.stdin.isatty() and typer.confirm(harmless(question))


def confirm(question: str, *, yes: bool, option: str = "--yes") -> None:
    """Ask a person, unless ``yes``, as ``option`` says.

    The program ends with 1 if the answer is no, or none comes.
    """
    if yes:
        return
    try:
        typer.confirm(harmless(question), abort=True)
    except typer.Abort:
        say(f"nothing was done; without a terminal {option} answers", err=True)
        raise


@contextlib.contextmanager
def one_line_errors(program: str, *, advice: str = "") -> Iterator[None]:
    """Failures that a person can act on: one line each on stderr, exit code 1.

    Args:
        program: Begins the line.
        advice: Ends the line after a failure of the machine (a full disk, Ctrl-C).
    """
    advice = advice and f"; {advice}"
    if logging.lastResort is not None:  # where no service logs, warnings reach stderr by this
        logging.lastResort.setFormatter(HarmlessFormat("%(message)s"))
    try:
        yield
    except CraftsError as error:
        _fail(program, error.lines(), error)
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        _fail(program, [f"{error.strerror or error}{where}{advice}"], error)
    except KeyboardInterrupt as error:
        _fail(program, [f"interrupted{advice}"], error)


def print_result(result: dict[str, Any], as_json: bool) -> None:
    """The result on stdout: one JSON object, or one ``name: value`` a line."""
    if as_json:
        say(json.dumps(result))
        return
    for key, value in result.items():
        shown = ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
        say(f"{key.replace('_', ' ')}: {shown}")


def say_done(told: str | Sequence[str], values: object, *, as_json: bool) -> None:
    """What a command has done or found: a sentence or lines for people, values for programs."""
    if as_json:
        say(json.dumps(values, default=str))
    else:
        say(*([told] if isinstance(told, str) else told))


def _fail(program: str, sentences: Sequence[str], cause: BaseException) -> None:
    first, *others = (harmless(sentence, most=MOST_OF_A_SENTENCE) for sentence in sentences)
    say(f"{program}: {first}", *others, err=True)
    raise typer.Exit(1) from cause
