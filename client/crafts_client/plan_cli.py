"""``crafts-client plan``: what the coordinator asks for, and what this site says to it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from crafts_client.commands import AsJson, Home, PlanHash
from crafts_client.errors import EnrolmentError
from crafts_client.home import SiteHome
from crafts_core.command_line import one_line_errors, say, say_done
from crafts_core.errors import CraftsError
from crafts_core.plan import Plan

plan_app = typer.Typer(no_args_is_help=True, help="What the coordinator asks for.")


@plan_app.command("list")
def plan_list(home: Home = Path("site"), as_json: AsJson = False) -> None:
    """The plans that the coordinator signed, and what this site would say to each."""
    from crafts_client.offered_plans import offered_plans

    with one_line_errors("crafts-client"):
        site = SiteHome.open(home)
        approved = site.approvals.all()
        told: list[dict[str, Any]] = [
            {
                "hash": each.plan and each.plan.hash,
                "study": each.plan and each.plan.study.name,
                "rounds": each.plan and each.plan.num_rounds,
                "target_epsilon": each.plan and each.plan.privacy.target_epsilon,
                "epsilon_after": each.epsilon_after,
                "refused": each.refused,
                "remark": each.remark,
                "approved": each.plan is not None and each.plan.hash in approved,
                "finished": each.has_finished,
            }
            for each in offered_plans(site)
        ]
    if as_json:
        say(json.dumps(told))
        return
    open_plan = "not approved yet" if site.policy.require_approval else "allowed"
    for each in told:
        verdict = "; ".join(each["refused"]) or ("approved" if each["approved"] else open_plan)
        if each["hash"] is None:
            say(f"{'unreadable':16}  {verdict}")
            continue
        verdict += f"; {each['remark']}" if each["remark"] else ""
        verdict = "has finished" if each["finished"] else verdict
        say(f"{each['hash'][:16]}  {each['study']}  {each['rounds']} rounds  {verdict}")
    say(_next_step(told))


def _next_step(offered: list[dict[str, Any]]) -> str:
    """After a look at the plans: the first that a person here may still say yes to."""
    to_come = [each for each in offered if not each["finished"]]
    open_to_us = [each for each in to_come if each["hash"] is not None and not each["refused"]]
    for each in open_to_us:
        if not each["approved"]:
            return f"next: crafts-client plan show {each['hash'][:16]}"
    if open_to_us:
        return "next: crafts-client join, if it does not run"
    if to_come:
        return "this site takes part in none of them"
    if offered:
        return "all of them have finished"
    return "the coordinator has no plan yet; ask again with: crafts-client plan list"


@plan_app.command("show")
def plan_show(
    plan_hash: PlanHash,
    home: Home = Path("site"),
    is_timed: Annotated[
        bool,
        typer.Option("--time", help="Say how long rounds take here, by steps on public tiles."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """What a plan asks of this site's patients, in words, and then all of it as JSON.

    With --json stdout is the plan and nothing else; the words are on stderr.
    """
    from crafts_client.offered_plans import offered_plan
    from crafts_client.plan_words import plan_words

    with one_line_errors("crafts-client"):
        site = SiteHome.open(home)
        plan, offered = offered_plan(site, plan_hash)
        words = list(plan_words(site, plan, offered))
        if is_timed and not offered.refused:
            words += _time_here(site, plan)
    say(*words, err=as_json)
    say(*json.dumps(plan.model_dump(mode="json"), indent=1).split("\n"))


def _time_here(site: SiteHome, plan: Plan) -> Iterator[str]:
    """In words; that it could not be timed hides nothing else of the plan."""
    from crafts_client.plan_words import timed_words
    from crafts_client.round_time import time_rounds

    try:
        rounds = time_rounds(site, plan)
    except CraftsError as error:
        yield f"How long a round takes here was not timed: {error}."
        return
    named = [(each.stage.modality or each.stage.name, each.seconds) for each in rounds]
    yield from timed_words(plan, named, site.config.answer_every_s)


@plan_app.command("approve")
def plan_approve(
    plan_hash: PlanHash,
    home: Home = Path("site"),
    take_back: Annotated[
        bool, typer.Option("--take-back", help="Answer no further round of it.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Let this site train a plan once, exactly as `plan show` prints it.

    Approved again once it ran, it may have one run more, within the same target epsilon.
    """
    from crafts_client.offered_plans import offered_plan, runs_so_far

    with one_line_errors("crafts-client"):
        site = SiteHome.open(home)
        if take_back:
            taken = site.approvals.take_back(plan_hash)
            said = {"plan": taken, "approved": False}
            say_done(f"plan {taken[:16]} is not approved any more", said, as_json=as_json)
            return
        plan, offered = offered_plan(site, plan_hash, to_approve=True)
        runs = runs_so_far(site, plan)
        if offered.refused:
            raise EnrolmentError(f"not approved: {'; '.join(offered.refused)}")
        site.approvals.approve(plan, runs_so_far=runs)
    again = f" for one run more, after {runs}" if runs else ""
    if runs and plan.releases:
        again = " again, to go on with its one run"
    say_done(
        f"{plan.study.name} is approved{again}; next: crafts-client join, if it does not run",
        {"plan": plan.hash, "approved": True, "remark": offered.remark},
        as_json=as_json,
    )
    if offered.remark and not as_json:
        say(offered.remark)


@plan_app.command("roster")
def plan_roster(plan_hash: PlanHash, home: Home = Path("site"), as_json: AsJson = False) -> None:
    """Which sites take part, and with how many patients each counts; signed."""
    from crafts_client.agreed_patients import fetch_roster
    from crafts_client.offered_plans import offered_plan

    with one_line_errors("crafts-client"):
        site = SiteHome.open(home)
        plan, _ = offered_plan(site, plan_hash)
        roster = fetch_roster(site, plan.hash)
    if as_json:
        say(roster.to_json())
        return
    total = sum(roster.patients.values())
    for name, patients in roster.patients.items():
        say(f"{name:24} {patients:8} patients  {patients / total:6.1%}")
    say(f"roster {roster.hash}")
