"""The rounds of a simulated study, and the generator they end in.

The coordinator is ``crafts_server``'s ServerApp, every site ``crafts_client``'s ClientApp; between
them is a local grid, or the real programs with TLS on loopback.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from flwr.app import Context, RecordDict

from crafts_server.checkpoints import Checkpoint
from crafts_server.collection import Patience
from crafts_server.coordinator import Coordinator
from crafts_server.export import export_generator
from crafts_server.home import CoordinatorHome
from crafts_server.receipts import RoundReceipt
from crafts_server.server_app import make_server_app
from crafts_simulations.agreement import agree_on_patients, approve_roster
from crafts_simulations.errors import ProcessError
from crafts_simulations.local_grid import LocalGrid, Turns, TurnsHere
from crafts_simulations.logs import is_shown
from crafts_simulations.process_crew import ProcessCrew, environment_of
from crafts_simulations.processes import Programs
from crafts_simulations.ray_crew import RayCrew
from crafts_simulations.repeatable import NOT_PRIVATE
from crafts_simulations.site_bench import SiteBench, SiteWork
from crafts_simulations.study import LocalStudy
from crafts_simulations.turn_pool import TurnPool

_LONGEST_S = 7 * 24 * 3600.0


def federate(study: LocalStudy, home: CoordinatorHome) -> list[Checkpoint]:
    """Run the plan's rounds with Flower's ServerApp and ClientApps on a local grid.

    Returns:
        All checkpoints, round 0 first.
    """
    plan, progress = study.plan, study.progress
    done = [0]

    def on_turn(name: str) -> None:
        progress(f"training, round {done[0] + 1} at {name}", done[0], plan.num_rounds)

    def on_round(receipt: RoundReceipt) -> None:
        done[0] = receipt.round
        progress("training", receipt.round, plan.num_rounds)

    sites = [study.workspace.site(name) for name in study.scenario.participants]
    agree_on_patients(home, sites)
    coordinator = Coordinator(
        home,
        plan,
        study.foundation,
        patience=Patience(poll_s=0.0, join_wait_s=0.0),
        on_round=on_round,
    )
    approve_roster(home, plan, sites)
    done[0] = max(len(coordinator.chain()) - 1, 0)
    progress("training", done[0], plan.num_rounds)
    context = Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config={})
    with _turns(study, on_turn) as turns:
        grid = LocalGrid(turns)
        make_server_app(coordinator)(grid, context)
        coordinator.run(grid)
    return coordinator.chain()


def federate_with_processes(study: LocalStudy, home: CoordinatorHome) -> list[Checkpoint]:
    """The same rounds by the programs that hospitals run.

    Returns:
        All checkpoints, round 0 first.
    """
    plan, progress, names = study.plan, study.progress, study.scenario.participants
    sites = {name: study.workspace.site(name) for name in names}
    with Programs(home, sites, study.workspace.path / "logs") as programs:
        progress("starting the coordinator", 0, 1)
        programs.start_coordinator()
        for name in names:
            programs.enrol(name)
        programs.approve_roster(plan)
        for name in names:
            programs.start_site(name)
        progress("starting the coordinator", 1, 1)
        programs.train(plan)

        def is_over() -> bool:
            progress("training", max(len(programs.chain(plan)) - 1, 0), plan.num_rounds)
            return programs.is_finished(plan)

        programs.wait(is_over, "the study did not end", within_s=_LONGEST_S)
        chain = programs.chain(plan)
    if len(chain) - 1 != plan.num_rounds:
        raise ProcessError(f"the study ended early; see {study.workspace.path / 'logs'}")
    return chain


@contextmanager
def _turns(study: LocalStudy, on_turn: Callable[[str], None]) -> Iterator[Turns]:
    """In this process, on processes beside it, or on Ray."""
    names, count = study.scenario.participants, study.num_trainers
    work = SiteWork(
        foundation=study.foundation_name,
        device=study.device,
        homes={name: study.workspace.site(name).resolve() for name in names},
        repeatable_seed=study.repeatable_seed,
        holds_sums=study.plan.aggregation.secure_aggregation,
        is_verbose=is_shown(),
    )
    if study.ray is None and count == 1:
        bench = SiteBench(work, study.foundation)
        yield TurnsHere({name: bench.node(name) for name in names}, on_turn=on_turn)
        return
    crew: ProcessCrew | RayCrew
    if study.ray is not None:
        crew = RayCrew(work, study.ray, num_places=count)
        num_places = crew.num_places
    else:
        num_places = min(count or 1, len(names))
        place = partial(environment_of, num_places=num_places, device=study.device)
        crew = ProcessCrew(work.bench, place)
    with TurnPool(crew, names, num_places=num_places, on_turn=on_turn) as pool:
        yield pool


def export(study: LocalStudy, chain: Sequence[Checkpoint]) -> None:
    """``generator/`` and, for LoRA, ``adapter.safetensors``."""
    workspace = study.workspace
    is_lora = study.plan.gives_lora and study.foundation.generator.kind.reads_lora
    if workspace.generator.is_dir() and (workspace.adapter.exists() or not is_lora):
        return
    study.progress("writing the generator", 0, 1)
    export_generator(
        chain,
        plan=study.plan,
        foundation=study.foundation,
        directory=workspace.generator,
        lora=workspace.adapter if is_lora else None,
        num_sites=len(study.scenario.participants),
        named_sites=study.scenario.participants,
        not_private=None if study.repeatable_seed is None else NOT_PRIVATE,
    )
    study.progress("writing the generator", 1, 1)
