"""What a masked sum costs: bytes, masking and noise on one core, the coordinator's memory.

Numbers are those of an adapter of 3.2 million numbers among ten sites unless told otherwise. Keys,
words, announcements, masks and noise are the installed ones; what a site adds to is zero, as the
cost does not depend on it. For memory the round loop runs with sites in the same process that make
their vector when it is asked for and keep none, so what grows with their number would be the
coordinator's; each number of sites has a process of its own (Linux).

    OMP_NUM_THREADS=1 python benchmarks/secure_sum.py --out results/secure-sum.json
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from crafts_core.array_bytes import PACKED
from crafts_core.exchange import Announcement, MaskedReply, ReadyReply, RoundRequest, schema_hash
from crafts_core.foundation import embedded_path, load
from crafts_core.plan import Plan
from crafts_core.roster import Roster
from crafts_core.starting_point import initial_state
from crafts_core.state import State, factor_names
from crafts_privacy.noise import GridNoise
from crafts_privacy.plan_noise import plan_noise_multiplier
from crafts_privacy.secure_aggregation.fixed_point import to_group
from crafts_privacy.secure_aggregation.masking import Group, MaskKey, add_masks_, add_up_
from crafts_privacy.secure_aggregation.members import announce, sign_ready, verify_members
from crafts_privacy.secure_aggregation.shares import own_noise_multiplier
from crafts_privacy.signing import public_key_of
from crafts_server.cohort_sizes import CohortSizes
from crafts_server.collection import Patience
from crafts_server.coordinator import Coordinator
from crafts_server.home import CoordinatorHome, HomeConfig
from crafts_server.rosters import Rosters
from crafts_simulations.local_grid import LocalGrid, LocalNode, TurnsHere

PATIENTS = 60
GRID_BITS = 16
STEPS_PER_BOUND = 2.0**GRID_BITS


class Signer:
    """A site's key, and its vector on demand."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.identity = Ed25519PrivateKey.generate()
        self.keys: dict[str, tuple[MaskKey, ReadyReply]] = {}

    def ready(self, request_hash: str, noise_multiplier: float) -> ReadyReply:
        """A word with a fresh key."""
        key = MaskKey()
        word = sign_ready(
            self.identity,
            site=self.name,
            request_hash=request_hash,
            declared_patients=PATIENTS,
            noise_multiplier=noise_multiplier,
            key=key.public_key,
        )
        self.keys[request_hash] = key, word
        return word

    def masked(
        self, announcement: Announcement, roster: Roster, own: float, num_values: int
    ) -> tuple[Group, str]:
        """Noise and masks on a sum of nothing."""
        key, word = self.keys.pop(announcement.request_hash)
        members = verify_members(announcement, roster, word, min_members=2)
        sum_D = torch.zeros(num_values, dtype=torch.float64)
        GridNoise().add_(sum_D, own * STEPS_PER_BOUND)
        vector_D = to_group(sum_D)
        add_masks_(vector_D, key.pair_keys(self.name, members))
        return vector_D, members.hash


def signers(number: int) -> dict[str, Signer]:
    """By name."""
    return {name: Signer(name) for name in (f"site-{place:02d}" for place in range(number))}


def roster_of(sites: dict[str, Signer], plan_hash: str) -> Roster:
    """As hospitals would approve it."""
    return Roster.of(
        plan_hash,
        dict.fromkeys(sites, PATIENTS),
        {name: public_key_of(site.identity) for name, site in sites.items()},
    )


def masking(num_sites: int, num_values: int, repeats: int) -> dict[str, Any]:
    """Processor seconds of one site and of the coordinator, and bytes on the wire."""
    sites = signers(num_sites)
    roster = roster_of(sites, "a" * 64)
    site_s, add_s = [], []
    for repeat in range(repeats):
        announcement = announce([site.ready(f"{repeat:064x}", 1.0) for site in sites.values()])
        total_D = np.zeros(num_values, dtype=np.uint32)
        for site in sites.values():
            started = time.process_time()
            vector_D, _ = site.masked(announcement, roster, 3.0, num_values)
            site_s.append(time.process_time() - started)
            started = time.process_time()
            add_up_(total_D, vector_D)
            add_s.append(time.process_time() - started)
        largest = np.abs(total_D.view(np.int32).astype(np.float64)).max()
        assert largest < 8 * 3.0 * STEPS_PER_BOUND * num_sites**0.5, "the masks are gone"
    up = len(Array.from_numpy_ndarray(vector_D).data)
    down_adapter = 2 * num_values
    return {
        "sites": num_sites,
        "numbers": num_values,
        "repeats": len(site_s),
        "site_s_median": statistics.median(site_s),
        "site_s_worst": max(site_s),
        "add_s_median": statistics.median(add_s),
        "bytes_up_per_number": up / num_values,
        "down_over_adapter": (down_adapter + len(announcement.to_json())) / down_adapter,
    }


def plan_of(foundation: str, num_sites: int) -> Plan:
    """Two rounds of all weights."""
    stage = {"name": "pretraining", "rounds": 2, "local_steps": 1, "learning_rate": 1e-6}
    privacy = {
        "mechanism": "patient_dp",
        "target_epsilon": 8.0,
        "delta": 1e-3,
        "max_grad_norm": 1.0,
        "sample_rate": 0.2,
        "tiles_per_patient": 1,
        "draws_per_tile": 1,
        "trust": "distributed",
        "colluding_sites": 1,
        "sum_grid_bits": GRID_BITS,
    }
    aggregation = {"rule": "uniform", "min_sites": num_sites, "secure_aggregation": True}
    return Plan.parse(
        {
            "study": {"name": "memory", "foundation": foundation, "seed": 1},
            "adapter": {"kind": "full"},
            "stage": [stage],
            "privacy": privacy,
            "aggregation": aggregation,
        }
    )


def app_of(site: Signer, roster: Roster, plan: Plan, like: State) -> ClientApp:
    """The two answers of a site that holds nothing but its keys."""
    app = ClientApp()
    sigma = plan_noise_multiplier(plan)

    @app.train()
    def train(message: Message, context: Context) -> Message:  # noqa: ARG001
        request = RoundRequest.from_scalars(dict(message.content.config_records["request"]))
        word = site.ready(request.hash, sigma)
        content = RecordDict({"ready": ConfigRecord(dict(word.to_scalars()))})
        return Message(content, reply_to=message)

    @app.train("masked")
    def masked(message: Message, context: Context) -> Message:  # noqa: ARG001
        records = message.content.config_records
        request = RoundRequest.from_scalars(dict(records["request"]))
        announcement = Announcement.parse(str(records["announcement"]["json"]))
        trained = {name: like[name] for name in factor_names(like, request.factor)}
        own = own_noise_multiplier(sigma, num_members=len(announcement.members), colluding_sites=1)
        num_values = sum(tensor.numel() for tensor in trained.values())
        vector_D, members_hash = site.masked(announcement, roster, own, num_values)
        reply = MaskedReply(
            site=site.name,
            run_id=request.run_id,
            plan_hash=request.plan_hash,
            round=request.round,
            request_hash=request.hash,
            members_hash=members_hash,
            schema_hash=schema_hash(trained),
            own_noise_multiplier=own,
        )
        content = RecordDict(
            {
                "masked": ConfigRecord(dict(reply.to_scalars())),
                "sum": ArrayRecord({PACKED: Array.from_numpy_ndarray(vector_D)}),
            }
        )
        return Message(content, reply_to=message)

    return app


def memory(num_sites: int) -> dict[str, Any]:
    """In this process: peak memory before and after two rounds."""
    foundation = load(embedded_path())
    sites = signers(num_sites)
    with tempfile.TemporaryDirectory() as folder:
        home = CoordinatorHome.create(Path(folder), HomeConfig())
        plan = plan_of(foundation.manifest.hash, num_sites)
        like = initial_state(foundation, plan.adapter, plan.study.seed)
        roster = roster_of(sites, plan.hash)
        nodes = {
            name: LocalNode(app=app_of(site, roster, plan, like), node_config={})
            for name, site in sites.items()
        }
        registry = home.registry()
        for name, key in roster.identities.items():
            CohortSizes(registry).agree(name, PATIENTS)
            Rosters(registry).publish(name, key)
        registry.close()
        now = Patience(poll_s=0.0, join_wait_s=0.0)
        coordinator = Coordinator(home, plan, foundation, patience=now)
        before = _peak_bytes()
        last = coordinator.run(LocalGrid(TurnsHere(nodes)))
        used = len(last.receipt().sites)
    vector = 4 * sum(tensor.numel() for tensor in like.values())
    return {"sites": used, "rise_bytes": _peak_bytes() - before, "vector_bytes": vector}


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sites", type=int, default=10)
    parser.add_argument("--numbers", type=int, default=3_200_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory-of", type=int, nargs=2, default=[3, 12])
    parser.add_argument("--memory", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="write the numbers here, as JSON")
    wanted = parser.parse_args()
    if wanted.memory is not None:
        print(json.dumps(memory(wanted.memory)))
        return
    rows = []
    for number in wanted.memory_of:
        command = [sys.executable, __file__, "--memory", str(number)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    result = {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "masking": masking(wanted.sites, wanted.numbers, wanted.repeats),
        "memory": rows,
        "memory_ratio": rows[-1]["rise_bytes"] / rows[0]["rise_bytes"],
    }
    print(json.dumps(result, indent=1))
    if wanted.out is not None:
        wanted.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
