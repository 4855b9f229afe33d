"""Whoever runs a program from a program reads JSON: nearly every command has it."""

import click
import pytest
from typer.main import get_command

from crafts_client.cli import app as client
from crafts_server.cli import app as server

WITHOUT = {
    "join", "serve", "dashboard",  # run until they are stopped
    "ingest", "tiles show", "report",  # their result is a file
    "plan keys",  # prints a document
    "init", "roster approve", "ledger move",  # a person reads and answers
}  # fmt: skip


def leaves(command: click.Command, name: str = "") -> dict[str, click.Command]:
    """Every command that does something, by its words."""
    if not isinstance(command, click.Group):
        return {name: command}
    found = {}
    for word, each in command.commands.items():
        found |= leaves(each, f"{name} {word}".strip())
    return found


@pytest.mark.parametrize("app", [client, server], ids=["client", "server"])
def test_every_command_prints_json_when_asked(app: object) -> None:
    commands = leaves(get_command(app))  # type: ignore[arg-type]
    lacking = {
        name
        for name, command in commands.items()
        if "--json" not in {option for each in command.params for option in each.opts}
    }
    assert lacking <= WITHOUT
    assert len(commands) > 20
