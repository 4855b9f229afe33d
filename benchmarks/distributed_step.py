"""What a step over several hospitals costs beside a plain exchange: seconds of a round, and bytes.

``crafts-server serve`` and three ``crafts-client join``, real programs on loopback with TLS, train
plans of both kinds by turns, so that what else the machine does falls on both. They differ in
nothing but the trust: in a plain round each site adds all noise and sends its update at half
precision; in a distributed one sites say that they are ready, and the members then send masked
vectors. A round is everything between two checkpoints: signed messages, one private step on a few
tiles, ledger, witness, verification, aggregation and the public probe. Sites poll, so a round is
mostly waiting, and a distributed step waits twice. Each plan's first round is left out (start-up).

    python benchmarks/distributed_step.py --rank 64 --out results/distributed-step.json
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from crafts_core.foundation import embedded_path, load
from crafts_core.plan import Plan
from crafts_core.starting_point import initial_state
from crafts_server.receipts import RoundReceipt
from crafts_simulations.processes import Programs
from crafts_simulations.small_study import make_small_study

NUM_SITES = 3
AT_MOST = 2.2
OF_SUMS: dict[str, dict[str, object]] = {
    "privacy": {"trust": "distributed", "colluding_sites": 1, "sum_grid_bits": 20},
    "aggregation": {"secure_aggregation": True},
}
SMALL_PART: dict[str, object] = {"target_epsilon": 1.0, "delta": 1e-4}
"""Of the lifetime budget that all plans of a call share at a site."""
ONLY_OF_SUMS = {
    "privacy": ("trust", "colluding_sites", "sum_grid_bits"),
    "aggregation": ("secure_aggregation", "masked_deadline_s", "max_attempts", "diagnose_after"),
}


def both_kinds(plan: Plan, turn: int) -> dict[str, Plan]:
    """The plan of sums, and the same without; of every turn their own, as a plan has one run."""
    values = json.loads(plan.to_json())
    values["study"]["seed"] = turn
    plain = json.loads(json.dumps(values))
    for section, keys in ONLY_OF_SUMS.items():
        for key in keys:
            del plain[section][key]
    return {"plain": Plan.parse(plain), "distributed": Plan.parse(values)}


def rounds_of(folder: Path, rank: int, rounds: int, turns: int) -> dict[str, list[RoundReceipt]]:
    """Receipts of all rounds but each plan's first, by kind."""
    study = make_small_study(
        *(folder, load(embedded_path())),
        num_sites=NUM_SITES,
        min_sites=NUM_SITES,
        rounds=rounds,
        rank=rank,
        privacy=SMALL_PART | OF_SUMS["privacy"],
        aggregation=OF_SUMS["aggregation"],
    )
    found: dict[str, list[RoundReceipt]] = {"plain": [], "distributed": []}
    with Programs(study.coordinator, study.sites, folder / "logs") as programs:
        programs.start_coordinator()
        for name in study.sites:
            programs.enrol(name)
            programs.start_site(name)
        for turn in range(turns):
            for kind, plan in both_kinds(study.plan, turn).items():
                programs.approve_roster(plan)
                programs.train(plan)
                programs.wait(
                    lambda plan=plan: programs.is_finished(plan), f"{kind} has no end", within_s=900
                )
                chain = programs.chain(plan)
                assert len(chain) == rounds + 1, f"{kind}: rounds are missing"
                found[kind] += [checkpoint.receipt() for checkpoint in chain[2:]]
    for receipt in found["distributed"]:
        (only,) = receipt.sums
        assert len(only.members) == NUM_SITES, "a step was not over all sites"
        assert not only.missing, "a step was not over all sites"
    assert all(len(receipt.sites) == NUM_SITES for receipt in found["plain"])
    return found


def told(receipts: list[RoundReceipt], num_values: int) -> dict[str, Any]:
    """Figures of one kind of round."""
    seconds = [receipt.seconds for receipt in receipts]
    up = statistics.median(receipt.bytes_up for receipt in receipts)
    return {
        "seconds": seconds,
        "median_seconds": statistics.median(seconds),
        "bytes_up_per_number": up / (NUM_SITES * num_values),
    }


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rank", type=int, default=64, help="of the LoRA that travels")
    parser.add_argument("--rounds", type=int, default=5, help="of each plan")
    parser.add_argument("--turns", type=int, default=2, help="plans of each kind")
    parser.add_argument("--out", type=Path, help="write the numbers here, as JSON")
    wanted = parser.parse_args()
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name:
        found = rounds_of(Path(name), wanted.rank, wanted.rounds, wanted.turns)
        foundation = load(embedded_path())
        plan = make_small_study(Path(name) / "shape", foundation, rank=wanted.rank).plan
        state = initial_state(foundation, plan.adapter, plan.study.seed)
    numbers = sum(tensor.numel() for key, tensor in state.items() if key.endswith(".second"))
    kinds = {kind: told(receipts, numbers) for kind, receipts in found.items()}
    ratio = kinds["distributed"]["median_seconds"] / kinds["plain"]["median_seconds"]
    result = {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "load_before_and_after": [load_before, os.getloadavg()[0]],
        "transport": "real programs, loopback, TLS",
        "sites": NUM_SITES,
        "numbers": numbers,
        **kinds,
        "seconds_ratio": ratio,
        "at_most": AT_MOST,
        "holds": ratio <= AT_MOST,
    }
    print(json.dumps(result, indent=1))
    if wanted.out is not None:
        wanted.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
