"""What a round takes with sites on several processes, in units of what it takes on one, in one run.

Small hospitals on the embedded foundation, each arm with homes of its own. First rounds are left
out: processes start in them and sites make their checks. Beside it, the memory of the largest
process as it serves more sites (Linux). Other busy processes spoil the ratio: several processes get
more of a machine than one.

    python benchmarks/parallel_sites.py --sites 16 --workers 2 --out results/parallel-sites.json
"""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from datetime import UTC, datetime
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch

from crafts_core.foundation import Foundation, embedded_path, load
from crafts_core.plan import Plan
from crafts_server.collection import Patience
from crafts_server.coordinator import Coordinator
from crafts_simulations.local_grid import LocalGrid, Turns, TurnsHere
from crafts_simulations.process_crew import ProcessCrew, environment_of
from crafts_simulations.site_bench import SiteBench, SiteWork
from crafts_simulations.small_study import SmallStudy, make_small_study
from crafts_simulations.turn_pool import TurnPool


def run(study: SmallStudy, foundation: Foundation, turns: Turns) -> list[float]:
    """Seconds of each round but the first."""
    ends: list[float] = []
    coordinator = Coordinator(
        study.coordinator,
        study.plan,
        foundation,
        patience=Patience(poll_s=0.0, join_wait_s=0.0),
        on_round=lambda _: ends.append(time.perf_counter()),
    )
    coordinator.run(LocalGrid(turns))
    return [later - earlier for earlier, later in pairwise(ends)]


def make(folder: Path, foundation: Foundation, wanted: argparse.Namespace) -> SmallStudy:
    """Homes, and a plan of as many steps as asked for."""
    study = make_small_study(
        folder, foundation, num_sites=wanted.sites, rounds=wanted.rounds, min_sites=wanted.sites
    )
    values = study.plan.model_dump(mode="json")
    values["stage"][0]["local_steps"] = wanted.steps
    return SmallStudy(coordinator=study.coordinator, sites=study.sites, plan=Plan.parse(values))


def _rss_bytes(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sites", type=int, default=16)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=8, help="local steps of a round, at most 10")
    parser.add_argument("--out", type=Path, help="write the numbers here, as JSON")
    wanted = parser.parse_args()
    foundation = load(embedded_path())
    memory: list[tuple[int, int]] = []

    def on_turn(_site: str) -> None:
        children = multiprocessing.active_children()
        memory.append((len(memory), max((_rss_bytes(c.pid or 0) for c in children), default=0)))

    with tempfile.TemporaryDirectory() as folder:
        studies = [make(Path(folder) / name, foundation, wanted) for name in ("one", "many")]
        here, beside = (
            SiteWork(
                foundation="embedded",
                device="cpu",
                homes=study.sites,
                repeatable_seed=None,
                holds_sums=False,
                is_verbose=False,
            )
            for study in studies
        )
        bench = SiteBench(here, foundation)
        nodes = {name: bench.node(name) for name in studies[0].sites}
        environment = partial(environment_of, num_places=wanted.workers, device="cpu")
        crew = ProcessCrew(beside.bench, environment)
        seconds = {"one": run(studies[0], foundation, TurnsHere(nodes))}
        names, count = list(studies[1].sites), wanted.workers
        with TurnPool(crew, names, num_places=count, on_turn=on_turn) as pool:
            seconds["many"] = run(studies[1], foundation, pool)
    result = {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        **{name: value for name, value in vars(wanted).items() if name != "out"},
        "seconds_a_round": seconds,
        "ratio": statistics.median(seconds["many"]) / statistics.median(seconds["one"]),
        "memory_bytes_by_turns_begun": memory,
    }
    print(json.dumps(result, indent=1))
    if wanted.out is not None:
        wanted.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
