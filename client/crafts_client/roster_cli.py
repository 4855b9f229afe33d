"""The commands of ``crafts-client roster``: who the other hospitals of a plan's sums are."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from crafts_client.commands import AsJson, Home, PlanHash
from crafts_client.home import SiteHome
from crafts_core.command_line import confirm, one_line_errors, say, say_done
from crafts_core.roster import RosterError

if TYPE_CHECKING:
    from crafts_client.rosters import ShownRoster

roster_app = typer.Typer(
    no_args_is_help=True, help="The hospitals whose patients are added up with ours."
)


@roster_app.command("show")
def roster_show(plan_hash: PlanHash, home: Home = Path("site"), as_json: AsJson = False) -> None:
    """Names, sizes and keys of a plan's hospitals, and the phrase to read to each other."""
    with one_line_errors("crafts-client"):
        shown = _shown(SiteHome.open(home), plan_hash)
    if as_json:
        values = asdict(shown) | {"roster": shown.roster.model_dump(mode="json")}
        say(json.dumps(values | {"phrase": shown.roster.phrase}))
        return
    _print(shown)


@roster_app.command("approve")
def roster_approve(
    plan_hash: PlanHash,
    home: Home = Path("site"),
    phrase: Annotated[
        str | None,
        typer.Option(
            help="What all hospitals have read to each other. Approves the roster of exactly this "
            "phrase and does not ask."
        ),
    ] = None,
    take_back: Annotated[
        bool, typer.Option("--take-back", help="Add to no further sum of this plan.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Let this site's patients be added up with those of exactly these hospitals.

    Asks nothing where policy.toml knows all their fingerprints.
    """
    with one_line_errors("crafts-client"):
        site = SiteHome.open(home)
        if take_back:
            site.roster_approvals.take_back(plan_hash)
            _say_approved("the roster is not approved any more", plan_hash, False, as_json)
            return
        shown = _shown(site, plan_hash, to_approve=True)
        # The coordinator may have another one by now than was shown, and read aloud.
        if phrase is not None and phrase.split() != shown.roster.phrase.split():
            raise RosterError(
                f"the roster is not the one of that phrase; its own is {shown.roster.phrase}: show "
                "it and read it to each other again"
            )
    if not as_json:
        _print(shown)
    if shown.unpinned:
        confirm(
            "Have all these hospitals, each known to you by voice, read this phrase?",
            yes=phrase is not None,
            option="--phrase",
        )
    with one_line_errors("crafts-client"):
        site.roster_approvals.approve(shown.roster)
    _say_approved("the roster is approved", plan_hash, True, as_json)


def _say_approved(told: str, plan_hash: str, is_approved: bool, as_json: bool) -> None:
    say_done(told, {"plan": plan_hash, "approved": is_approved}, as_json=as_json)


def _shown(site: SiteHome, plan_hash: str, *, to_approve: bool = False) -> "ShownRoster":
    from crafts_client.offered_plans import offered_plan
    from crafts_client.rosters import shown_roster

    plan, _ = offered_plan(site, plan_hash, to_approve=to_approve)
    return shown_roster(site, plan)


def _print(shown: "ShownRoster") -> None:
    for line in shown.lines:
        known = f"  {line.known}" if line.known else ""
        say(f"{line.site:24} {line.declared_patients:8} patients  {line.fingerprint}{known}")
    say(f"phrase  {shown.roster.phrase}")
    if shown.epsilon_alone is None:
        say("this hospital adds all the noise of its promise: nothing of that rests on the others")
    else:
        say(
            "if all others worked together against this hospital: epsilon "
            f"{shown.epsilon_alone:.2f} for the whole plan"
        )
    say("approved here" if shown.is_approved else "not approved here yet")
