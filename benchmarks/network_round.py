"""What a round costs beyond training: bytes on the wire and time, beside a bare Flower round.

Both run in one call, on loopback, with TLS, through the same kind of SuperLink:

* ``ours``: ``crafts-server serve`` and two ``crafts-client join`` (real programs). A round includes
  reading and checking signed messages, one private step on a few tiles, the ledger, the witness,
  verification, aggregation, the public probe and a signed checkpoint.
* ``bare Flower``: FedAvg from ``flwr.serverapp.strategy`` on the same Grid and two stock SuperNodes
  that start a ClientApp for each message; the app sends the arrays back and trains nothing.

Bytes are counted on the TCP connection of one of our sites, both ways, so TLS, HTTP and protobuf
are in; what its polling costs while nothing happens is measured before and taken off. (An echo has
no bytes to compare: Flower does not send again what it has stored.) The first round is left out of
both (start-up).

    python benchmarks/network_round.py --rank 64 --rounds 4 --out results/network.json
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from flwr.app import Array, ArrayRecord
from flwr.cli.build import build_fab_from_disk
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.fab import Fab

from crafts_client.home import SiteHome
from crafts_core.foundation import embedded_path, load
from crafts_core.starting_point import initial_state
from crafts_core.state import State
from crafts_server import superlink
from crafts_server.pki import Pki
from crafts_simulations.faults.link import Link
from crafts_simulations.processes import Programs
from crafts_simulations.small_study import make_small_study

IDLE_S = 20.0
APP = """\
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message, context):
    metrics = MetricRecord({"num-examples": 1})
    content = RecordDict({"arrays": message.content["arrays"], "metrics": metrics})
    return Message(content, reply_to=message)
"""
PROJECT = """\
[project]
name = "bare"
version = "1.0.0"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "bench"

[tool.flwr.app.components]
serverapp = "none:app"
clientapp = "echo:app"
"""


def ours(folder: Path, rank: int, rounds: int) -> dict[str, Any]:
    """Seconds of each round and bytes a round, of the real programs."""
    foundation = load(embedded_path())
    study = make_small_study(folder, foundation, rounds=rounds, rank=rank)
    state = initial_state(foundation, study.plan.adapter, study.plan.study.seed)
    with Programs(study.coordinator, study.sites, folder / "logs") as programs:
        programs.start_coordinator()
        for name in study.sites:
            programs.enrol(name)
        with Link(study.coordinator.config.fleet_port) as link:
            site = SiteHome.open(study.sites["site-1"])
            record = json.loads(site.coordinator_path.read_text())
            record["fleet_address"] = f"localhost:{link.port}"
            site.coordinator_path.write_text(json.dumps(record))
            for name in study.sites:
                programs.start_site(name)
            time.sleep(15)
            idle = idle_rate(link)
            programs.train(study.plan)
            programs.wait(
                lambda: len(programs.chain(study.plan)) > 1, "no first round", within_s=300
            )
            before, started = (link.bytes_in, link.bytes_out), time.monotonic()
            programs.wait(lambda: programs.is_finished(study.plan), "no end", within_s=900)
            took, after = time.monotonic() - started, (link.bytes_in, link.bytes_out)
        receipts = [checkpoint.receipt() for checkpoint in programs.chain(study.plan)[1:]]
    up, down = (
        (later - earlier - rate * took) / (rounds - 1)
        for later, earlier, rate in zip(after, before, idle, strict=True)
    )
    trained = sum(t.numel() for name, t in state.items() if name.endswith(".second"))
    return {
        "seconds": [receipt.seconds for receipt in receipts[1:]],
        "bytes_up": up,
        "bytes_down": down,
        "adapter_bytes_up": 2 * trained,
        "adapter_bytes_down": 2 * sum(tensor.numel() for tensor in state.values()),
        "num_tensors": len(state),
    }


def bare_flower(folder: Path, state: State, rounds: int) -> dict[str, Any]:
    """Seconds of FedAvg rounds with stock SuperNodes and the same adapter."""
    folder.mkdir()
    pki = Pki.create(folder / "pki", ["localhost"])
    link = superlink.SuperLink(database=folder / "link.db", pki=pki, host="127.0.0.1", port=0)
    link.start()
    half = {name: tensor.half().numpy() for name, tensor in state.items()}
    arrays = ArrayRecord({name: Array.from_numpy_ndarray(value) for name, value in half.items()})
    fab = _fab(folder / "app")
    superlink._bundle = lambda: fab  # the one difference: code in the bundle
    marks: list[float] = []
    try:
        with _stock_nodes(folder, pki, link):
            while len(link.online) < 2:
                time.sleep(0.5)

            def mark(*_: object) -> None:
                marks.append(time.monotonic())

            strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=2, min_available_nodes=2)
            with link.grid() as grid:
                strategy.start(
                    grid=grid, initial_arrays=arrays, num_rounds=rounds, evaluate_fn=mark
                )
    finally:
        link.stop()
    # The marks: before the first round, then after each.
    return {"seconds": [after - before for before, after in itertools.pairwise(marks[1:])]}


def idle_rate(link: Link) -> tuple[float, float]:
    """Bytes a second, up and down, while nothing happens."""
    before = (link.bytes_in, link.bytes_out)
    time.sleep(IDLE_S)
    up, down = link.bytes_in - before[0], link.bytes_out - before[1]
    return up / IDLE_S, down / IDLE_S


@contextmanager
def _stock_nodes(folder: Path, pki: Pki, link: superlink.SuperLink) -> Iterator[None]:
    """Two SuperNodes as Flower ships them."""
    nodes = []
    program = Path(sys.executable).with_name("flower-supernode")
    for number in range(2):
        key = ec.generate_private_key(ec.SECP256R1())
        public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
        link.admit(f"node-{number}", public)
        path = folder / f"node-{number}.key"
        path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
        command = [str(program), "--superlink", f"localhost:{link.port}"]
        command += ["--root-certificates", str(pki.ca_path)]
        command += ["--auth-supernode-private-key", str(path), "--port", str(29500 + number)]
        with (folder / f"node-{number}.log").open("wb") as log:
            home = {
                "FLWR_HOME": str(folder / f"flower-{number}"),
                "PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}",
            }
            nodes.append(subprocess.Popen(command, env=os.environ | home, stdout=log, stderr=log))
    try:
        yield
    finally:
        for node in nodes:
            node.terminate()
            node.wait(timeout=30)


def _fab(folder: Path) -> Fab:
    folder.mkdir()
    (folder / "pyproject.toml").write_text(PROJECT)
    (folder / "echo.py").write_text(APP)
    (folder / "none.py").write_text("app = None\n")
    content = build_fab_from_disk(folder)
    return Fab(sha256(content).hexdigest(), content, {})


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rank", type=int, default=64, help="of the LoRA that travels")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--out", type=Path, help="write the numbers here, as JSON")
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        foundation = load(embedded_path())
        plan = make_small_study(folder / "shape", foundation, rank=wanted.rank).plan
        state = initial_state(foundation, plan.adapter, plan.study.seed)
        result: dict[str, Any] = {
            "date": f"{datetime.now(UTC):%Y-%m-%d}",
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "rank": wanted.rank,
            "ours": ours(folder / "ours", wanted.rank, wanted.rounds),
            "bare_flower": bare_flower(folder / "bare", state, wanted.rounds),
        }
    for who in ("ours", "bare_flower"):
        result[who]["median_seconds"] = statistics.median(result[who]["seconds"])
    for way in ("up", "down"):
        sent = result["ours"]
        sent[f"bytes_{way}_ratio"] = sent[f"bytes_{way}"] / sent[f"adapter_bytes_{way}"]
    result["seconds_ratio"] = (
        result["ours"]["median_seconds"] / result["bare_flower"]["median_seconds"]
    )
    print(json.dumps(result, indent=1))
    if wanted.out is not None:
        wanted.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
