"""What a training step takes on a machine that others use, in units of its fair share.

Processes that only count are started beside it, several to a core. With B of them on C cores, C
threads of ours get C of B + C shares, so a step may take (B + C) / C times as long as alone. Beside
it the same without our setting, as torch waits by itself.

    python benchmarks/contention.py --busy 8
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
OURS = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "3000"}
ARMS = {
    "ours": OURS | {"CHOOSE": "1"},
    "all threads": OURS,
    "one thread": OURS | {"ONE": "1"},
    "all, asleep at once": {"OMP_WAIT_POLICY": "passive"},
    "torch's own": {},
}
STEP = """
import os, sys, time
from contextlib import nullcontext
import torch
from crafts_core.foundation import embedded_path, load
from crafts_core.threads import quickest_threads
torch.set_num_threads(1 if "ONE" in os.environ else int(sys.argv[1]))
unet = load(embedded_path()).generator.unet.requires_grad_(True)
shape = (16, unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
latents, text = torch.randn(shape), torch.randn(16, 40, unet.config.cross_attention_dim)
t = torch.randint(0, 999, (16,))
def step():
    unet(latents, t, text).sample.square().mean().backward()
with quickest_threads() if "CHOOSE" in os.environ else nullcontext():
    step()
    started, steps = time.perf_counter(), 0
    while not steps or time.perf_counter() - started < float(sys.argv[2]):
        step()
        steps += 1
    print((time.perf_counter() - started) / steps)
"""


@contextmanager
def busy(count: int) -> Iterator[None]:
    """Processes that never wait."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in running:
            process.kill()


def seconds_a_step(environment: dict[str, str], threads: int, seconds: float) -> float:
    """Of a new process: OpenMP reads its settings once."""
    inherited = {
        name: value for name, value in os.environ.items()
        if name not in (*SETTINGS, "OMP_NUM_THREADS")
    }  # fmt: skip
    words = [sys.executable, "-c", STEP, str(threads), str(seconds)]
    done = subprocess.run(
        words, env=inherited | environment, check=True, stdout=subprocess.PIPE, text=True
    )
    return float(done.stdout)


def main() -> None:
    """Print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--busy", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement")
    parser.add_argument("--repeats", type=int, default=3)
    chosen = parser.parse_args()
    cores = os.cpu_count() or 1
    alone: dict[str, list[float]] = {name: [] for name in ARMS}
    beside: dict[str, list[float]] = {name: [] for name in ARMS}
    for _ in range(chosen.repeats):
        for name, environment in ARMS.items():
            alone[name].append(seconds_a_step(environment, cores, chosen.seconds))
        with busy(chosen.busy):
            for name, environment in ARMS.items():
                beside[name].append(seconds_a_step(environment, cores, chosen.seconds))
    fair = (chosen.busy + cores) / cores
    found = {
        name: {
            "slower_than_alone": statistics.median(beside[name]) / statistics.median(alone[name]),
            "in_fair_shares": statistics.median(beside[name])
            / (fair * statistics.median(alone["torch's own"])),
            "alone_against_torchs_own": statistics.median(alone[name])
            / statistics.median(alone["torch's own"]),
        }
        for name in ARMS
    }
    print(
        json.dumps(
            {"date": time.strftime("%Y-%m-%d"), "cores": cores, "busy": chosen.busy}
            | {name: {key: round(value, 2) for key, value in row.items()}
               for name, row in found.items()}
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
