"""What a private training step takes on a machine that others use, in units of its fair share.

Processes that only count are started beside it, several to a core. With B of them on C cores, C
threads of ours get C of B + C shares, so a step may take (B + C) / C times as long as alone. *Ours*
is how a site trains: passes of 8 tiles, a core for each at a time. Beside it passes of 16 tiles,
one after the other, on all cores or on one, with other ways of waiting.

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
    "ours": OURS | {"SIDE_BY_SIDE": "1"},
    "all threads": OURS,
    "one thread": OURS | {"ONE": "1"},
    "all, asleep at once": {"OMP_WAIT_POLICY": "passive"},
    "torch's own": {},
}
COUNT = """
import os
parent = os.getppid()
while os.getppid() == parent:
    for _ in range(10_000_000):
        pass
"""
STEP = """
import os, sys, time
import numpy, torch
from crafts_core.adapters import Adapter
from crafts_core.foundation import embedded_path, load
from crafts_core.plan import AdapterConfig
from crafts_core.threads import side_by_side
from crafts_privacy.gradients import GroupGradients
from crafts_privacy.mechanism import Mechanism
from crafts_privacy.noise import GridNoise
from crafts_privacy.optimizers import Momentum
from crafts_privacy.patient_sgd import PatientSGD

PATIENTS, TILES = 4, 4
torch.set_num_threads(1 if "ONE" in os.environ else int(sys.argv[1]))
num_passes = torch.get_num_threads() if "SIDE_BY_SIDE" in os.environ else 1
unet = load(embedded_path()).generator.denoiser
config = AdapterConfig(kind="lora", rank=4, targets=("to_v", "conv1"), first_factor="random")
adapter = Adapter.attach(unet, config)
parameters = adapter.trainable("second")
side, width = unet.config.sample_size, unet.config.cross_attention_dim

class Everybody:
    def sample(self, num_patients, sample_rate):
        return numpy.arange(num_patients)

def loss(places):
    rows = len(places) * TILES
    latents = torch.randn(rows, unet.config.in_channels, side, side)
    times = torch.randint(0, 999, (rows,))
    predicted = adapter.predict(latents, times, torch.randn(rows, 40, width))
    return predicted.square().flatten(1).mean(1) / TILES

optimizer = PatientSGD(
    parameters,
    Mechanism(noise_multiplier=1, max_grad_norm=1e-3, sample_rate=1, expected_patients=PATIENTS),
    learning_rate=1e-4, optimizer=Momentum(0.9), noise=GridNoise(), sampler=Everybody(),
)
size = (8 if "SIDE_BY_SIDE" in os.environ else 16) // TILES
network, weights = adapter.network, list(parameters.values())
with (
    GroupGradients(network, weights, num_patients=size, num_tiles=TILES) as gradients,
    side_by_side(num_passes) as run,
):
    def step():
        optimizer.step_in_groups(PATIENTS, loss, gradients, run)
    step()
    print("ready", flush=True)
    sys.stdin.readline()
    started, steps = time.perf_counter(), 0
    while not steps or time.perf_counter() - started < float(sys.argv[2]):
        step()
        steps += 1
    print((time.perf_counter() - started) / steps)
"""


@contextmanager
def busy(count: int) -> Iterator[None]:
    """Processes that never wait, and end with this one whatever ends it."""
    running = [subprocess.Popen([sys.executable, "-c", COUNT]) for _ in range(count)]
    try:
        yield
    finally:
        for process in running:
            process.kill()


def seconds_a_step(
    environment: dict[str, str], threads: int, seconds: float, num_busy: int
) -> float:
    """Of a new process, since OpenMP reads its settings once; beside so many others."""
    inherited = {
        name: value for name, value in os.environ.items()
        if name not in (*SETTINGS, "OMP_NUM_THREADS")
    }  # fmt: skip
    words = [sys.executable, "-c", STEP, str(threads), str(seconds)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(words, env=inherited | environment, **pipes) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with busy(num_busy):
            taken, _ = process.communicate("go\n")
    return float(taken)


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
            alone[name].append(seconds_a_step(environment, cores, chosen.seconds, 0))
            beside[name].append(seconds_a_step(environment, cores, chosen.seconds, chosen.busy))
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
