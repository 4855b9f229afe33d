"""What each site costs the coordinator in a round of the default rule, before and now, in one run.

Updates of drawn numbers lie on disk as in a round; timed is what comes after they arrived: weights,
sum, momentum, alignment steps and the check of the step, on the embedded foundation and the layers
of scenario ``many-small``. Before, each update was measured by a margin of its own; now one
gradient serves all. What a site adds is the slope between the smallest and the largest number of
sites; of the old way, whose margins all take the same time, those given by ``--old``.

    python benchmarks/round_at_coordinator.py --sites 3 30 100 --old 1 3 --out results/round.json
"""

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from distributed_table import commit
from torch import Tensor

from crafts_core.exchange import RoundReply, global_norm
from crafts_core.foundation import embedded_path, load
from crafts_core.plan_sections import AdapterConfig, AggregationConfig, Factor
from crafts_core.starting_point import initial_state
from crafts_core.state import State, add_delta, factor_names
from crafts_server.aggregation import (
    AlignmentRegularized,
    PublicProbe,
    RoundState,
    SiteUpdate,
    aggregate,
)
from crafts_server.probe import FoundationProbe, ProbeSize
from crafts_server.spool import UpdateSpool
from crafts_simulations.scenario import load_scenario

HASH = "0" * 64


class AsBefore:
    """A margin for each update, where now there is one gradient."""

    def __init__(self, probe: PublicProbe, start: RoundState, updates: list[SiteUpdate]) -> None:
        self._probe, self._start, self._updates = probe, start, updates

    def margin(self, state: Mapping[str, Tensor]) -> float:
        return self._probe.margin(state)

    def margin_gradient(self, state: Mapping[str, Tensor], factor: Factor) -> State:  # noqa: ARG002
        for update in self._updates:
            self._probe.margin(add_delta(state, update.read_delta()))
        return {name: torch.zeros_like(t) for name, t in self._updates[0].read_delta().items()}

    def alignment_gradient(self, state: Mapping[str, Tensor], factor: Factor) -> State:
        return self._probe.alignment_gradient(state, factor)


def reply(number: int, delta: State) -> RoundReply:
    """As honest as a drawn update can be."""
    return RoundReply(
        site=f"site-{number:03d}",
        run_id="run",
        plan_hash=HASH,
        round=1,
        checkpoint_hash=HASH,
        schema_hash=HASH,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        steps=1,
        sample_rate=0.5,
        declared_patients=100,
        update_norm=global_norm(delta),
    )


class Bench:
    """The probe and a state, made once."""

    def __init__(self, wanted: argparse.Namespace) -> None:
        scenario = load_scenario("many-small")
        adapter = AdapterConfig.model_validate(
            scenario.adapter.model_dump() | {"first_factor": "random"}
        )
        foundation = load(embedded_path())
        self.probe = FoundationProbe(foundation, adapter, seed=7, size=ProbeSize())
        self.state = initial_state(foundation, adapter, 7)
        self.margin = self.probe.margin(self.state)
        self.config = AggregationConfig(rule="alignment_regularized", min_sites=1)
        self.folder = wanted.folder

    def seconds(self, num_sites: int, *, as_before: bool) -> tuple[float, float]:
        """Wall clock and processor time of one round's aggregation."""
        start = RoundState(state=self.state, server_state={}, factor="second", margin=self.margin)
        spool = UpdateSpool(self.folder / "spool")
        generator = torch.Generator().manual_seed(num_sites)
        updates = []
        for number in range(num_sites):
            delta = {
                name: 1e-3 * torch.randn(self.state[name].shape, generator=generator)
                for name in factor_names(self.state, "second")
            }
            said = reply(number, delta)
            read = spool.add(said.site, delta)
            updates.append(SiteUpdate(reply=said, noise_variance=1e-6, read_delta=read))
        probe: PublicProbe = self.probe.for_round(1)
        if as_before:
            probe = AsBefore(probe, start, updates)
        rule = AlignmentRegularized(self.config)
        began, worked = time.perf_counter(), time.process_time()
        aggregate(rule, start, updates, probe, max_weight_per_share=2.0)
        return time.perf_counter() - began, time.process_time() - worked


def per_site(rows: list[dict[str, Any]], what: str) -> float:
    """The slope between the fewest and the most sites."""
    first, last = rows[0], rows[-1]
    return float((last[what] - first[what]) / (last["sites"] - first["sites"]))


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sites", type=int, nargs="+", default=[3, 30, 100])
    parser.add_argument("--old", type=int, nargs="+", default=[1, 3], help="sites as before")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, help="write the numbers here, as JSON")
    wanted = parser.parse_args()
    torch.set_num_threads(wanted.threads)
    rows: dict[str, list[dict[str, Any]]] = {"before": [], "now": []}
    with tempfile.TemporaryDirectory() as folder:
        wanted.folder = Path(folder)
        bench = Bench(wanted)
        bench.seconds(1, as_before=False)  # warm
        for name, numbers in (("now", wanted.sites), ("before", wanted.old)):
            for number in numbers:
                wall, processor = bench.seconds(number, as_before=name == "before")
                rows[name].append({"sites": number, "wall_s": wall, "processor_s": processor})
    slopes = {
        f"{name}_{what}_per_site": per_site(found, what)
        for name, found in rows.items()
        for what in ("wall_s", "processor_s")
    }
    ratio = slopes["before_processor_s_per_site"] / max(slopes["now_processor_s_per_site"], 1e-4)
    result = {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "commit": commit(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
        "threads": wanted.threads,
        "rows": rows,
        **slopes,
        "processor_time_of_a_site_before_over_now": ratio,
    }
    print(json.dumps(result, indent=1))
    if wanted.out is not None:
        wanted.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
