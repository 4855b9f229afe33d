"""What privacy costs: one private step against one plain step on the same tiles.

All train the same weights of the same randomly initialised UNet (or ControlNet) with the same
optimizer arithmetic. ``private`` is ``PatientSGD`` a patient to a backward pass, ``private, in
groups`` several patients folded into one: clip, integer grid, noise from OS entropy. Beside them:

* ``plain``: all patients' tiles in one batch, ``torch.optim.SGD``;
* ``plain, by patient``: the same without privacy, accumulating one patient at a time, which is how
  one would fit the batch into memory. Privacy alone is the difference to this one;
* ``Opacus hooks``, ``ghost``, ``functorch``: Opacus 1.6 on the same batch, which clips each *tile*
  and so promises a patient less; float noise. What a kind of layer does not support is named.

Time: on a CPU the variants take turns inside one process, order reversed every other turn; reported
are the medians and the median of the ratios within a turn. A GPU holds one variant at a time, so
there they follow each other. Memory: the rise of the peak over the moment before the first step; on
a CPU resident memory of a process of its own for each variant (Linux), on CUDA allocated memory.

    python benchmarks/private_step.py --kind lora full --tiles 2 4 8 16 --out results/step.json
    python benchmarks/private_step.py --device cuda --model sd15 --half --kind lora --tiles 8
"""

import argparse
import ctypes
import gc
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from numpy.typing import NDArray
from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from peft import LoraConfig
from rich.console import Console
from rich.table import Table
from scipy.stats import binom
from torch import Tensor, nn

from crafts_core.threads import side_by_side
from crafts_privacy.gradients import GroupGradients
from crafts_privacy.mechanism import Mechanism
from crafts_privacy.noise import GridNoise
from crafts_privacy.optimizers import Momentum
from crafts_privacy.patient_sgd import PatientSGD

LEARNING_RATE, MOMENTUM = 1e-4, 0.9
BOUND, NOISE = 1e-3, 1.0
"""Low enough that patients are clipped."""
GROUP_ROWS = {"cpu": 8, "cuda": 32}
"""Tiles that fill a pass, as crafts_client.speed has it."""
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
TARGETS = {"lora": ATTENTION, "lora-conv": [*ATTENTION, "conv1", "conv2"]}
_RATE = 0.4
KINDS = ("lora", "lora-conv", "full", "controlnet")
Step = Callable[[], None]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is measured."""

    kind: str
    patients: int
    tiles: int
    rank: int
    seed: int
    device: str
    model: str
    half: bool
    compile: bool
    group_rows: int

    @property
    def group_size(self) -> int:
        """Patients to a backward pass."""
        return max(1, self.group_rows // self.tiles)

    @property
    def padding(self) -> float:
        """Rows run over rows wanted where patients are drawn at a rate of 0.4, as many on average.

        Every pass has one shape, so the last one of a step is filled up with rows that weigh
        nothing. Here all passes are full; a site pays this factor on top.
        """
        num_patients = round(self.patients / _RATE)
        drawn = np.arange(num_patients + 1)
        places = np.ceil(drawn / self.group_size) * self.group_size
        probability = binom.pmf(drawn, num_patients, _RATE)
        return float((places * probability).sum() / (num_patients * _RATE))


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a UNet and of what goes into it."""

    unet: dict[str, Any]
    condition_channels: tuple[int, ...]
    latent_px: int
    text_length: int

    @property
    def mask_px(self) -> int:
        """The condition's side: the stem halves it once for each step between its channels."""
        return self.latent_px * 2 ** (len(self.condition_channels) - 1)


SHAPES = {
    "embedded": Shape(
        unet={
            "block_out_channels": (96, 128),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "layers_per_block": 1,
            "cross_attention_dim": 96,
            "attention_head_dim": 32,
            "norm_num_groups": 16,
        },
        condition_channels=(16, 32, 96),
        latent_px=16,
        text_length=32,
    ),
    # Stable Diffusion 1.5, 512 px; what is not named is diffusers' default, which is its shape.
    "sd15": Shape(
        unet={"cross_attention_dim": 768},
        condition_channels=(16, 32, 96, 256),
        latent_px=64,
        text_length=77,
    ),
}


class Everybody:
    """The same patients in every variant; sampling is not what is measured."""

    def sample(self, num_patients: int, sample_rate: float) -> NDArray[np.int64]:  # noqa: ARG002
        return np.arange(num_patients)


class Denoiser(nn.Module):
    """A UNet, steered by a ControlNet or not."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        shape = SHAPES[setting.model]
        unet = UNet2DConditionModel(sample_size=shape.latent_px, **shape.unet)
        self.denoiser = unet.requires_grad_(False)
        self.control: ControlNetModel | None = None
        if setting.kind == "full":
            self.denoiser.requires_grad_(True)
        elif setting.kind == "controlnet":
            self.control = ControlNetModel.from_unet(
                self.denoiser, conditioning_embedding_out_channels=shape.condition_channels
            ).requires_grad_(True)
        else:
            lora = LoraConfig(r=setting.rank, target_modules=TARGETS[setting.kind])
            self.denoiser.add_adapter(lora)

    def forward(self, noisy: Tensor, timesteps: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        """The prediction for each tile; the mask steers where there is a ControlNet."""
        residuals: dict[str, object] = {}
        if self.control is not None:
            steered = self.control(noisy, timesteps, text, mask)
            residuals = {
                "down_block_additional_residuals": steered.down_block_res_samples,
                "mid_block_additional_residual": steered.mid_block_res_sample,
            }
        output: Tensor = self.denoiser(noisy, timesteps, text, **residuals).sample
        return output


class Workload:
    """A model and the tiles of some patients."""

    def __init__(self, setting: Setting) -> None:
        torch.manual_seed(setting.seed)
        self.setting = setting
        with torch.device(setting.device):
            self.model: nn.Module = Denoiser(setting)
        self.parameters = {
            name: parameter
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad
        }
        count, sizes = setting.patients * setting.tiles, SHAPES[setting.model]
        shape = (count, 4, sizes.latent_px, sizes.latent_px)
        with torch.device(setting.device):
            self._inputs = (
                torch.randn(shape),
                torch.randint(0, 1000, (count,)),
                torch.randn(count, sizes.text_length, sizes.unet["cross_attention_dim"]),
                torch.rand(count, 3, sizes.mask_px, sizes.mask_px),
            )
            self._target = torch.randn(shape)
        if setting.compile:
            self.model.compile()

    def loss_of(self, tiles: slice | Tensor) -> Tensor:
        """Losses (B,) of some tiles."""
        setting = self.setting
        with torch.autocast(setting.device, torch.bfloat16, enabled=setting.half):
            output = self.model(*(each[tiles] for each in self._inputs))
        return (output.float() - self._target[tiles]).square().mean((1, 2, 3))

    def loss(self, first: int, last: int) -> Tensor:
        """Their mean."""
        return self.loss_of(slice(first, last)).mean()

    def all_losses(self) -> Tensor:
        """Of every tile of every patient."""
        return self.loss_of(slice(0, self.setting.patients * self.setting.tiles))

    def group_loss(self, places: Sequence[int | None]) -> Tensor:
        """Patients of one pass; rows of the first one fill places that nobody is left for."""
        tiles = self.setting.tiles
        rows = [(patient or 0) * tiles + tile for patient in places for tile in range(tiles)]
        return self.loss_of(torch.tensor(rows)) / tiles

    def patient_loss(self, patient: int) -> Tensor:
        tiles = self.setting.tiles
        return self.loss(patient * tiles, (patient + 1) * tiles)


def private_step(work: Workload) -> Step:
    """A backward pass for each patient."""
    optimizer = _private_sgd(work)
    return lambda: optimizer.step(work.setting.patients, work.patient_loss)


def private_step_in_groups(work: Workload) -> Step:
    """As many patients to a backward pass as fill it; on a CPU a core for each pass at a time."""
    optimizer, patients = _private_sgd(work), work.setting.patients
    tiles = work.setting.tiles
    gradients = GroupGradients(
        work.model,
        list(work.parameters.values()),
        num_patients=work.setting.group_size,
        num_tiles=tiles,
    ).__enter__()
    on_gpu = work.setting.device.startswith("cuda")

    def step() -> None:
        with side_by_side(1 if on_gpu else torch.get_num_threads()) as run:
            optimizer.step_in_groups(patients, work.group_loss, gradients, run)

    return step


def _private_sgd(work: Workload) -> PatientSGD:
    patients = work.setting.patients
    return PatientSGD(
        work.parameters,
        Mechanism(
            noise_multiplier=NOISE,
            max_grad_norm=BOUND,
            sample_rate=0.1,
            expected_patients=patients,
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
        work.all_losses().mean().backward()
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


def opacus_step(work: Workload, *, functorch: bool = False) -> Step:
    """A gradient of every tile, each clipped, by Opacus' optimizer."""
    work.model = GradSampleModule(
        work.model.train(), loss_reduction="sum", strict=False, force_functorch=functorch
    )
    optimizer = DPOptimizer(
        _sgd(work),
        noise_multiplier=NOISE,
        max_grad_norm=BOUND,
        expected_batch_size=work.setting.patients * work.setting.tiles,
    )

    def step() -> None:
        optimizer.zero_grad()
        work.all_losses().sum().backward()
        optimizer.step()

    return step


def ghost_step(work: Workload) -> Step:
    """Norms first, then the backward pass of the weighted sum: no gradient of a single tile."""
    model = GradSampleModuleFastGradientClipping(
        work.model.train(),
        loss_reduction="sum",
        strict=False,
        max_grad_norm=BOUND,
        use_ghost_clipping=True,
    )
    work.model, count = model, work.setting.patients * work.setting.tiles
    optimizer = DPOptimizerFastGradientClipping(
        _sgd(work), noise_multiplier=NOISE, max_grad_norm=BOUND, expected_batch_size=count
    )

    def step() -> None:
        optimizer.zero_grad()
        losses_B = work.all_losses()
        losses_B.sum().backward(retain_graph=True)
        optimizer.zero_grad()
        factor_B = model.get_clipping_coef()
        model.disable_hooks()
        (factor_B * losses_B).sum().backward()
        model.enable_hooks()
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
    "Opacus hooks": opacus_step,
    "ghost": ghost_step,
    "functorch": partial(opacus_step, functorch=True),
}


def seconds_of(step: Step, device: str) -> float:
    """Wall time of one step, device included."""
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure_in_turns(
    setting: Setting, names: Sequence[str], repeats: int
) -> tuple[dict[str, list[float]], dict[str, float], dict[str, str]]:
    """Seconds and memory of each variant, entry i measured in the same turn, and what failed."""
    steps, failed = {}, {}
    for name in names:
        try:
            step = VARIANTS[name](Workload(setting))
            step()
            steps[name] = step
        except Exception as error:  # Opacus raises whatever its rules run into
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(-1, repeats):  # the first turn warms up
        order = list(steps) if turn % 2 == 0 else list(reversed(steps))
        for name in order:
            taken = seconds_of(steps[name], setting.device)
            if turn >= 0:
                seconds[name].append(taken)
    return seconds, {name: measure_memory(setting, name) for name in steps}, failed


def measure_one_by_one(
    setting: Setting, names: Sequence[str], repeats: int
) -> tuple[dict[str, list[float]], dict[str, float], dict[str, str]]:
    """The same where one variant at a time fits; the GPU does nothing else."""
    seconds, memory, failed = {}, {}, {}
    for name in names:
        try:
            step = VARIANTS[name](Workload(setting))
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            for _ in range(2):  # warms up
                step()
            seconds[name] = [seconds_of(step, setting.device) for _ in range(repeats)]
            memory[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
            del step
        except Exception as error:  # Opacus raises whatever its rules run into, or it does not fit
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
        gc.collect()
        torch.cuda.empty_cache()
    return seconds, memory, failed


def measure_memory_here(setting: Setting, variant: str) -> float:
    """MiB that a few steps of one variant add to this process's peak."""
    step = VARIANTS[variant](Workload(setting))
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


def measure_memory(setting: Setting, variant: str) -> float:
    """The same in a fresh process, so that no variant inherits another's peak."""
    command = [sys.executable, __file__, "--memory-of", variant]
    for name, value in vars(setting).items():
        if isinstance(value, bool):
            command += [f"--{name}"] if value else []
        else:
            command += [f"--{name.replace('_', '-')}", str(value)]
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(finished.stdout)


def measure(setting: Setting, names: Sequence[str], repeats: int) -> dict[str, object]:
    """Medians and quartiles, and ratios to the plain step."""
    by = measure_one_by_one if setting.device == "cuda" else measure_in_turns
    seconds, memory, failed = by(setting, names, repeats)
    values: dict[str, object] = {
        "setting": vars(setting),
        "padding": round(setting.padding, 3),
    }
    # One batch may be more than a GPU holds.
    base = "plain" if "plain" in seconds else "plain, by patient"
    for name, taken in seconds.items():
        over_plain = [a / b for a, b in zip(taken, seconds[base], strict=True)]
        low, _, high = statistics.quantiles(over_plain, n=4)
        values[name] = {
            "median_s": round(statistics.median(taken), 5),
            "rise_of_peak_memory_mib": round(memory[name], 1),
            "time_over_plain": round(statistics.median(over_plain), 3),
            "time_over_plain_quartiles": [round(low, 3), round(high, 3)],
            "memory_over_plain": round(memory[name] / max(memory[base], 1e-9), 3),
        }
    return values | {name: {"failed": why} for name, why in failed.items()}


def environment(device: str) -> dict[str, object]:
    """What a reader needs to repeat it."""
    machine = torch.cuda.get_device_name() if device == "cuda" else platform.processor()
    return {
        "machine": machine or platform.machine(),
        "threads": torch.get_num_threads(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "diffusers", "peft", "opacus")},
    }


def show(results: Sequence[dict[str, object]]) -> None:
    """One table, on stderr: time and memory over a plain step."""
    table = Table("weights", "K", "padding", *VARIANTS, title="time / memory, plain step = 1")
    for result in results:
        setting = result["setting"]
        assert isinstance(setting, dict)
        cells = []
        for name in VARIANTS:
            own = result.get(name, {})
            assert isinstance(own, dict)
            measured = "time_over_plain" in own
            time_, memory = own.get("time_over_plain"), own.get("memory_over_plain")
            cells.append(f"{time_:.2f} / {memory:.2f}" if measured else "fails" if own else "")
        padding = f"{result['padding']:.2f}"
        table.add_row(setting["kind"], str(setting["tiles"]), padding, *cells)
    Console(stderr=True, width=150).print(table)


def main() -> None:
    """Measure and print one line of JSON for each kind of weights and number of tiles."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kind", nargs="+", default=["lora"], choices=KINDS)
    parser.add_argument("--tiles", type=int, nargs="+", default=[16], help="tiles of a patient, K")
    parser.add_argument("--patients", type=int, help="in a step; 32 tiles in all if absent")
    parser.add_argument("--rank", type=int, default=4, help="LoRA rank")
    parser.add_argument("--model", default="embedded", choices=list(SHAPES), help="whose shape")
    parser.add_argument("--half", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--compile", action="store_true", help="for variants without hooks")
    parser.add_argument("--group-rows", type=int, help="tiles that fill a pass of several patients")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    parser.add_argument("--memory-of", choices=list(VARIANTS), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    results = []
    for kind, tiles in itertools.product(chosen.kind, chosen.tiles):
        setting = Setting(
            kind=kind,
            patients=chosen.patients or max(1, 32 // tiles),
            tiles=tiles,
            rank=chosen.rank,
            seed=chosen.seed,
            device=chosen.device,
            model=chosen.model,
            half=chosen.half,
            compile=chosen.compile,
            group_rows=chosen.group_rows or GROUP_ROWS[chosen.device],
        )
        if chosen.memory_of:
            print(measure_memory_here(setting, chosen.memory_of))
            return
        result = measure(setting, chosen.variants, chosen.repeats)
        print(json.dumps(result), flush=True)
        results.append(result)
    show(results)
    if chosen.out:
        record = {"environment": environment(chosen.device), "results": results}
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        chosen.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
