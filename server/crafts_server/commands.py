"""What the commands of ``crafts-server`` have in common: options, open homes, printing."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from crafts_server.enrolments import Enrolments
    from crafts_server.home import CoordinatorHome
    from crafts_server.registry import Registry

Home = Annotated[
    Path, typer.Option(envvar="CRAFTS_SERVER_HOME", help="The coordinator's home directory.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
PlanFile = Annotated[Path, typer.Argument(help="A plan.toml.")]
DEFAULT_HOME = Path("coordinator")


@contextlib.contextmanager
def opened_enrolments(home: Path) -> Iterator[tuple["CoordinatorHome", "Enrolments"]]:
    """A coordinator's home and who is enrolled there."""
    from crafts_server.enrolments import Enrolments
    from crafts_server.home import CoordinatorHome

    opened = CoordinatorHome.open(home)
    with opened.registry() as registry:
        yield opened, Enrolments(registry)


def opened_registry(home: Path) -> "Registry":
    """A home's registry, for ``with``."""
    from crafts_server.home import CoordinatorHome

    return CoordinatorHome.open(home).registry()
