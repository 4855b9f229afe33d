"""``crafts-server sites``: invite hospitals, see, resize and revoke them."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from crafts_core.command_line import confirm, one_line_errors, say_done
from crafts_server.audit_log import Event
from crafts_server.commands import DEFAULT_HOME, AsJson, Home, opened_enrolments

if TYPE_CHECKING:
    from crafts_server.enrolments import EnrolledSite

sites_app = typer.Typer(no_args_is_help=True, help="Invite hospitals, see and revoke them.")


@sites_app.command("invite")
def sites_invite(
    name: Annotated[str, typer.Argument(help="The site's name: small letters, digits, dashes.")],
    patients: Annotated[
        int,
        typer.Option(min=1, help="As many as it declares in site.toml; another number is refused."),
    ],
    home: Home = DEFAULT_HOME,
    days: Annotated[int, typer.Option(min=1, max=90, help="How long the invitation counts.")] = 7,
    as_json: AsJson = False,
) -> None:
    """Print a one-time token for a hospital. Send it by a way that you trust."""
    from datetime import timedelta

    with one_line_errors("crafts-server"), opened_enrolments(home) as (opened, enrolments):
        replaces = name in enrolments.waiting()
        token = enrolments.invite(name, patients=patients, valid_for=timedelta(days=days))
        opened.audit_log.write(Event.INVITED, site=name, patients=patients, days=days)
        token += f".{opened.pki.enrolment_fingerprint}"
        config = opened.config
    command = f"crafts-client enroll {config.hosts[0]}:{config.enrolment_port} --token {token}"
    say_done(
        (
            *(["an older token of this site counts no more"] if replaces else []),
            f"{name} enrols with {patients} patients within {days} days by:",
            command,
        ),
        {"site": name, "token": token, "command": command},
        as_json=as_json,
    )


@sites_app.command("list")
def sites_list(home: Home = DEFAULT_HOME, as_json: AsJson = False) -> None:
    """Who is enrolled, revoked, or invited."""
    with one_line_errors("crafts-server"), opened_enrolments(home) as (_, enrolments):
        sites, waiting = enrolments.sites(), enrolments.waiting()
        invited = enrolments.sizes.invited()
    lines = [
        f"{site.name}  {'revoked' if site.revoked_at else 'enrolled'}  "
        f"{site.revoked_at or site.enrolled_at:%Y-%m-%d %H:%M}  {site.fingerprint[:16]}  "
        + _patients(site)
        for site in sites
    ]
    lines += [
        f"{name}  invited until {until:%Y-%m-%d %H:%M}  "
        f"{invited.get(name) or 'no number of'} patients"
        for name, until in waiting.items()
    ]
    values = {"sites": [asdict(site) for site in sites], "invited": waiting}
    say_done(lines or ["no sites yet; see crafts-server sites invite"], values, as_json=as_json)


def _patients(site: "EnrolledSite") -> str:
    """What was agreed, and what waits for a word of the operator."""
    text = f"{site.declared_patients or 'no number of'} patients"
    if site.told_patients not in (None, site.declared_patients):
        text += f" (declares {site.told_patients}: sites resize {site.name} {site.told_patients})"
    return text


@sites_app.command("resize")
def sites_resize(
    name: Annotated[str, typer.Argument(help="As `sites list` prints it.")],
    patients: Annotated[int, typer.Argument(min=1, help="The number that the site declares now.")],
    home: Home = DEFAULT_HOME,
    as_json: AsJson = False,
) -> None:
    """Agree to another number of patients, which the site has declared before."""
    with one_line_errors("crafts-server"), opened_enrolments(home) as (opened, enrolments):
        before = enrolments.sizes.resize(name, patients)
        opened.audit_log.write(Event.RESIZED, site=name, patients=patients, before=before)
    say_done(
        f"{name} counts as {patients} patients (before: {before or 'none'})",
        {"site": name, "patients": patients, "before": before},
        as_json=as_json,
    )


@sites_app.command("revoke")
def sites_revoke(
    name: Annotated[str, typer.Argument(help="As `sites list` prints it.")],
    home: Home = DEFAULT_HOME,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: AsJson = False,
) -> None:
    """From now on the site's certificate and node count no more."""
    confirm(f"Revoke {name}? To come back it needs a new invitation", yes=yes)
    with one_line_errors("crafts-server"), opened_enrolments(home) as (opened, enrolments):
        enrolments.revoke(name)
        opened.audit_log.write(Event.REVOKED, site=name)
    say_done(f"{name} is revoked", {"revoked": name}, as_json=as_json)
