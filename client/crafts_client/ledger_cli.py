"""The commands of ``crafts-client ledger``: what was spent, who else can see it, and where."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from crafts_client.commands import AsJson, Home
from crafts_client.home import SiteHome
from crafts_core.command_line import (
    confirm,
    one_line_errors,
    print_result,
    say,
    say_done,
)

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
    from crafts_privacy.ledger import EntryKind

    with one_line_errors("crafts-client"):
        entries = _ledger(SiteHome.open(home)).entries()
    if as_json:
        say(json.dumps([asdict(entry) for entry in entries], default=str))
        return
    for entry in entries:
        begin = f"{entry.sequence:5d}  {entry.recorded_at:%Y-%m-%d %H:%M:%S}  {entry.kind:9s}"
        if entry.kind is EntryKind.PLACED:
            say(f"{begin}  bound to place {entry.detail}")
            continue
        if entry.kind is EntryKind.RESTORED:
            say(f"{begin}  put back from a backup of {entry.detail}")
            continue
        about = f"run {entry.run_id} round {entry.round} {entry.stage}"
        mechanism = f"{entry.steps} steps, noise {entry.noise_multiplier:g}, rate "
        say(f"{begin}  {entry.cohort}  {about}: {mechanism}{entry.sample_rate:g}")


@ledger_app.command("export")
def ledger_export(
    out: Annotated[Path, typer.Argument(help="File to write: CSV below a signed head.")],
    home: Home = Path("site"),
    as_json: AsJson = False,
) -> None:
    """Write every entry for another hospital, signed with this site's key.

    The other needs the key as well, by another way than the file: tell it by telephone.
    """
    from crafts_client.site_key import signed_head
    from crafts_privacy.ledger_export import write_export

    with one_line_errors("crafts-client"):
        site = SiteHome.open(home)
        ledger = _ledger(site)
        ledger.check_place()  # what a copy has to say is old
        head = signed_head(site, ledger)
        write_export(ledger.entries()[: head.sequence], head, out)
    print_result({"file": str(out), "entries": head.sequence, "key": head.fingerprint}, as_json)


@ledger_app.command("move")
def ledger_move(
    home: Home = Path("site"),
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Let the ledger pay here, after its home was moved, copied or put back from a backup."""
    from crafts_client.home_backup import ask_witnesses

    with one_line_errors("crafts-client"):
        site = SiteHome.open(home)
        ledger = _ledger(site)
        made_at = ledger.restored_from()
        if made_at is not None:
            asked = ask_witnesses(site, ledger)
    if made_at is not None:
        say(
            f"This ledger was put back from a backup of {made_at}. {_who_saw(asked)} You vouch "
            "that no round was answered since then but those that crafts-client ledger show lists "
            "(one that it shows as reserved is spent, answered or not); "
            "if one was, restore again with the newest ledger (crafts-client restore --ledger "
            "FILE), or do not train with this cohort any more."
        )
    say(
        "You vouch that every other copy of this home is gone or will never train again, and that "
        "none answered anything that this ledger does not show. If two "
        "copies answer, each pays with the same budget and patients are promised more than is "
        "kept. This goes into the ledger, for good, and every witness of it will see it."
    )
    confirm("Is this the only copy that is used from now on?", yes=yes)
    with one_line_errors("crafts-client"):
        ledger.move()
    say("the ledger pays here from now on")


@ledger_app.command("witness")
def ledger_witness(
    folder: Annotated[
        Path,
        typer.Argument(exists=True, file_okay=False, help="On a disk or share of its own."),
    ],
    home: Home = Path("site"),
    as_json: AsJson = False,
) -> None:
    """Begin to keep the ledger's signed head in a folder, which then must be there to train."""
    from crafts_client.site_ledger import open_ledger, take_place
    from crafts_client.witness_folders import begin_in_folder

    with one_line_errors("crafts-client"):
        site = SiteHome.open(home)
        ledger = open_ledger(site)
        take_place(site, ledger)
        path = begin_in_folder(site, ledger, folder.resolve())
    folders = [*site.config.witness_folders, str(folder.resolve())]
    say_done(
        f"{path} is written; in site.toml, set: witness_folders = {json.dumps(folders)}",
        {"file": str(path), "witness_folders": folders},
        as_json=as_json,
    )


def _who_saw(asked: list[str]) -> str:
    """What those say who were asked about a ledger that was put back."""
    if asked:
        return f"{', '.join(asked)} saw no more of it."
    return (
        "Nobody was asked whether more was spent: this home names no coordinator and, in "
        "site.toml, no witness_folders; if it had some since, add them and begin again."
    )


def _ledger(site: SiteHome) -> "Ledger":
    """The site's ledger, verified; never a new one."""
    from crafts_client.site_ledger import existing_ledger
    from crafts_privacy.ledger import LedgerError

    ledger = existing_ledger(site)
    if ledger is None:
        raise LedgerError(f"no ledger at {site.ledger_path}; nothing was trained here yet")
    return ledger
