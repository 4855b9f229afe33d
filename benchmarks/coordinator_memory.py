"""Peak memory of the coordinator with 3 and with 12 sites, in one run.

The whole round loop on the embedded foundation, every weight of the denoiser trained, so that an
update is as large as the model. Sites are closed formulas in the same process that make their
answer when it is asked for, so what grows with their number would be the coordinator's. Each number
of sites has a process of its own; reported is the rise of peak resident memory over the moment
before the first round (Linux).

    python benchmarks/coordinator_memory.py --sites 3 12 --out results/memory.json
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from crafts_core.array_bytes import PACKED, packed, unpacked
from crafts_core.exchange import RoundReply, RoundRequest, global_norm, schema_hash
from crafts_core.foundation import embedded_path, load
from crafts_core.plan import Plan
from crafts_core.starting_point import initial_state
from crafts_core.state import State
from crafts_server.cohort_sizes import CohortSizes
from crafts_server.collection import Patience
from crafts_server.coordinator import Coordinator
from crafts_server.home import CoordinatorHome, HomeConfig
from crafts_simulations.local_grid import LocalGrid, LocalNode, TurnsHere


def site(number: int, like: State) -> ClientApp:
    """Answers with a thousandth of the adapter that it got."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:  # noqa: ARG001
        request = RoundRequest.from_scalars(dict(message.content.config_records["request"]))
        arrays = message.content.array_records["adapter"]
        state = unpacked({name: array.data for name, array in arrays.items()}, like)
        delta = {name: (tensor * 1e-3).half().float() for name, tensor in state.items()}
        values = {
            "site": f"site-{number}",
            "run_id": request.run_id,
            "plan_hash": request.plan_hash,
            "round": request.round,
            "checkpoint_hash": request.checkpoint_hash,
            "schema_hash": schema_hash(delta),
            "noise_multiplier": 0.0,
            "max_grad_norm": 1e3,
            "steps": 1,
            "sample_rate": 0.5,
            "declared_patients": 100,
            "update_norm": global_norm(delta),
        }
        reply = RoundReply.from_scalars(values)
        sent = ArrayRecord({PACKED: Array.from_numpy_ndarray(packed(delta, torch.float16))})
        content = RecordDict({"reply": ConfigRecord(dict(reply.to_scalars())), "delta": sent})
        return Message(content, reply_to=message)

    return app


def plan(foundation: str, num_sites: int) -> Plan:
    """One round of all weights, without privacy: nothing is trained here."""
    stage = {"name": "pretraining", "rounds": 2, "local_steps": 1, "learning_rate": 1.0}
    privacy = {
        "mechanism": "none",
        "max_grad_norm": 1e3,
        "sample_rate": 0.5,
        "tiles_per_patient": 1,
        "draws_per_tile": 1,
    }
    return Plan.parse(
        {
            "study": {"name": "memory", "foundation": foundation, "seed": 1},
            "adapter": {"kind": "full"},
            "stage": [stage],
            "privacy": privacy,
            "aggregation": {"rule": "uniform", "min_sites": num_sites},
        }
    )


def measure(num_sites: int) -> dict[str, Any]:
    """In this process: peak memory before and after two rounds."""
    foundation = load(embedded_path())
    with tempfile.TemporaryDirectory() as folder:
        home = CoordinatorHome.create(Path(folder), HomeConfig())
        asked = plan(foundation.manifest.hash, num_sites)
        like = initial_state(foundation, asked.adapter, asked.study.seed)
        nodes = {
            f"site-{number}": LocalNode(app=site(number, like), node_config={})
            for number in range(num_sites)
        }
        registry = home.registry()
        for name in nodes:
            CohortSizes(registry).agree(name, 100)
        registry.close()
        now = Patience(poll_s=0.0, join_wait_s=0.0)
        coordinator = Coordinator(home, asked, foundation, patience=now)
        before = _peak_bytes()
        chain = coordinator.run(LocalGrid(TurnsHere(nodes)))
        used = len(chain.receipt().sites)
    update = 4 * sum(tensor.numel() for tensor in like.values())
    return {"sites": used, "rise_bytes": _peak_bytes() - before, "update_bytes": update}


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sites", type=int, nargs="+", default=[3, 12])
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="write the numbers here, as JSON")
    wanted = parser.parse_args()
    if wanted.measure is not None:
        print(json.dumps(measure(wanted.measure)))
        return
    rows = []
    for number in wanted.sites:
        command = [sys.executable, __file__, "--measure", str(number)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    result = {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "rows": rows,
        "ratio": rows[-1]["rise_bytes"] / rows[0]["rise_bytes"],
    }
    print(json.dumps(result, indent=1))
    if wanted.out is not None:
        wanted.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
