"""``crafts-server plan``: ``new``, ``keys``, ``check``, ``sign`` and ``roster``."""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from crafts_core.command_line import one_line_errors, progress_bars, say, say_done
from crafts_core.delta_text import delta_text
from crafts_server.audit_log import Event
from crafts_server.commands import (
    DEFAULT_HOME,
    AsJson,
    Home,
    PlanFile,
    opened_enrolments,
)

if TYPE_CHECKING:
    from crafts_core.plan import Plan
    from crafts_privacy.noise_forecast import NoiseForecast

plan_app = typer.Typer(no_args_is_help=True, help="Make, check or sign a plan.")


@plan_app.command("new")
def plan_new(
    out: Annotated[Path, typer.Argument(help="plan.toml to write; must not exist.")],
    home: Home = DEFAULT_HOME,
    name: Annotated[str | None, typer.Option(help="Of the study; asked if absent.")] = None,
    epsilon: Annotated[
        float | None, typer.Option(help="What it may cost a patient in all; asked if absent.")
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Of each of the two stages; asked if absent.")
    ] = None,
    local_steps: Annotated[int, typer.Option(min=1, help="Private steps of a round.")] = 8,
    patients: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Of a site that will take part; repeat. Else as agreed so far."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a plan that says of each key what it is for, fitted to the sites there are.

    Foundation, number of sites, sample rate and delta come from the home and the sites' patients;
    the noise that follows is computed and said.
    """
    with one_line_errors("crafts-server"):
        from crafts_core.plan_keys import commented_toml
        from crafts_server.errors import HomeError
        from crafts_server.plan_new import new_plan, sizes_of, told

        sizes = tuple(patients or sizes_of(home))
        plan = new_plan(
            home,
            name=_asked("Name of the study", name, str),
            target_epsilon=_asked("Epsilon for all rounds together (8 is usual)", epsilon, float),
            rounds=_asked("Rounds of each stage", rounds, int),
            local_steps=local_steps,
            patients=sizes,
        )
        lines = told(plan, sizes)
        waiting = () if patients else _still_invited(home)
        if waiting:
            lines.append(
                f"Not counted, as they have not enrolled: {', '.join(waiting)}; wait for them, or "
                "give --patients N for each site."
            )
        forecast = _forecast(plan, home, sizes)
        lines += [] if forecast is None else [forecast.in_words]
        try:
            with out.open("x", encoding="utf-8") as file:
                file.write("".join(f"# {line}\n" for line in lines) + "\n" + commented_toml(plan))
        except FileExistsError as error:
            raise HomeError(f"{out} is there already; name another file") from error
    if as_json:
        say(json.dumps({"plan": str(out), "hash": plan.hash}))
        return
    say(*lines, f"{out} is written; read it, then run: crafts-server plan check {out}")


@plan_app.command("keys")
def plan_keys() -> None:
    """Every key of a plan: what it may be and what it is for (Markdown)."""
    from crafts_core.plan_keys import keys_table

    say(*keys_table().split("\n"))


@plan_app.command("check")
def plan_check(
    plan: PlanFile,
    home: Home = DEFAULT_HOME,
    patients: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Of a site that will take part; repeat. Else as agreed so far."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say what a plan asks for, or all that is wrong with it, as sites will; exit 1 if anything is.

    Where there is a coordinator's home, its adapter is compared with the foundation there, a plan
    of sums with the sites that are enrolled, and the noise with a gradient that is measured on
    public tiles.
    """
    with one_line_errors("crafts-server"):
        from crafts_core.plan import Plan, PlanError
        from crafts_server.home import CoordinatorHome
        from crafts_server.plan_problems import problems_of, problems_without_home

        loaded: Plan | None = None
        forecast: NoiseForecast | None = None
        try:
            loaded = Plan.load(plan)
            if (home / "coordinator.toml").exists():
                problems = list(problems_of(loaded, CoordinatorHome.open(home)))
            else:
                problems = list(problems_without_home(loaded))
                say(
                    f"no coordinator's home at {home}: targets were not compared with a "
                    "foundation, nor the noise with a gradient",
                    err=True,
                )
        except PlanError as error:
            problems = list(error.problems)
        if loaded is not None and not problems:
            forecast = _forecast(loaded, home, patients or [])
    if as_json:
        facts: dict[str, object] = {} if loaded is None else _facts(loaded)
        facts |= {} if forecast is None else {"noise": forecast.as_json()}
        say(json.dumps({"problems": problems} | facts))
    elif problems:
        say(*(f"crafts-server: {each}" for each in problems), err=True)
    elif loaded is not None:
        say(*_sentences(loaded), *_too_few_here(loaded, home))
        if forecast is not None:
            say(forecast.in_words)
    if problems:
        raise typer.Exit(1)


@plan_app.command("sign")
def plan_sign(
    plan: PlanFile,
    home: Home = DEFAULT_HOME,
    out: Annotated[
        Path | None, typer.Option(help="Write the signed plan (JSON) here for the sites.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Sign a plan with the home's key and remember it."""
    with one_line_errors("crafts-server"):
        from crafts_core.durable import write_file
        from crafts_core.plan import Plan
        from crafts_server.home import CoordinatorHome
        from crafts_server.plan_problems import refuse_problems

        loaded = Plan.load(plan)
        opened = CoordinatorHome.open(home)
        refuse_problems(loaded, opened)
        signed = opened.sign_plan(loaded)
        opened.audit_log.write(Event.SIGNED, plan=loaded.hash, study=loaded.study.name)
        if out is not None:
            write_file(out, json.dumps(asdict(signed), indent=1) + "\n")
    values = {"hash": loaded.hash, "signature": signed.signature, "public_key": signed.public_key}
    say(json.dumps(values) if as_json else f"signed {loaded.study.name} {loaded.hash}")


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
    with one_line_errors("crafts-server"), opened_enrolments(home) as (opened, enrolments):
        from crafts_core.plan import Plan

        loaded = Plan.load(plan)
        if renew:
            roster = enrolments.rosters.renew(loaded)
            opened.audit_log.write(Event.RENEWED, plan=loaded.hash, roster=roster.hash)
        else:
            roster = enrolments.rosters.fixed(loaded)
    lines = [
        f"{entry.site:24} {entry.declared_patients:8} patients  {entry.identity}"
        for entry in roster.sites
    ]
    say_done([*lines, roster.phrase], roster.model_dump(mode="json"), as_json=as_json)


def _still_invited(home: Path) -> tuple[str, ...]:
    """Sites that a plan is not sized for yet."""
    from crafts_server.enrolments import Enrolments
    from crafts_server.home import CoordinatorHome

    with CoordinatorHome.open(home).registry() as registry:
        return tuple(Enrolments(registry).waiting())


def _forecast(plan: "Plan", home: Path, patients: Sequence[int]) -> "NoiseForecast | None":
    """How large the noise will be; None where nothing can be said, as there is no site yet."""
    if not (home / "coordinator.toml").exists() or plan.privacy.target_epsilon is None:
        return None
    from crafts_server.errors import HomeError
    from crafts_server.home import CoordinatorHome
    from crafts_server.plan_new import sizes_of

    try:
        sizes = patients or sizes_of(home)
    except HomeError as error:
        say(f"how large the noise will be is not known: {error}", err=True)
        return None
    from crafts_core.foundation import load  # torch takes seconds
    from crafts_privacy.noise_forecast import is_measurable, noise_forecast

    if not is_measurable(plan):
        return None
    foundation = load(CoordinatorHome.open(home).foundation_path)
    with progress_bars() as progress:
        return noise_forecast(plan, foundation, sizes, progress)


def _too_few_here(plan: "Plan", home: Path) -> Iterator[str]:
    """That no round can end yet, where fewer sites are enrolled than one needs."""
    if not (home / "coordinator.toml").exists():
        return
    from crafts_server.enrolments import Enrolments
    from crafts_server.home import CoordinatorHome

    with CoordinatorHome.open(home).registry() as registry:
        enrolled = [site for site in Enrolments(registry).sites() if site.revoked_at is None]
    needed = plan.aggregation.min_sites
    if len(enrolled) < needed:
        yield f"A round needs {needed} sites, and {len(enrolled)} are enrolled: it waits till then."


def _facts(plan: "Plan") -> dict[str, object]:
    return {
        "study": plan.study.name,
        "hash": plan.hash,
        "rounds": plan.num_rounds,
        "steps": plan.total_steps,
        "target_epsilon": plan.privacy.target_epsilon,
        "delta": plan.privacy.delta,
    }


def _sentences(plan: "Plan") -> tuple[str, str]:
    privacy = plan.privacy
    promise = (
        "no differential privacy"
        if privacy.target_epsilon is None or privacy.delta is None
        else f"epsilon {privacy.target_epsilon:g} at delta {delta_text(privacy.delta)} per patient"
    )
    told = "".join(f", {stage.name} told once" for stage in plan.releases)
    if plan.study.pool is not None:
        told += f", public tiles picked from pool {plan.study.pool[:16]}"
    return (
        f"{plan.study.name}: {plan.num_rounds} rounds, {plan.total_steps} private steps "
        f"a site{told}, {promise}",
        f"hash {plan.hash}",
    )


def _asked(question: str, given: Any, kind: type) -> Any:
    """The option, or an answer at a terminal."""
    if given is not None:
        return given
    if not sys.stdin.isatty():
        from crafts_server.errors import HomeError

        raise HomeError("without a terminal give --name, --epsilon and --rounds")
    return typer.prompt(question, type=kind)
