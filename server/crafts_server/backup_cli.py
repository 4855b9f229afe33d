"""The commands of ``crafts-server`` that copy a home into one file and put it back."""

from pathlib import Path
from typing import Annotated

import typer

from crafts_core.command_line import one_line_errors, print_result, say
from crafts_server.commands import DEFAULT_HOME, AsJson, Home

backup_app = typer.Typer()


@backup_app.command()
def backup(
    out: Annotated[Path, typer.Argument(dir_okay=False, help="File to write, on another disk.")],
    home: Home = DEFAULT_HOME,
    without_keys: Annotated[
        bool,
        typer.Option("--without-keys", help="Leave signing.key and pki/ out: keep them elsewhere."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Copy the home into one file, also while serve runs. It is yours alone, and not encrypted."""
    from crafts_server.home import SQLITE, CoordinatorHome
    from crafts_server.home_backup import back_up

    with one_line_errors("crafts-server"):
        opened = CoordinatorHome.open(home)
        manifest = back_up(opened, out, keys=not without_keys)
    has_registry = opened.config.registry == SQLITE
    result = {
        "file": str(out),
        "files": len(manifest.files),
        "bytes": sum(file.size_bytes for file in manifest.files),
        "keys": not without_keys,
        "registry": has_registry,
        "manifest": manifest.hash,
    }
    print_result(result, as_json)
    if not has_registry:
        say(
            "crafts-server: the registry is in a database of its own and not in this file; dump it "
            "(pg_dump) before each backup, so that it is never ahead of the checkpoints here",
            err=True,
        )


@backup_app.command()
def restore(
    file: Annotated[
        Path, typer.Argument(exists=True, dir_okay=False, help="As crafts-server backup wrote it.")
    ],
    home: Home = DEFAULT_HOME,
    as_json: AsJson = False,
) -> None:
    """Put a backup back, into an empty folder; the home it was made of must never serve again."""
    from crafts_server.home_backup import put_back

    with one_line_errors("crafts-server"):
        manifest = put_back(file, home)
    made_at = manifest.made_at
    result = {
        "home": str(home),
        "backup_of": made_at.isoformat(timespec="seconds"),
        "manifest": manifest.hash,
    }
    print_result(result, as_json)
    if not as_json:
        say(
            f"what happened after {made_at:%Y-%m-%d %H:%M} UTC is not in it: revoke again whom you "
            "revoked since (crafts-server sites list), and invite anew who enrolled since, which "
            "voids the used token; sites answer no round a second time: of a plan that went on, "
            "sign a new one for what is left",
            "next: crafts-server log verify, then crafts-server serve",
        )
