"""``crafts-client foundation``: the public starting point of a study."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from crafts_client.commands import AsJson, Home
from crafts_client.errors import HomeError
from crafts_client.home import SiteHome
from crafts_core.command_line import one_line_errors, progress_bars, say, say_done

foundation_app = typer.Typer(no_args_is_help=True, help="The public starting point of a study.")


@foundation_app.command("fetch")
def foundation_fetch(home: Home = Path("site"), as_json: AsJson = False) -> None:
    """Get the coordinator's foundation, file by file, checked; goes on where it stopped."""
    from crafts_client.foundation_fetch import fetch_foundation

    with one_line_errors("crafts-client"), progress_bars() as progress:
        site = SiteHome.open(home)
        path, manifest = fetch_foundation(site, progress)
    values = {"foundation": str(path), "hash": manifest.hash}
    if as_json:
        say(json.dumps(values))
        return
    say(f'in site.toml, set: foundation = "{path}"')
    if not site.foundation_approvals.has(manifest.hash):
        say(
            "then see crafts-client foundation list, compare the hash with the study's, and run: "
            f"crafts-client foundation approve {manifest.hash}"
        )


@foundation_app.command("list")
def foundation_list(home: Home = Path("site"), as_json: AsJson = False) -> None:
    """The foundations that lie here, and which of them may see this site's tiles."""
    from crafts_client.foundations import foundations_here

    with one_line_errors("crafts-client"):
        told: list[dict[str, Any]] = [
            {
                "hash": each.manifest.hash,
                "name": each.manifest.name,
                "licence": each.manifest.licence,
                "bytes": each.num_bytes,
                "path": str(each.path),
                "approved": each.is_approved,
                "used": each.is_used,
            }
            for each in foundations_here(SiteHome.open(home))
        ]
    if as_json:
        say(json.dumps(told))
        return
    for each in told:
        verdict = "approved" if each["approved"] else "not approved"
        use = ", in site.toml" if each["used"] else ""
        say(
            f"{each['hash']}  {each['name']}  {each['bytes'] / 2**20:.0f} MiB  {verdict}{use}",
            f"{'':4}{each['licence']}; {each['path']}",
        )


@foundation_app.command("approve")
def foundation_approve(
    foundation_hash: Annotated[
        str, typer.Argument(help="All 64 digits of its hash, as foundation list has them.")
    ],
    home: Home = Path("site"),
    take_back: Annotated[
        bool, typer.Option("--take-back", help="Encode and train nothing with it any more.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Let a foundation encode this site's tiles and train, exactly as it lies here."""
    from crafts_client.approvals import is_embedded
    from crafts_client.foundations import foundation_here

    with one_line_errors("crafts-client"):
        site = SiteHome.open(home)
        found = foundation_here(site, foundation_hash, to_approve=not take_back)
        manifest = found.manifest
        if take_back and is_embedded(manifest.hash):
            raise HomeError(
                f"{manifest.name} is part of the installed package; name another foundation in "
                "site.toml instead"
            )
        if take_back:
            site.foundation_approvals.take_back(manifest.hash)
        else:
            site.foundation_approvals.approve(manifest)
    verdict = "is not approved any more" if take_back else "is approved"
    say_done(
        f"{manifest.name} ({manifest.licence}), {manifest.hash}, {verdict}",
        {"foundation": manifest.hash, "approved": not take_back},
        as_json=as_json,
    )
