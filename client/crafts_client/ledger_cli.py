"""The commands of ``crafts-client ledger``: what was spent."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from crafts_client.home import SiteHome
from crafts_client.network_cli import AsJson, Home
from crafts_core.command_line import one_line_errors, print_result

if TYPE_CHECKING:
    from crafts_privacy.ledger import Ledger

ledger_app = typer.Typer(no_args_is_help=True, help="What this site has spent.")


@ledger_app.command("verify")
def ledger_verify(home: Home = Path("site"), as_json: AsJson = False) -> None:
    """Check every entry, the chain and the witness; exit 1 if anything was changed."""
    with one_line_errors("crafts-client"):
        site = SiteHome.open(home)
        head = _ledger(site).verify()
    print_result({"ledger": str(site.ledger_path), "head": str(head.hash), "intact": True}, as_json)


@ledger_app.command("show")
def ledger_show(home: Home = Path("site"), as_json: AsJson = False) -> None:
    """Print every entry, oldest first."""
    with one_line_errors("crafts-client"):
        entries = _ledger(SiteHome.open(home)).entries()
    if as_json:
        typer.echo(json.dumps([asdict(entry) for entry in entries], default=str))
        return
    for entry in entries:
        about = f"run {entry.run_id} round {entry.round} {entry.stage}"
        mechanism = f"{entry.steps} steps, noise {entry.noise_multiplier:g}, rate "
        typer.echo(
            f"{entry.sequence:5d}  {entry.recorded_at:%Y-%m-%d %H:%M:%S}  {entry.kind:9s}  "
            f"{entry.cohort}  {about}: {mechanism}{entry.sample_rate:g}"
        )


@ledger_app.command("export")
def ledger_export(
    out: Annotated[Path, typer.Argument(help="CSV file to write.")],
    home: Home = Path("site"),
    as_json: AsJson = False,
) -> None:
    """Write every entry as CSV, hashes included, for a second party to keep."""
    from crafts_privacy.ledger_export import write_export

    with one_line_errors("crafts-client"):
        entries = _ledger(SiteHome.open(home)).entries()
        write_export(entries, out)
    print_result({"file": str(out), "entries": len(entries)}, as_json)


def _ledger(site: SiteHome) -> "Ledger":
    """The site's ledger, verified; never a new one."""
    from crafts_client.site_ledger import existing_ledger
    from crafts_privacy.ledger import LedgerError

    ledger = existing_ledger(site)
    if ledger is None:
        raise LedgerError(f"no ledger at {site.ledger_path}; nothing was trained here yet")
    return ledger
