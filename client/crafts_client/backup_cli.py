"""The commands of ``crafts-client`` that copy a home into one file and put it back."""

from pathlib import Path
from typing import Annotated

import typer

from crafts_client.commands import AsJson, Home
from crafts_client.home import SiteHome
from crafts_core.command_line import one_line_errors, print_result, say

backup_app = typer.Typer()


@backup_app.command()
def backup(
    out: Annotated[Path, typer.Argument(dir_okay=False, help="File to write, on another disk.")],
    home: Home = Path("site"),
    without_keys: Annotated[
        bool, typer.Option("--without-keys", help="Leave keys/ and salt out: keep them elsewhere.")
    ] = False,
    tiles: Annotated[
        bool, typer.Option("--tiles", help="With the tiles; else ingest makes them anew.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Copy the home into one file, also while join runs. It is yours alone, and not encrypted."""
    from crafts_client.home_backup import back_up

    with one_line_errors("crafts-client"):
        manifest = back_up(SiteHome.open(home), out, keys=not without_keys, tiles=tiles)
    size_bytes = sum(file.size_bytes for file in manifest.files)
    print_result(
        {
            "file": str(out),
            "files": len(manifest.files),
            "bytes": size_bytes,
            "keys": not without_keys,
            "tiles": tiles,
            "manifest": manifest.hash,
        },
        as_json,
    )


@backup_app.command()
def restore(
    file: Annotated[
        Path, typer.Argument(exists=True, dir_okay=False, help="As crafts-client backup wrote it.")
    ],
    home: Home = Path("site"),
    ledger: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="Newest export of the ledger (.csv): of a witness folder, or ledger export.",
        ),
    ] = None,
    site_key: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="The site.key that signed it, if the backup was made --without-keys.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Put a backup back, into an empty folder. Nothing is trained there before ledger move."""
    from crafts_client.home_backup import put_back

    with one_line_errors("crafts-client"):
        restored = put_back(file, home, newest_ledger=ledger, site_key=site_key)
    made_at = restored.manifest.made_at
    result = {
        "home": str(home),
        "backup_of": made_at.isoformat(timespec="seconds"),
        "ledger_entries": restored.ledger_entries,
        "manifest": restored.manifest.hash,
    }
    print_result(result, as_json)
    if as_json:
        return
    steps = ["crafts-client ledger move (says what was spent since must be known)"]
    if not restored.has_tiles:
        steps.insert(0, "crafts-client ingest TABLE")
    if not restored.has_keys:
        steps.insert(0, "put keys/ and salt back")
    say(
        f"what happened here after {made_at:%Y-%m-%d %H:%M} UTC is not in it: withdraw patients, "
        "take approvals back and tighten the policy again where that was done since",
        f"next: {'; then '.join(steps)}",
    )
