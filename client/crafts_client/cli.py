"""``crafts-client``: a hospital's own side. Set up a home, ingest tiles, see policy and budget."""

import json
import math
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from crafts_client.backup_cli import backup_app
from crafts_client.commands import AsJson, Home
from crafts_client.foundation_cli import foundation_app
from crafts_client.home import SiteConfig, SiteHome
from crafts_client.ingest_cli import ingest_app
from crafts_client.ledger_cli import ledger_app
from crafts_client.network_cli import network_app
from crafts_client.plan_cli import plan_app
from crafts_client.policy import Policy
from crafts_client.policy_cli import policy_app
from crafts_client.roster_cli import roster_app
from crafts_client.tiles_cli import tiles_app
from crafts_core.command_line import (
    Version,
    confirm,
    one_line_errors,
    print_result,
    progress_bars,
    say,
    say_done,
)
from crafts_core.durable import write_file

app = typer.Typer(
    no_args_is_help=True,
    help=__doc__,
    # A traceback with local variables would show what must not be shown.
    pretty_exceptions_enable=False,
)
app.add_typer(policy_app, name="policy")
app.add_typer(ledger_app, name="ledger")
app.add_typer(roster_app, name="roster")
app.add_typer(plan_app, name="plan")
app.add_typer(foundation_app, name="foundation")
app.add_typer(network_app)
app.add_typer(ingest_app)
app.add_typer(backup_app)
app.add_typer(tiles_app, name="tiles")


@app.callback()
def main(_version: Version = False) -> None:
    """Take part in a federated study as a hospital. Slides never leave this machine."""
    # Read when grpc is imported. What fails is said in one line; gRPC would add a page of its own.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")


@app.command()
def init(
    name: Annotated[str, typer.Option(help="Public name of the site, like north-clinic.")],
    patients: Annotated[int, typer.Option(min=1, help="Public, rounded size of the cohort.")],
    home: Home = Path("site"),
    cohort: Annotated[str, typer.Option(help="Name of the cohort in the ledger.")] = "main",
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:0.")] = "cpu",
    foundation: Annotated[
        str, typer.Option(help="embedded, or the folder of an imported foundation.")
    ] = "embedded",
    signer: Annotated[
        list[str] | None, typer.Option(help="Public key of a coordinator to trust; repeat.")
    ] = None,
    max_epsilon: Annotated[float, typer.Option(help="Lifetime epsilon of the cohort.")] = 8.0,
    max_delta: Annotated[
        float | None,
        typer.Option(
            help="Delta of the lifetime promise; if absent one in ten times the patients, at most "
            "0.001."
        ),
    ] = None,
) -> None:
    """Make a site home: site.toml, policy.toml with careful limits, and the salt."""
    from crafts_privacy.signing import fingerprint

    with one_line_errors("crafts-client"):
        for key in signer or ():
            fingerprint(key)  # raises over what is no key
        config = _checked(
            SiteConfig,
            name=name,
            cohort=cohort,
            declared_patients=patients,
            device=device,
            foundation=_absolute_foundation(foundation),
            tile_store="tiles",
            microbatch_tiles=64,
        )
        policy = _checked(
            Policy,
            allowed_signers=tuple(signer or ()),
            allowed_stages=("pretraining", "alignment"),
            max_epsilon=max_epsilon,
            max_delta=min(1e-3, 1 / (10 * patients)) if max_delta is None else max_delta,
            lifetime_filters=("sums",),
            min_noise_multiplier=0.3,
            max_sample_rate=0.5,
            min_patients=20,
            max_tiles_per_patient=64,
            max_draws_per_tile=16,
            max_local_steps=200,
            max_rounds=1000,
            max_update_norm=100.0,
            max_adapter_norm=1e6,
            allow_non_private=False,
            require_secure_aggregation=False,
            require_approval=True,
        )
        SiteHome.create(home, config, policy)
    if patients < policy.min_patients:
        say(
            f"{patients} patients are fewer than min_patients of policy.toml "
            f"({policy.min_patients}): as it is, this site refuses every plan",
            err=True,
        )
    approval = "" if foundation == "embedded" else "crafts-client foundation list and approve, and "
    say(f"site home {home}; read policy.toml, then run: {approval}crafts-client ingest TABLE")


@app.command()
def withdraw(
    patient: Annotated[str, typer.Argument(help="The patient's name in the table of ingest.")],
    home: Home = Path("site"),
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: AsJson = False,
) -> None:
    """Leave a patient out from the next round on. What was spent stays in the ledger."""
    confirm(f"Withdraw {patient}? No command takes it back", yes=yes)
    from crafts_client.ingest.deidentify import Salt
    from crafts_client.register import PatientRegister

    with one_line_errors("crafts-client"):
        site = SiteHome.open(home)
        salt = Salt.load(site.salt_path)
        pseudonym = salt.patient_id(patient)
        PatientRegister(site.register_path).withdraw(pseudonym, alike=salt.alike_id(patient))
    say_done(
        "withdrawn: no tile of this patient is read from the next round on",
        {"withdrawn": pseudonym},
        as_json=as_json,
    )


@app.command()
def report(
    home: Home = Path("site"),
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of privacy-report.html and .json; if absent the current one, or the home "
            "with --with-attack."
        ),
    ] = None,
    with_attack: Annotated[
        bool,
        typer.Option(
            "--with-attack",
            help="Add what the newest attack found, without noise: for this hospital only.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write the privacy officer's report; exit 1 if a claim in it is not substantiated."""
    with one_line_errors("crafts-client"):
        from crafts_client.privacy_report import privacy_report, write_privacy_report

        result = privacy_report(SiteHome.open(home), with_attack=with_attack)
        files = write_privacy_report(result, out or (home if with_attack else Path()))
    if as_json:
        say(result.model_dump_json())
    else:
        for line in result.unsubstantiated:
            say(f"NOT SUBSTANTIATED  {line}")
        say(*map(str, files))
    if result.unsubstantiated:
        raise typer.Exit(1)


@app.command()
def budget(
    home: Home = Path("site"),
    plan: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Count what is left in steps of this plan."),
    ] = None,
    also: Annotated[
        list[Path] | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="Exported ledger of another site that has the same patient; repeat.",
        ),
    ] = None,
    also_key: Annotated[
        list[str] | None,
        typer.Option(
            help="Key of that site, as its ledger export prints it and as you heard from it by "
            "telephone; repeat.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print the limit for life, what its filters count, and what is left in steps and plans."""
    if also_key and not also:
        raise typer.BadParameter("--also-key has no effect without --also")
    from crafts_client.budget import budget_of, epsilon_at_all_sites, left_for
    from crafts_client.site_ledger import existing_ledger
    from crafts_privacy.ledger_export import read_export

    with one_line_errors("crafts-client"):
        site = SiteHome.open(home)
        ledger = existing_ledger(site)
        told = budget_of(site)
        for_plan = {} if plan is None else left_for(site, plan)
        exports = [read_export(path, trusted=also_key or ()) for path in also or ()]
    result = told.model_dump() if as_json else dict(told)
    if also:
        with one_line_errors("crafts-client"):
            together = epsilon_at_all_sites(site, ledger, exports)
        result["epsilon_of_a_patient_at_all_sites"] = together if math.isfinite(together) else None
        result["counted_of_other_sites"] = [str(export.head) for export in exports]
    print_result(result | for_plan, as_json)


@app.command()
def attack(
    generator: Annotated[
        Path, typer.Argument(exists=True, file_okay=False, help="Exported generator.")
    ],
    others: Annotated[
        Path,
        typer.Option(
            exists=True,
            file_okay=False,
            help="Tile store of patients of this hospital that it was not trained on.",
        ),
    ],
    home: Home = Path("site"),
    patients: Annotated[int, typer.Option(min=8, help="At most so many on each side.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same choice of tiles.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Ask whether what this site let out tells who was in training. Keep the answer here.

    Attacked are the finished generator and, as whoever saw every round could, all updates that
    left: as many as are kept in the home, and the answer says how many those are.
    """
    from crafts_client.site_attack import attack_site
    from crafts_core.evaluation.leakage import LeakageConfig

    with one_line_errors("crafts-client"), progress_bars() as progress:
        site = SiteHome.open(home)
        config = LeakageConfig(patients=patients, seed=seed)
        result = attack_site(site, generator, others, config, progress)
        write_file(site.leakage_path, result.model_dump_json(indent=1) + "\n", mode=0o600)
    if as_json:
        say(result.model_dump_json())
        return
    say(*result.lines())


@app.command()
def audit(home: Home = Path("site"), as_json: AsJson = False) -> None:
    """Test what trains here; exit 1 if a check fails. Reads no patient and spends no budget.

    First the engine, by canary patients whose gradients are known. Then the trainer itself, on
    public patients, with this site's device, precision, groups and noise, in each stage that the
    policy allows: neighbouring cohorts, a round on nobody, independent samples, fresh noise, the
    declared number, and a lower bound on epsilon from what it releases. A minute or two.
    """
    from crafts_client.site_audit import audit_site

    with one_line_errors("crafts-client"), progress_bars() as progress:
        site = SiteHome.open(home)
        result = audit_site(site, progress)
        record = result.record(site.config)
        write_file(site.audit_path, json.dumps(record, indent=1) + "\n")
    if as_json:
        say(json.dumps(record))
    else:
        for line in result.lines():
            say(line)
    if not result.passed:
        raise typer.Exit(1)


def _checked(model: type[Any], **values: object) -> Any:
    """Build a configuration from options; a bad value is one line."""
    from pydantic import ValidationError

    from crafts_client.errors import HomeError
    from crafts_core.fields import describe_first_error

    try:
        return model(**values)
    except ValidationError as error:
        raise HomeError(describe_first_error(error)) from error


def _absolute_foundation(value: str) -> str:
    """A folder given on the command line is relative to where the command runs."""
    return value if value == "embedded" else str(Path(value).resolve())
