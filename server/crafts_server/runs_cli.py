"""``crafts-server runs`` and ``export``: what came of training."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from crafts_core.command_line import one_line_errors, say, say_done
from crafts_server.audit_log import Event
from crafts_server.commands import DEFAULT_HOME, AsJson, Home, opened_registry

runs_app = typer.Typer(no_args_is_help=True, help="Look at runs.")


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
    say_done(lines or ["no runs yet"], values, as_json=as_json)


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

        with opened_registry(home) as registry:
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

        with opened_registry(home) as registry:
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
    say_done(lines, values, as_json=as_json)


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
    say_done(
        [str(path) for path in files], {"files": [str(path) for path in files]}, as_json=as_json
    )


def _export(home_path: Path, run_id: str, out: Path, named_sites: list[str]) -> list[Path]:
    # Torch and diffusers take seconds to import; `crafts-server --help` should not.
    from crafts_core.foundation import load
    from crafts_core.plan import Plan
    from crafts_server.errors import HomeError
    from crafts_server.export import ADAPTER_FILE, export_generator
    from crafts_server.home import CoordinatorHome

    home = CoordinatorHome.open(home_path)
    with opened_registry(home_path) as registry:
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
