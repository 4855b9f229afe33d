"""Where the four programs begin: a missing extra is one line that says what to install."""

import importlib
import os
import sys
from typing import NamedTuple, NoReturn

from crafts_core.command_line import say
from crafts_core.installing import how_to_install

_OURS = "crafts"


class Program(NamedTuple):
    """A command line, its module, and the extra that it needs."""

    name: str
    module: str
    extra: str


CRAFTS = Program("crafts", "crafts_core.cli", "")
CLIENT = Program("crafts-client", "crafts_client.cli", "client")
SERVER = Program("crafts-server", "crafts_server.cli", "server")
SIMULATIONS = Program("crafts-sim", "crafts_simulations.cli", "simulations")


def run(program: Program) -> None:
    """Run a program with the process's arguments; exits as it does."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # else it tells of what nobody uses
    try:
        importlib.import_module(program.module).app(prog_name=program.name)
    except ModuleNotFoundError as error:
        if (error.name or _OURS).startswith(_OURS):
            raise
        _tell_what_to_install(program, error)


def _tell_what_to_install(program: Program, error: ModuleNotFoundError) -> NoReturn:
    say(
        f"{program.name}: {error.name} is not installed; run: {how_to_install(program.extra)}",
        err=True,
    )
    sys.exit(1)


def crafts() -> None:
    """The program ``crafts``."""
    run(CRAFTS)


def client() -> None:
    """The program ``crafts-client``."""
    run(CLIENT)


def server() -> None:
    """The program ``crafts-server``."""
    run(SERVER)


def simulations() -> None:
    """The program ``crafts-sim``."""
    run(SIMULATIONS)
