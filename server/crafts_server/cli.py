"""``crafts-server``: make a coordinator, its foundation and plans, look at runs, export."""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from click.core import ParameterSource

from crafts_core.command_line import (
    Version,
    confirm,
    one_line_errors,
    progress_bars,
    run_as_service,
    say,
    say_done,
)
from crafts_server.audit_log import Event
from crafts_server.backup_cli import backup_app
from crafts_server.plan_cli import (
    DEFAULT_HOME,
    AsJson,
    Home,
    PlanFile,
    plan_app,
    refuse_problems,
)

if TYPE_CHECKING:
    from crafts_server.enrolments import EnrolledSite, Enrolments
    from crafts_server.home import CoordinatorHome, HomeConfig
    from crafts_server.registry import Registry

app = typer.Typer(
    no_args_is_help=True,
    help=__doc__,
    # A traceback with local variables would show what must not be shown.
    pretty_exceptions_enable=False,
)
foundation_app = typer.Typer(no_args_is_help=True, help="Build, import or verify a foundation.")
sites_app = typer.Typer(no_args_is_help=True, help="Invite hospitals, see and revoke them.")
runs_app = typer.Typer(no_args_is_help=True, help="Look at runs.")
pool_app = typer.Typer(no_args_is_help=True, help="Open tiles that plans may pick from.")
log_app = typer.Typer(no_args_is_help=True, help="What the coordinator did, for auditors.")
app.add_typer(foundation_app, name="foundation")
app.add_typer(pool_app, name="pool")
app.add_typer(plan_app, name="plan")
app.add_typer(sites_app, name="sites")
app.add_typer(runs_app, name="runs")
app.add_typer(log_app, name="log")
app.add_typer(backup_app)


@app.callback()
def main(_version: Version = False) -> None:
    """Coordinate a federated study: foundation, plans, sites, rounds, export."""


@app.command()
def init(
    context: typer.Context,
    home: Home = DEFAULT_HOME,
    foundation: Annotated[
        str, typer.Option(help="'embedded', or a foundation directory.")
    ] = "embedded",
    registry: Annotated[
        str,
        typer.Option(
            envvar="CRAFTS_REGISTRY",
            help="'sqlite', or a SQLAlchemy database URL; with a password, by the variable.",
        ),
    ] = "sqlite",
    host: Annotated[
        list[str] | None,
        typer.Option(help="Name or address under which sites reach this machine; repeat."),
    ] = None,
    listen: Annotated[
        str | None,
        typer.Option(
            help="Address to bind; all interfaces, or loopback if every host is this machine."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a coordinator's home: keys, certificate authority, registry, configuration.

    Again is harmless: a home that is there keeps its configuration, and another one is refused.
    """
    from crafts_server.home import EMBEDDED, CoordinatorHome

    with one_line_errors("crafts-server"):
        if foundation != EMBEDDED:
            foundation = str(Path(foundation).resolve())
        told = {
            "foundation": foundation,
            "registry": registry,
            "hosts": tuple(host or ["localhost"]),
            **({} if listen is None else {"listen": listen}),
        }
        config = _checked_config(told)
        _refuse_another(home, config, asked=_asked_for(context))
        made = CoordinatorHome.create(home, config)
        made.registry().close()
        public_key = made.public_key
    if context.get_parameter_source("registry") == ParameterSource.COMMANDLINE and _has_password(
        registry
    ):
        say(
            "crafts-server: a password on the command line is seen by others on this machine; "
            "change it, and give the URL by CRAFTS_REGISTRY",
            err=True,
        )
    _print(
        {"home": str(home), "public_key": public_key},
        (
            f"Coordinator home {home}. Sites trust it by this key in allowed_signers:",
            public_key,
            "next: crafts-server serve, then crafts-server sites invite NAME --patients N",
        ),
        as_json,
    )


def _checked_config(told: Mapping[str, object]) -> "HomeConfig":
    from pydantic import ValidationError

    from crafts_core.plan import describe_first_error
    from crafts_server.errors import HomeError
    from crafts_server.home import HomeConfig

    try:
        return HomeConfig.model_validate(told)
    except ValidationError as error:
        raise HomeError(describe_first_error(error)) from error


def _asked_for(context: typer.Context) -> list[str]:
    """The keys of the configuration that somebody named, by option or variable."""
    keys = {"foundation": "foundation", "registry": "registry", "host": "hosts", "listen": "listen"}
    return [
        key
        for option, key in keys.items()
        if context.get_parameter_source(option) != ParameterSource.DEFAULT
    ]


def _refuse_another(path: Path, config: "HomeConfig", *, asked: Sequence[str]) -> None:
    """Change no home that is there, and do not look as if.

    Raises:
        HomeError: something else was asked for than its configuration says.
    """
    from crafts_server.errors import HomeError
    from crafts_server.home import CONFIG_NAME, CoordinatorHome

    if not (path / CONFIG_NAME).exists():
        return
    kept, wanted = CoordinatorHome.open(path).config, config.model_dump(mode="json")
    others = [key for key in asked if getattr(kept, key) != getattr(config, key)]
    if "hosts" in others and "listen" not in asked and kept.listen != config.listen:
        others.append("listen")  # other hosts may need another address
    # The registry's URL may hold a password.
    lines = [key if key == "registry" else f"{key} = {json.dumps(wanted[key])}" for key in others]
    if lines:
        raise HomeError(
            f"{path} is a home already and was left as it is; for another {', '.join(lines)} edit "
            f"{path / CONFIG_NAME} and restart crafts-server serve"
        )


def _has_password(registry: str) -> bool:
    from sqlalchemy import make_url

    return registry != "sqlite" and make_url(registry).password is not None


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

    with one_line_errors("crafts-server"), _enrolments(home) as (opened, enrolments):
        replaces = name in enrolments.waiting()
        token = enrolments.invite(name, patients=patients, valid_for=timedelta(days=days))
        opened.audit_log.write(Event.INVITED, site=name, patients=patients, days=days)
        token += f".{opened.pki.enrolment_fingerprint}"
        config = opened.config
    command = f"crafts-client enroll {config.hosts[0]}:{config.enrolment_port} --token {token}"
    _print(
        {"site": name, "token": token, "command": command},
        (
            *(["an older token of this site counts no more"] if replaces else []),
            f"{name} enrols with {patients} patients within {days} days by:",
            command,
        ),
        as_json,
    )


@sites_app.command("list")
def sites_list(home: Home = DEFAULT_HOME, as_json: AsJson = False) -> None:
    """Who is enrolled, revoked, or invited."""
    with one_line_errors("crafts-server"), _enrolments(home) as (_, enrolments):
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
    _print(values, lines or ["no sites yet; see crafts-server sites invite"], as_json)


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
    with one_line_errors("crafts-server"), _enrolments(home) as (opened, enrolments):
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
    with one_line_errors("crafts-server"), _enrolments(home) as (opened, enrolments):
        enrolments.revoke(name)
        opened.audit_log.write(Event.REVOKED, site=name)
    say_done(f"{name} is revoked", {"revoked": name}, as_json=as_json)


@foundation_app.command("build")
def foundation_build(
    out: Annotated[Path, typer.Argument(help="Directory to write; must not exist.")],
    tiles: Annotated[
        Path | None,
        typer.Option(help="Table of open tiles (docs/foundation.md). Without it all is drawn."),
    ] = None,
    name: Annotated[str, typer.Option(help="Name of the foundation.")] = "embedded",
    work: Annotated[
        Path | None,
        typer.Option(help="Keeps what is done, so an interrupted build goes on. OUT.work."),
    ] = None,
    device: Annotated[
        str, typer.Option(help="cpu or cuda; auto takes a GPU if there is.")
    ] = "auto",
    seed: Annotated[int | None, typer.Option(min=0, help="Another seed than the default.")] = None,
    open_probe: Annotated[
        bool,
        typer.Option("--open-probe", help="Up to 40 held-out tiles go into the foundation."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Build a public foundation from open tiles and drawings. No patient, no download."""
    with one_line_errors("crafts-server"):
        import torch

        from crafts_core.foundation_build import BuildConfig, build, read_table

        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        with progress_bars() as report:
            manifest = build(
                out,
                work=work or out.with_name(out.name + ".work"),
                rows=() if tiles is None else read_table(tiles),
                config=BuildConfig(
                    seed=BuildConfig().seed if seed is None else seed, open_probe=open_probe
                ),
                name=name,
                device=device,
                progress=report,
            )
    _print({"foundation": str(out), "hash": manifest.hash}, f"{out}: {manifest.hash}", as_json)


@foundation_app.command("import")
def foundation_import(
    out: Annotated[Path, typer.Argument(help="Directory to write; must not exist.")],
    diffusers: Annotated[
        Path, typer.Option(help="Local Stable Diffusion 1.5/2.1 or PixArt directory.")
    ],
    name: Annotated[str, typer.Option(help="Name of the foundation.")],
    licence: Annotated[str, typer.Option(help="Licence of the weights.")],
    aligner: Annotated[
        Path | None, typer.Option(help="Local CLIP-layout directory of a frozen aligner.")
    ] = None,
    mpp: Annotated[float, typer.Option(min=0.01, help="Microns per pixel of its tiles.")] = 0.5,
    as_json: AsJson = False,
) -> None:
    """Import local diffusers weights. Safetensors only; pickles are refused."""
    with one_line_errors("crafts-server"):
        from crafts_core.foundation import import_diffusers

        manifest = import_diffusers(
            diffusers, aligner=aligner, out=out, name=name, licence=licence, mpp=mpp
        )
    _print({"foundation": str(out), "hash": manifest.hash}, f"{out}: {manifest.hash}", as_json)


@foundation_app.command("verify")
def foundation_verify(
    directory: Annotated[
        Path | None, typer.Argument(help="A foundation; the embedded one if not given.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare every file of a foundation with its manifest."""
    from crafts_core.foundation_manifest import embedded_path, verify

    with one_line_errors("crafts-server"):
        manifest = verify(directory or embedded_path())
    _print(
        {"name": manifest.name, "hash": manifest.hash, "num_files": len(manifest.files)},
        f"{manifest.name}: {len(manifest.files)} files as signed off; hash {manifest.hash}",
        as_json,
    )


@pool_app.command("add")
def pool_add(
    table: Annotated[
        Path, typer.Argument(help="Table of open images (docs/foundation.md); no private tile.")
    ],
    home: Home = DEFAULT_HOME,
    as_json: AsJson = False,
) -> None:
    """Cut open images into tiles that stage retrieval may pick from; prints the plan's pool."""
    with one_line_errors("crafts-server"):
        from crafts_core.foundation_manifest import read_manifest
        from crafts_core.public_pool import read_pool
        from crafts_server.home import CoordinatorHome

        opened = CoordinatorHome.open(home)
        manifest = read_manifest(opened.foundation_path)
        with progress_bars() as report:
            pool = read_pool(table, tile_px=manifest.tile_px, mpp=manifest.mpp, progress=report)
        pool.keep(opened.pools)
        licences = sorted({each.licence for each in pool.sources})
        num_cases = len({each.case for each in pool.sources})
        facts = {"pool": pool.hash, "tiles": len(pool), "cases": num_cases, "licences": licences}
        opened.audit_log.write(Event.POOLED, **facts)
    _print(
        facts,
        (
            f"{len(pool)} tiles of {num_cases} cases, under {'; '.join(licences)}",
            f'for [study] of a plan with stage retrieval: pool = "{pool.hash}"',
        ),
        as_json,
    )


@plan_app.command("roster")
def plan_roster(
    plan: PlanFile,
    home: Home = DEFAULT_HOME,
    renew: Annotated[
        bool, typer.Option(help="Fix it anew, of who is enrolled now; all sites approve it again.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show who takes part in the sums of a signed plan, and the phrase that sites read aloud."""
    with one_line_errors("crafts-server"), _enrolments(home) as (opened, enrolments):
        from crafts_core.plan import Plan

        loaded = Plan.load(plan)
        if renew:
            roster = enrolments.rosters.renew(loaded)
            opened.audit_log.write(Event.RENEWED, plan=loaded.hash, roster=roster.hash)
        else:
            roster = enrolments.rosters.fixed(loaded)
    lines = [f"{entry.site}\t{entry.declared_patients}\t{entry.identity}" for entry in roster.sites]
    _print(roster.model_dump(mode="json"), [*lines, roster.phrase], as_json)


@runs_app.command("list")
def runs_list(home: Home = DEFAULT_HOME, as_json: AsJson = False) -> None:
    """All runs, newest first, and plans that failed before they came to one."""
    with one_line_errors("crafts-server"):
        from crafts_server.home import CoordinatorHome
        from crafts_server.status import status_of

        now = status_of(CoordinatorHome.open(home))
    why = now.why
    lines = [
        f"{run.run_id}  {run.study}  plan {run.plan_hash[:16]}  {run.status}  {run.progress}  "
        f"{run.started_at:%Y-%m-%d %H:%M}"
        + (f"  ({why[run.plan_hash]})" if run.plan_hash in why else "")
        for run in now.runs
    ]
    lines += [
        f"-  {failed.study}  plan {failed.plan_hash[:16]}  failed  0 rounds  ({failed.why})"
        for failed in now.failed
    ]
    values = [asdict(run) | {"why": why.get(run.plan_hash)} for run in now.runs]
    values += [
        asdict(failed) | {"run_id": None, "status": "failed", "rounds": 0} for failed in now.failed
    ]
    _print(values, lines or ["no runs yet"], as_json)


@runs_app.command("draw")
def runs_draw(
    run_id: Annotated[str, typer.Argument(help="As `runs list` prints it.")],
    home: Home = DEFAULT_HOME,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:0.")] = "cpu",
    as_json: AsJson = False,
) -> None:
    """Draw ten prompts with a run's newest checkpoint, for `dashboard`; once for each round."""
    with one_line_errors("crafts-server"):
        from crafts_core.plan import Plan
        from crafts_server.home import CoordinatorHome
        from crafts_server.samples import draw_samples

        with _registry(home) as registry:
            plan = Plan.parse(json.loads(registry.plan(registry.run(run_id).plan_hash).json))
        drawn = draw_samples(CoordinatorHome.open(home), run_id, plan, device=device)
    say_done(
        f"round {drawn} of {run_id} is drawn; see crafts-server dashboard",
        {"run": run_id, "round": drawn},
        as_json=as_json,
    )


@runs_app.command("show")
def runs_show(
    run_id: Annotated[str, typer.Argument(help="As `runs list` prints it.")],
    home: Home = DEFAULT_HOME,
    as_json: AsJson = False,
) -> None:
    """The receipts of one run, read from its signed checkpoints."""
    with one_line_errors("crafts-server"):
        from crafts_server.home import CoordinatorHome

        with _registry(home) as registry:
            summary = registry.run(run_id)
        chain = CoordinatorHome.open(home).checkpoints(run_id).chain()
        receipts = [checkpoint.receipt() for checkpoint in chain[1:]]
    lines = [f"{run_id}  {summary.study}  {summary.status}"]
    for receipt in receipts:
        weights = ", ".join(
            f"{site.site} {site.weight:.2f} of {site.max_weight:.2f}" for site in receipt.sites
        )
        lines.append(
            f"round {receipt.round} {receipt.stage}: margin {receipt.margin_before:.4f} -> "
            f"{receipt.margin_after:.4f}, step {receipt.step_scale:g}; {weights or 'no site asked'}"
        )
        lines.extend(f"  refused {each.site}: {each.reason}" for each in receipt.refused)
        lines.extend(f"  missing {name}" for name in receipt.missing)
        lines.extend(f"  sum of {each.in_words}" for each in receipt.sums)
        lines.extend(f"  left out {name}" for name in receipt.left_out)
        if receipt.release is not None:
            lines.append(f"  told: {receipt.release.in_words}")
        if receipt.retrieval is not None:
            lines.append(f"  picked: {receipt.retrieval.in_words}")
        lines.extend(
            f"  weight rose {each.site}: {each.before:.2f} -> {each.now:.2f} of its share"
            for each in receipt.rises
        )
    values = {
        **asdict(summary),
        "receipts": [receipt.model_dump(mode="json") for receipt in receipts],
    }
    _print(values, lines, as_json)


@app.command()
def serve(home: Home = DEFAULT_HOME) -> None:
    """Listen for hospitals and train the queued plans, until Ctrl-C. Goes on where it stopped."""
    with one_line_errors("crafts-server"):
        from crafts_core.durable import exclusive_lock
        from crafts_server.errors import HomeError
        from crafts_server.home import CoordinatorHome
        from crafts_server.service import Service

        opened = CoordinatorHome.open(home)
        held = HomeError(f"another crafts-server serve runs in {home}")
        with exclusive_lock(home / "serve.lock", held=held):
            service = Service(opened)
            stop = run_as_service()
            service.start()
            try:
                say(json.dumps(service.ports))
                say("serving; from another terminal: crafts-server status", err=True)
                service.work(stop)
            finally:
                service.stop()


@app.command()
def dashboard(
    home: Home = DEFAULT_HOME,
    listen: Annotated[
        str, typer.Option(help="Address; on another than loopback put a TLS proxy before it.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8465,
) -> None:
    """Show sites, runs and rounds in a browser, until Ctrl-C. Who has the link can only look."""
    with one_line_errors("crafts-server"):
        from crafts_server.dashboard import serve_pages
        from crafts_server.home import CoordinatorHome

        serve_pages(CoordinatorHome.open(home), listen=listen, port=port, say=say)


@app.command()
def train(plan: PlanFile, home: Home = DEFAULT_HOME, as_json: AsJson = False) -> None:
    """Sign a plan and hand it to the running coordinator (or to the next that is started)."""
    with one_line_errors("crafts-server"):
        from crafts_core.plan import Plan
        from crafts_server.home import CoordinatorHome
        from crafts_server.plan_queue import queue_plan

        loaded = Plan.load(plan)
        opened = CoordinatorHome.open(home)
        refuse_problems(loaded, opened)
        queue_plan(opened, loaded)
    _print(
        {"hash": loaded.hash},
        f"{loaded.study.name} waits to be trained; see crafts-server runs list",
        as_json,
    )


@app.command()
def stop(
    plan: Annotated[str, typer.Argument(help="Beginning of the plan's hash.")],
    home: Home = DEFAULT_HOME,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: AsJson = False,
) -> None:
    """Stop training a plan, within seconds. Committed rounds stay; `train` goes on with them."""
    with one_line_errors("crafts-server"):
        from crafts_server.home import CoordinatorHome
        from crafts_server.plan_queue import queued_plan, stop_plan

        opened = CoordinatorHome.open(home)
        confirm(f"Stop plan {queued_plan(opened, plan).name[:16]}?", yes=yes)
        stopped = stop_plan(opened, plan)
    say_done(f"plan {stopped[:16]} is stopped", {"stopped": stopped}, as_json=as_json)


@app.command()
def status(home: Home = DEFAULT_HOME, as_json: AsJson = False) -> None:
    """Fingerprints to compare by telephone, sites, when they were seen, runs, what waits, why."""
    with one_line_errors("crafts-server"):
        from crafts_server.home import CoordinatorHome
        from crafts_server.status import sentences, status_of

        now = status_of(CoordinatorHome.open(home))
    _print(now.as_json(), list(sentences(now)), as_json)


@log_app.command("verify")
def log_verify(home: Home = DEFAULT_HOME, as_json: AsJson = False) -> None:
    """Check every line of the audit log against the one before; exit 1 if one was changed."""
    with one_line_errors("crafts-server"):
        from crafts_server.home import CoordinatorHome

        entries = CoordinatorHome.open(home).audit_log.verify()
    head = entries[-1].hash if entries else ""
    _print(
        {"entries": len(entries), "head": head},
        f"{len(entries)} lines as they were written; head {head[:16] or '-'}",
        as_json,
    )


@log_app.command("show")
def log_show(
    home: Home = DEFAULT_HOME,
    last: Annotated[int, typer.Option(min=1, help="How many of the newest lines.")] = 50,
    as_json: AsJson = False,
) -> None:
    """What the coordinator did."""
    with one_line_errors("crafts-server"):
        from crafts_server.home import CoordinatorHome

        entries = CoordinatorHome.open(home).audit_log.verify()[-last:]
    lines = [
        f"{entry.at}  {entry.event:22} "
        + "  ".join(f"{key}={value}" for key, value in entry.facts.items())
        for entry in entries
    ]
    _print([asdict(entry) for entry in entries], lines or ["nothing yet"], as_json)


@app.command()
def export(
    run_id: Annotated[str, typer.Argument(help="As `runs list` prints it.")],
    out: Annotated[Path, typer.Option(help="Directory for generator/ and adapter.safetensors.")],
    home: Home = DEFAULT_HOME,
    name_site: Annotated[
        list[str] | None, typer.Option(help="A site that agreed to be named; repeat for more.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Export a run's newest generator as stock diffusers files."""
    with one_line_errors("crafts-server"):
        files = _export(home, run_id, out, name_site or [])
    _print({"files": [str(path) for path in files]}, [str(path) for path in files], as_json)


def _export(home_path: Path, run_id: str, out: Path, named_sites: list[str]) -> list[Path]:
    # Torch and diffusers take seconds to import; `crafts-server --help` should not.
    from crafts_core.foundation import load
    from crafts_core.plan import Plan
    from crafts_server.errors import HomeError
    from crafts_server.export import ADAPTER_FILE, export_generator
    from crafts_server.home import CoordinatorHome

    home = CoordinatorHome.open(home_path)
    with _registry(home_path) as registry:
        plan = Plan.parse(json.loads(registry.plan(registry.run(run_id).plan_hash).json))
    chain = home.checkpoints(run_id).chain()
    sites = {site.site for checkpoint in chain[1:] for site in checkpoint.receipt().sites}
    if strangers := sorted(set(named_sites) - sites):
        raise HomeError(
            f"{strangers[0]} took no part in run {run_id}; took part: {', '.join(sorted(sites))}"
        )
    out.mkdir(parents=True, exist_ok=True)
    generator = out / "generator"
    foundation = load(home.foundation_path)
    has_lora = plan.gives_lora and foundation.generator.kind.reads_lora
    lora = out / ADAPTER_FILE if has_lora else None
    export_generator(
        chain,
        plan=plan,
        foundation=foundation,
        directory=generator,
        lora=lora,
        num_sites=len(sites),
        named_sites=named_sites,
    )
    if chain[-1].round < plan.num_rounds:
        say(f"round {chain[-1].round} of {plan.num_rounds}: the plan is not finished", err=True)
    home.audit_log.write(Event.EXPORTED, run=run_id, round=chain[-1].round, named=named_sites)
    return [generator] if lora is None else [generator, lora]


@contextlib.contextmanager
def _enrolments(home: Path) -> Iterator[tuple["CoordinatorHome", "Enrolments"]]:
    from crafts_server.enrolments import Enrolments
    from crafts_server.home import CoordinatorHome

    with _registry(home) as registry:
        yield CoordinatorHome.open(home), Enrolments(registry)


@contextlib.contextmanager
def _registry(home: Path) -> Iterator["Registry"]:
    from crafts_server.home import CoordinatorHome

    registry = CoordinatorHome.open(home).registry()
    try:
        yield registry
    finally:
        registry.close()


def _print(values: object, text: str | Sequence[str], as_json: bool) -> None:
    if as_json:
        say(json.dumps(values, default=str))
    else:
        say(*([text] if isinstance(text, str) else text))
