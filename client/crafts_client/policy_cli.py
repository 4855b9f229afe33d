"""``crafts-client policy``: what this site allows."""

from pathlib import Path
from typing import Annotated

import typer

from crafts_client.commands import AsJson, Home
from crafts_client.home import SiteHome
from crafts_core.command_line import confirm, one_line_errors, print_result, say_done

policy_app = typer.Typer(no_args_is_help=True, help="What this site allows.")


@policy_app.command("show")
def policy_show(home: Home = Path("site"), as_json: AsJson = False) -> None:
    """Print every limit of this site."""
    with one_line_errors("crafts-client"):
        policy = SiteHome.open(home).policy
    print_result(policy.model_dump(mode="json"), as_json)


@policy_app.command("trust")
def policy_trust(
    key: Annotated[str, typer.Argument(help="The coordinator's, as you heard it by telephone.")],
    home: Home = Path("site"),
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: AsJson = False,
) -> None:
    """Let plans signed by a coordinator's key be approved here; its fingerprint is shown first."""
    from crafts_client.policy_trust import trust_signer
    from crafts_privacy.signing import fingerprint

    with one_line_errors("crafts-client"):
        site, told = SiteHome.open(home), fingerprint(key)
        confirm(f"Does the coordinator read you {told} as its signer?", yes=yes)
        trust_signer(site, key)
    say_done(
        f"plans signed by {told[:16]} may be approved here; next: crafts-client doctor",
        {"trusted": told},
        as_json=as_json,
    )


@policy_app.command("check")
def policy_check(
    plan: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="A plan.toml.")],
    home: Home = Path("site"),
    as_json: AsJson = False,
) -> None:
    """Say whether this site would take part in a plan; exit 1 if not."""
    from crafts_client.mechanism import mechanisms_of
    from crafts_client.policy import PolicyError
    from crafts_core.plan import Plan, PlanError
    from crafts_privacy.plan_check import noise_problems

    with one_line_errors("crafts-client"):
        site = SiteHome.open(home)
        wanted = Plan.load(plan)
        if problem := next(noise_problems(wanted), None):
            raise PlanError(problem)
        size = site.config.declared_patients
        refused = list(site.policy.violations(wanted, declared_patients=size))
        mechanisms = mechanisms_of(wanted, declared_patients=size)
        for mechanism in mechanisms:
            try:
                site.policy.check_noise(wanted, mechanism)
            except PolicyError as error:
                refused.append(error)
    result = {
        "allowed": not refused,
        "noise_multiplier": mechanisms[0].noise_multiplier,
        "plan_hash": wanted.hash,
        "refused": [str(error) for error in refused],
    }
    print_result(result, as_json)
    if refused:
        raise typer.Exit(1)
