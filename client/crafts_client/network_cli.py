"""The commands of ``crafts-client`` that talk to the coordinator, or get ready for it."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from crafts_client.commands import AsJson, Home
from crafts_client.errors import EnrolmentError
from crafts_client.home import SiteHome
from crafts_core.command_line import (
    agrees,
    confirm,
    one_line_errors,
    run_as_service,
    say,
    say_done,
)

network_app = typer.Typer()
REVOKED = 3
"""Exit code of ``join``: to start it again does not help."""
_ONCE_MORE = (
    "ends when the round that has begun is answered; Ctrl-C once more ends now, and the next join "
    "goes on with it"
)


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
    terminal also how far the round is. A round that has begun is answered first; Ctrl-C once more
    ends at once, and so does SIGTERM: the next join goes on with it, and it is charged once.
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
        stop = run_as_service(debug=debug, once_more=_ONCE_MORE)

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
    from crafts_client.running import is_running

    with one_line_errors("crafts-client", advice="with --offline it is not asked"):
        site = SiteHome.open(home)
        if not offline:
            with Registrar(site) as registrar:
                registrar.call("Leave")
        forget_coordinator(site)
    told = "left; tiles and ledger stay here"
    if is_running(site):
        told += "; join ends with its round, or at once if it is ended"
    say_done(told, {"left": True, "told": not offline}, as_json=as_json)


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
