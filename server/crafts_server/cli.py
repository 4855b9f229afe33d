"""``crafts-server``: make a coordinator, its foundation and plans, look at runs, export."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from click.core import ParameterSource

from crafts_core.command_line import (
    Version,
    confirm,
    one_line_errors,
    run_as_service,
    say,
    say_done,
)
from crafts_server.backup_cli import backup_app
from crafts_server.commands import (
    DEFAULT_HOME,
    AsJson,
    Home,
    PlanFile,
)
from crafts_server.foundation_cli import foundation_app, pool_app
from crafts_server.plan_cli import plan_app
from crafts_server.runs_cli import export, runs_app
from crafts_server.sites_cli import sites_app

if TYPE_CHECKING:
    from crafts_server.home import HomeConfig

app = typer.Typer(
    no_args_is_help=True,
    help=__doc__,
    # A traceback with local variables would show what must not be shown.
    pretty_exceptions_enable=False,
)
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
    from crafts_core.foundation_manifest import EMBEDDED
    from crafts_server.home import CoordinatorHome

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
    say_done(
        (
            f"Coordinator home {home}. Sites trust it by this key in allowed_signers:",
            public_key,
            "next: crafts-server serve, then crafts-server sites invite NAME --patients N",
        ),
        {"home": str(home), "public_key": public_key},
        as_json=as_json,
    )


def _checked_config(told: Mapping[str, object]) -> "HomeConfig":
    from pydantic import ValidationError

    from crafts_core.fields import describe_first_error
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
        from crafts_server.plan_problems import refuse_problems
        from crafts_server.plan_queue import finished_run, queue_plan

        loaded = Plan.load(plan)
        opened = CoordinatorHome.open(home)
        refuse_problems(loaded, opened)
        finished = finished_run(opened, loaded)
        if finished is None:
            queue_plan(opened, loaded)
    told = (
        f"{loaded.study.name} waits to be trained; see crafts-server runs list"
        if finished is None
        else f"{loaded.study.name} has finished as run {finished}, and a plan runs once; to train "
        "once more give the plan another seed"
    )
    say_done(told, {"hash": loaded.hash, "finished_run": finished}, as_json=as_json)


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
    say_done(list(sentences(now)), now.as_json(), as_json=as_json)


@log_app.command("verify")
def log_verify(home: Home = DEFAULT_HOME, as_json: AsJson = False) -> None:
    """Check every line of the audit log against the one before; exit 1 if one was changed."""
    with one_line_errors("crafts-server"):
        from crafts_server.home import CoordinatorHome

        entries = CoordinatorHome.open(home).audit_log.verify()
    head = entries[-1].hash if entries else ""
    say_done(
        f"{len(entries)} lines as they were written; head {head[:16] or '-'}",
        {"entries": len(entries), "head": head},
        as_json=as_json,
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
    say_done(lines or ["nothing yet"], [asdict(entry) for entry in entries], as_json=as_json)


app.command()(export)
