"""A whole study in one process: hospitals, federation, generator, measurement, report.

Each step leaves its result in the workspace and takes it up again, so a run that was interrupted
anywhere goes on with the same command and reaches the same end.
"""

import time
from dataclasses import asdict
from pathlib import Path

from crafts_core.foundation import load
from crafts_core.foundation_manifest import named_path
from crafts_core.progress import Progress
from crafts_core.public_pool import table_fingerprint
from crafts_core.state import weights_of
from crafts_server.home import CoordinatorHome
from crafts_simulations import federation, results
from crafts_simulations.errors import ScenarioError
from crafts_simulations.processes import loopback_config
from crafts_simulations.public_tiles import kept_pool, public_part, refuse_known_tiles
from crafts_simulations.report import Report
from crafts_simulations.scenario import Scenario
from crafts_simulations.sites import TileSource, make_sites
from crafts_simulations.study import LocalStudy
from crafts_simulations.workspace import Workspace


def run_scenario(
    scenario: Scenario,
    out: Path,
    *,
    source: TileSource | None = None,
    pool: Path | None = None,
    device: str = "cpu",
    num_workers: int = 2,
    num_trainers: int | None = 1,
    ray: str | None = None,
    real_processes: bool = False,
    progress: Progress = lambda _what, _done, _total: None,
) -> Report:
    """Run a scenario in ``out``, or what is left of it.

    Args:
        scenario: What to run.
        out: An empty folder, or one that holds this very run.
        source: Real tiles; needed exactly when the scenario deals tiles.
        pool: Table of open images; needed exactly when the scenario has stage retrieval.
        device: Torch device of coordinator and sites.
        num_workers: Slides or tiles read at a time; 0 reads in this process.
        num_trainers: Sites that train at a time, in a process each; 1 trains in this process, None
            is as many as Ray has room for.
        ray: Train on Ray: ``local`` starts one here, else the address of a cluster.
        real_processes: Train with the real programs on loopback instead of in this process.
        progress: Called with what is being done, how much is done, and how much there is.

    Raises:
        CraftsError: what is missing, damaged, impossible, or in the way.
        OSError: the disk refuses; what was finished stays.
    """
    _check_source(scenario, source)
    _check_pool(scenario, pool)
    if scenario.scenario.repeatable and real_processes:
        raise ScenarioError(
            "the real programs take their noise from entropy, and no seed repeats them; leave out "
            "--processes or repeatable"
        )
    if real_processes and ray is not None:
        raise ScenarioError("the real programs know no Ray; leave out --processes or --ray")
    started = time.monotonic()
    workspace = Workspace.claim(out, _request(scenario, source, pool))
    earlier = workspace.seconds()
    try:
        progress("loading the foundation", 0, 1)
        foundation = load(named_path(scenario.scenario.foundation), device=device)
        progress("loading the foundation", 1, 1)
        home = CoordinatorHome.create(workspace.coordinator, loopback_config(foundation.path))
        tiles = None if pool is None else kept_pool(home, pool, foundation.manifest, progress)
        plan = scenario.plan(foundation.manifest.hash, None if tiles is None else tiles.hash)
        study = LocalStudy(
            workspace=workspace,
            scenario=scenario,
            plan=plan,
            foundation=foundation,
            signer=home.public_key,
            device=device,
            num_workers=num_workers,
            num_trainers=num_trainers,
            ray=ray,
            real_processes=real_processes,
            progress=progress,
        )
        make_sites(study, source)
        if tiles is not None:
            refuse_known_tiles(study, tiles)
        federate = federation.federate_with_processes if real_processes else federation.federate
        chain = federate(study, home)
        federation.export(study, chain)
        public = None if tiles is None else public_part(study, chain, tiles)
        evaluation, leakage = results.evaluate(study, public), results.attack(study)
        steering = results.steering(study)
        weights = weights_of(chain[-1].state())
        num_parameters = sum(tensor.numel() for tensor in weights.values())
        return results.report(
            study,
            [checkpoint.receipt() for checkpoint in chain[1:]],
            evaluation,
            leakage,
            steering,
            num_parameters=num_parameters,
            seconds=earlier + time.monotonic() - started,
        )
    finally:
        workspace.set_seconds(earlier + time.monotonic() - started)


def _check_source(scenario: Scenario, source: TileSource | None) -> None:
    if scenario.tiles is not None and source is None:
        raise ScenarioError("this scenario deals real tiles; give --tiles and --labels")
    if scenario.tiles is None and source is not None:
        raise ScenarioError("this scenario makes its own slides; it takes no --tiles or --labels")


def _check_pool(scenario: Scenario, pool: Path | None) -> None:
    if scenario.needs_pool and pool is None:
        raise ScenarioError("this scenario picks public tiles; give --pool, a table of open images")
    if pool is not None and not scenario.needs_pool:
        raise ScenarioError("this scenario has no stage retrieval; leave out --pool")


def _request(scenario: Scenario, source: TileSource | None, pool: Path | None) -> dict[str, object]:
    """What decides the result: another request is another run."""
    request: dict[str, object] = {"scenario": scenario.model_dump(mode="json")}
    if source is not None:
        request["tiles"] = str(source.folder.resolve())
        request["labels"] = str(source.labels.resolve())
        request["content"] = source.fingerprint()
        request["columns"] = {name: list(names) for name, names in asdict(source.columns).items()}
    if pool is not None:
        request["pool"] = table_fingerprint(pool)
    return request
