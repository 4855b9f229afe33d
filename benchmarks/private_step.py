"""What privacy costs: one private step against one plain step on the same tiles.

Both train the same LoRA on the same randomly initialised UNet with the same optimizer arithmetic.
The private step is ``PatientSGD`` as sites run it: a backward pass per patient, clip, integer grid,
noise from OS entropy. Two plain steps stand beside it:

* ``plain``: all patients' tiles in one batch, ``torch.optim.SGD``;
* ``plain, by patient``: the same without privacy, accumulating one patient at a time, which is how
  one would fit the batch into memory. Privacy alone is the difference to this one.

``private, in groups`` is the private step with several patients to a backward pass, split by
Opacus' hooks, as sites run it where a patient has fewer than 16 tiles.

Time: the variants take turns inside one process, order reversed every other turn; reported are the
medians and the median of the ratios within a turn. Memory: each variant in a process of its own,
the rise of peak resident memory over the moment before the first step (Linux; on CUDA the peak
of allocated memory).

    python benchmarks/private_step.py --tiles 16 --repeats 12 --out results/private-step.json
"""

import argparse
import ctypes
import gc
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from numpy.typing import NDArray
from peft import LoraConfig
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from crafts_privacy.gradients import GroupGradients
from crafts_privacy.noise import GridNoise
from crafts_privacy.optimizers import Momentum
from crafts_privacy.patient_sgd import Mechanism, PatientSGD

LEARNING_RATE, MOMENTUM = 1e-4, 0.9
GROUP_ROWS = 16
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
Step = Callable[[], None]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is measured."""

    patients: int
    tiles: int
    rank: int
    size: int
    seed: int
    device: str


class Everybody:
    """The same patients in every variant; sampling is not what is measured."""

    def sample(self, num_patients: int, sample_rate: float) -> NDArray[np.int64]:  # noqa: ARG002
        return np.arange(num_patients)


class Workload:
    """A UNet of the embedded foundation's shape, with LoRA, and the tiles of some patients."""

    def __init__(self, setting: Setting) -> None:
        torch.manual_seed(setting.seed)
        self.setting = setting
        self.unet = UNet2DConditionModel(
            sample_size=setting.size,
            in_channels=4,
            out_channels=4,
            block_out_channels=(96, 128),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=96,
            attention_head_dim=32,
            norm_num_groups=16,
        ).to(setting.device)
        self.unet.requires_grad_(False)
        self.unet.add_adapter(LoraConfig(r=setting.rank, target_modules=TARGETS))
        self.parameters = {
            name: parameter
            for name, parameter in self.unet.named_parameters()
            if parameter.requires_grad
        }
        count = setting.patients * setting.tiles
        shape = (count, 4, setting.size, setting.size)
        self._latents = torch.randn(shape, device=setting.device)
        self._target = torch.randn(shape, device=setting.device)
        self._text = torch.randn(count, 32, 96, device=setting.device)
        self._timesteps = torch.randint(0, 1000, (count,), device=setting.device)

    def loss_per_tile(self, first: int, last: int) -> Tensor:
        """Losses (B,) of tiles ``first`` to ``last``."""
        tiles = slice(first, last)
        output = self.unet(self._latents[tiles], self._timesteps[tiles], self._text[tiles]).sample
        return (output - self._target[tiles]).square().mean((1, 2, 3))

    def loss(self, first: int, last: int) -> Tensor:
        """Their mean."""
        return self.loss_per_tile(first, last).mean()

    def group_loss(self, group: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Neighbouring patients in one pass."""
        tiles = self.setting.tiles
        losses_B = self.loss_per_tile(group[0] * tiles, (group[-1] + 1) * tiles) / tiles
        return losses_B, torch.arange(len(group)).repeat_interleave(tiles)

    def patient_loss(self, patient: int) -> Tensor:
        tiles = self.setting.tiles
        return self.loss(patient * tiles, (patient + 1) * tiles)


def private_step(work: Workload) -> Step:
    """A backward pass for each patient; the bound is low enough that patients are clipped."""
    optimizer = _private_sgd(work)
    return lambda: optimizer.step(work.setting.patients, work.patient_loss)


def private_step_in_groups(work: Workload) -> Step:
    """As many patients to a backward pass as fill 16 tiles."""
    optimizer, patients = _private_sgd(work), work.setting.patients
    gradients = GroupGradients(work.unet, list(work.parameters.values())).__enter__()
    group_size = max(1, GROUP_ROWS // work.setting.tiles)
    return lambda: optimizer.step_in_groups(patients, work.group_loss, gradients, group_size)


def _private_sgd(work: Workload) -> PatientSGD:
    patients = work.setting.patients
    return PatientSGD(
        work.parameters,
        Mechanism(
            noise_multiplier=1.0, max_grad_norm=1e-3, sample_rate=0.1, expected_patients=patients
        ),
        learning_rate=LEARNING_RATE,
        optimizer=Momentum(MOMENTUM),
        noise=GridNoise(),
        sampler=Everybody(),
    )


def plain_step(work: Workload) -> Step:
    """All tiles in one batch."""
    optimizer = _sgd(work)

    def step() -> None:
        optimizer.zero_grad()
        work.loss(0, work.setting.patients * work.setting.tiles).backward()
        optimizer.step()

    return step


def plain_step_by_patient(work: Workload) -> Step:
    """One patient at a time, gradients accumulated."""
    optimizer = _sgd(work)

    def step() -> None:
        optimizer.zero_grad()
        for patient in range(work.setting.patients):
            (work.patient_loss(patient) / work.setting.patients).backward()
        optimizer.step()

    return step


def _sgd(work: Workload) -> torch.optim.SGD:
    parameters: list[nn.Parameter] = list(work.parameters.values())
    return torch.optim.SGD(parameters, lr=LEARNING_RATE, momentum=MOMENTUM)


VARIANTS: dict[str, Callable[[Workload], Step]] = {
    "private": private_step,
    "private, in groups": private_step_in_groups,
    "plain": plain_step,
    "plain, by patient": plain_step_by_patient,
}


def seconds_of(step: Step, device: str) -> float:
    """Wall time of one step, device included."""
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure_time(setting: Setting, warmup: int, repeats: int) -> dict[str, list[float]]:
    """Seconds of each step of each variant; entry i of each was measured in the same turn."""
    steps = {name: build(Workload(setting)) for name, build in VARIANTS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(warmup + repeats):
        order = list(steps) if turn % 2 == 0 else list(reversed(steps))
        for name in order:
            taken = seconds_of(steps[name], setting.device)
            if turn >= warmup:
                seconds[name].append(taken)
    return seconds


def measure_memory_here(setting: Setting, variant: str) -> float:
    """MiB that a few steps of one variant add to this process's peak."""
    step = VARIANTS[variant](Workload(setting))
    if setting.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for _ in range(3):
            step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    before_kib = _reset_peak_kib()
    for _ in range(3):
        step()
    return (_status_kib("VmHWM") - before_kib) / 2**10


def _reset_peak_kib() -> int:
    """Give freed heap back, forget the peak that importing left, and say what is resident."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _status_kib("VmRSS")


def _status_kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def measure_memory(variant: str) -> float:
    """The same in a fresh process, so that no variant inherits another's peak."""
    command = [sys.executable, __file__, *sys.argv[1:], "--memory-of", variant]
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(finished.stdout)


def summary(seconds: dict[str, list[float]], memory_mib: dict[str, float]) -> dict[str, object]:
    """Medians, quartiles and ratios."""
    values: dict[str, object] = {}
    for name, taken in seconds.items():
        quartiles = statistics.quantiles(taken, n=4)
        values[name] = {
            "median_s": round(statistics.median(taken), 5),
            "quartiles_s": [round(quartiles[0], 5), round(quartiles[2], 5)],
            "rise_of_peak_memory_mib": round(memory_mib[name], 1),
        }
    for name in VARIANTS:
        if name == "private":
            continue
        ratios = [a / b for a, b in zip(seconds["private"], seconds[name], strict=True)]
        rise = memory_mib[name]
        values[f"private over {name}"] = {
            "time": round(statistics.median(ratios), 3),
            "time_quartiles": [round(q, 3) for q in statistics.quantiles(ratios, n=4)[::2]],
            "memory": round(memory_mib["private"] / rise, 3) if rise > 0 else math.inf,
        }
    return values


def environment(setting: Setting) -> dict[str, object]:
    """What a reader needs to repeat it."""
    machine = torch.cuda.get_device_name() if setting.device == "cuda" else platform.processor()
    return {
        "machine": machine or platform.machine(),
        "threads": torch.get_num_threads(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "diffusers", "peft")},
    }


def show(result: dict[str, object]) -> None:
    """The table, on stderr."""
    table = Table("", "median s", "rise of peak memory, MiB", "private: time", "private: memory")
    for name in VARIANTS:
        own, ratio = result[name], result.get(f"private over {name}", {})
        assert isinstance(own, dict)
        assert isinstance(ratio, dict)
        cells = [own["median_s"], own["rise_of_peak_memory_mib"]]
        cells += [ratio.get("time", ""), ratio.get("memory", "")]
        table.add_row(name, *map(str, cells))
    Console(stderr=True).print(table)


def main() -> None:
    """Measure and print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--patients", type=int, default=8, help="patients in a step")
    parser.add_argument("--tiles", type=int, default=16, help="tiles of a patient (K)")
    parser.add_argument("--rank", type=int, default=4, help="LoRA rank")
    parser.add_argument("--size", type=int, default=16, help="side of the latents")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    parser.add_argument("--memory-of", choices=list(VARIANTS), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    setting = Setting(
        patients=chosen.patients,
        tiles=chosen.tiles,
        rank=chosen.rank,
        size=chosen.size,
        seed=chosen.seed,
        device=chosen.device,
    )
    if chosen.memory_of:
        print(measure_memory_here(setting, chosen.memory_of))
        return
    result = {
        "setting": vars(setting) | {"warmup": chosen.warmup, "repeats": chosen.repeats},
        "environment": environment(setting),
        **summary(
            measure_time(setting, chosen.warmup, chosen.repeats),
            {name: measure_memory(name) for name in VARIANTS},
        ),
    }
    show(result)
    print(json.dumps(result))
    if chosen.out:
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        chosen.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
