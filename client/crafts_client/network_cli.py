"""The commands of ``crafts-client`` that talk to the coordinator, or get ready for it."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from crafts_client.errors import EnrolmentError, HomeError
from crafts_client.home import SiteHome
from crafts_core.command_line import (
    agrees,
    confirm,
    one_line_errors,
    progress_bars,
    run_as_service,
    say,
    say_done,
)
from crafts_core.errors import CraftsError
from crafts_core.plan import Plan

network_app = typer.Typer()
plan_app = typer.Typer(no_args_is_help=True, help="What the coordinator asks for.")
foundation_app = typer.Typer(no_args_is_help=True, help="The public starting point of a study.")
network_app.add_typer(plan_app, name="plan")
network_app.add_typer(foundation_app, name="foundation")

Home = Annotated[
    Path, typer.Option("--home", envvar="CRAFTS_SITE_HOME", help="Folder of the site home.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
REVOKED = 3
"""Exit code of ``join``: to start it again does not help."""
PlanHash = Annotated[
    str,
    typer.Argument(help="16 digits or more of its hash, as plan list has them; all 64 to approve."),
]


@network_app.command()
def enroll(
    host: Annotated[str, typer.Argument(help="The coordinator: HOST or HOST:PORT.")],
    token: Annotated[str, typer.Option(help="As crafts-server sites invite printed it.")],
    home: Home = Path("site"),
    yes: Annotated[
        bool,
        typer.Option(
            "--yes", help="Trust its signer at once: both fingerprints are known by another way."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Become a site of a coordinator. Keys are made here; only a signing request leaves.

    Shows two fingerprints to compare by telephone and, if you say that they agree, puts the
    coordinator's signer into the policy. By hand, or later: crafts-client policy trust KEY.
    """
    from crafts_client.enrolment import enrol
    from crafts_client.policy_trust import trust_signer
    from crafts_privacy.signing import fingerprint

    with one_line_errors("crafts-client"):
        site = SiteHome.open(home)
        record = enrol(site, host, token)
        if yes:
            trust_signer(site, record.signer)
    if as_json:
        say(record.model_dump_json())
        return
    say(
        f"enrolled as {record.site}",
        f"authority {record.ca_fingerprint}",
        f"signer    {fingerprint(record.signer)}",
    )
    if not yes and record.signer not in site.policy.allowed_signers:
        say("compare both with crafts-server status of the coordinator, by telephone")
        if not _trusts_now(site, record.signer):
            say(f"when they agree, run: crafts-client policy trust {record.signer}")
            return
    say("next: crafts-client doctor")


def _trusts_now(site: SiteHome, signer: str) -> bool:
    """Ask at a terminal; nobody is trusted where nobody can answer."""
    from crafts_client.policy_trust import trust_signer

    if not agrees("Do both agree?"):
        return False
    with one_line_errors("crafts-client"):
        trust_signer(site, signer)
    return True


@network_app.command()
def join(
    home: Home = Path("site"),
    debug: Annotated[
        bool, typer.Option(help="Log the texts of errors too; they may name files and patients.")
    ] = False,
) -> None:
    """Take part in the coordinator's studies, as the policy allows, until Ctrl-C.

    Says when a round begins, when its answer leaves and what the cohort has spent then; at a
    terminal also how far the round is.
    """
    from crafts_client.round_news import news_at_terminal

    with one_line_errors("crafts-client"), news_at_terminal() as news:
        from crafts_client.agreed_patients import check_agreed
        from crafts_client.answer_times import flush_subnormals
        from crafts_client.client_app import make_client_app
        from crafts_client.enrolment import certificate_of, coordinator_record, end_if_revoked
        from crafts_client.errors import LeftError, RevokedError
        from crafts_client.ledger_witness import witness_at_start, witness_ledger
        from crafts_client.site import Site
        from crafts_client.supernode import join as take_part

        flush_subnormals()
        opened = SiteHome.open(home)
        record = coordinator_record(opened)
        certificate = certificate_of(opened)
        site = Site.open(home, news)  # what is missing is said now, not in the first round
        stop = run_as_service(debug=debug)

        def witness() -> None:
            check_agreed(opened)
            witness_ledger(opened)

        try:
            end_if_revoked(opened, certificate)
            witness_at_start(opened)
            client_app = make_client_app(lambda _: site, witness=witness)
            take_part(opened, record, client_app, stop, lambda: end_if_revoked(opened, certificate))
        except RevokedError as error:
            is_over = isinstance(error, LeftError)
            advice = "" if is_over else "; ask for a new invitation, or run: leave"
            say(f"crafts-client: {error}{advice}", err=True)
            raise typer.Exit(REVOKED) from error
        finally:
            site.close()


@network_app.command()
def declare(home: Home = Path("site"), as_json: AsJson = False) -> None:
    """Tell the coordinator the declared_patients of site.toml, after they have changed.

    They count once its operator has agreed; until then no round is answered. Start `join` again.
    """
    from crafts_client.agreed_patients import declare_patients

    with one_line_errors("crafts-client"):
        site = SiteHome.open(home)
        agreed = declare_patients(site)
    declared, name = site.config.declared_patients, site.config.name
    if as_json:
        say(json.dumps({"declared_patients": declared, "agreed_patients": agreed}))
    elif agreed == declared:
        say(f"{declared} patients are agreed")
    else:
        say(
            f"declared {declared} patients, agreed are {agreed or 'none'}; ask the coordinator "
            f"for: crafts-server sites resize {name} {declared}"
        )


@network_app.command()
def identity(home: Home = Path("site"), as_json: AsJson = False) -> None:
    """Tell the coordinator which key signs for this site, and print its fingerprint.

    `enroll` does the same; a site that enrolled with older software does it once.
    """
    from crafts_client.enrolment import publish_identity

    with one_line_errors("crafts-client"):
        fingerprint = publish_identity(SiteHome.open(home))
    say(json.dumps({"fingerprint": fingerprint}) if as_json else fingerprint)


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
        say(f"{each['hash'][:16]}  {each['study']}  {each['rounds']} rounds  {verdict}")
    say(_next_step(told))


def _next_step(offered: list[dict[str, Any]]) -> str:
    """After a look at the plans: the first that a person here may still say yes to."""
    open_to_us = [each for each in offered if each["hash"] is not None and not each["refused"]]
    for each in open_to_us:
        if not each["approved"]:
            return f"next: crafts-client plan show {each['hash'][:16]}"
    if open_to_us:
        return "next: crafts-client join, if it does not run"
    if offered:
        return "this site takes part in none of them"
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


@network_app.command()
def doctor(home: Home = Path("site"), as_json: AsJson = False) -> None:
    """Check everything that training needs, and say how to mend it; exit 1 if it cannot work."""
    from crafts_client.doctor import Verdict, examine

    findings = []
    with one_line_errors("crafts-client"):
        site = SiteHome.open(home)
        for finding in examine(site):
            findings.append(asdict(finding))
            if not as_json:
                say(f"{finding.verdict:8} {finding.subject:12} {finding.found}")
                if finding.advice:
                    say(f"{'':21} -> {finding.advice}")
    if as_json:
        say(json.dumps(findings))
    if any(finding["verdict"] == Verdict.PROBLEM for finding in findings):
        raise typer.Exit(1)
    if not as_json:
        say("ready; next: crafts-client plan list")


@network_app.command()
def status(home: Home = Path("site"), as_json: AsJson = False) -> None:
    """What this site is part of, whether it is running, and the rounds that it has answered."""
    from crafts_client import unusable
    from crafts_client.enrolment import coordinator_record
    from crafts_client.running import is_running
    from crafts_client.site_certificate import expiry_warning
    from crafts_client.site_ledger import existing_ledger
    from crafts_privacy.ledger import EntryKind

    with one_line_errors("crafts-client"):
        site = SiteHome.open(home)
        try:
            coordinator = coordinator_record(site).fleet_address
        except EnrolmentError:
            coordinator = None
        ledger = existing_ledger(site)
        entries = () if ledger is None else ledger.entries()
        answered = [entry for entry in entries if entry.kind is EntryKind.COMMITTED]
        last = answered[-1] if answered else None
        unusable_total = unusable.total(site.unusable_path)
        values = {
            "site": site.config.name,
            "coordinator": coordinator,
            "running": is_running(site),
            "approved": {key[:16]: each.study for key, each in site.approvals.all().items()},
            "rounds_answered": len(answered),
            "last_round": last and last.round,
            "last_plan": last and last.plan_hash[:16],
            "last_at": last and last.recorded_at.isoformat(),
            "unusable_gradients": unusable_total.gradients,
            "unusable_tiles": unusable_total.tiles,
            "warning": expiry_warning(site) or None,
        }
    if as_json:
        say(json.dumps(values))
        return
    for key, value in values.items():
        say(f"{key:18} {'-' if value in (None, {}) else value}")


@network_app.command()
def leave(
    home: Home = Path("site"),
    offline: Annotated[
        bool, typer.Option("--offline", help="The coordinator is gone; tell it nothing.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: AsJson = False,
) -> None:
    """Leave the coordinator for good: it revokes us, and our keys for it are removed.

    Tiles, ledger, register and outbox stay: what was spent stays spent.
    """
    confirm("Leave for good? To come back takes a new invitation", yes=yes)
    from crafts_client.enrolment import Registrar, forget_coordinator

    with one_line_errors("crafts-client", advice="with --offline it is not asked"):
        site = SiteHome.open(home)
        if not offline:
            with Registrar(site) as registrar:
                registrar.call("Leave")
        forget_coordinator(site)
    say_done(
        "left; tiles and ledger stay here", {"left": True, "told": not offline}, as_json=as_json
    )


@network_app.command()
def dashboard(
    home: Home = Path("site"),
    listen: Annotated[
        str, typer.Option(help="Address; on another than loopback put a TLS proxy before it.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Of the address.")] = 8466,
) -> None:
    """Show cohort, ledger, plans and what left in a browser, until Ctrl-C. Nothing can be changed.

    The link holds a token, which only the owner of the home can read: what it shows is exact.
    """
    with one_line_errors("crafts-client"):
        from crafts_client.dashboard import serve_pages

        serve_pages(SiteHome.open(home), listen=listen, port=port, say=say)
