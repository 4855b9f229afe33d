"""What secure noise costs: milliseconds for a million numbers, beside torch's own generator.

``torch.randn`` is what an engine without care would add: float noise from a seeded generator.

    python benchmarks/noise.py --device cuda --numbers 860000000 --skip "exact (OpenDP)"
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from crafts_privacy.keystream import key_stream
from crafts_privacy.noise import ExactNoise, GridNoise

STD = 2.0**24


def randn(sum_D: Tensor) -> None:
    """Float32 noise."""
    sum_D += STD * torch.randn(sum_D.shape, device=sum_D.device)


def exact(sum_D: Tensor) -> None:
    """Of the first ten thousand numbers only."""
    ExactNoise().add_(sum_D[:10_000], STD)


WAYS: dict[str, Callable[[Tensor], object]] = {
    "torch.randn": randn,
    "key stream alone": lambda sum_D: key_stream(sum_D.device)(len(sum_D)),
    "integer grid": lambda sum_D: GridNoise().add_(sum_D, STD),
    "exact (OpenDP)": exact,
}


def milliseconds(way: Callable[[Tensor], object], sum_D: Tensor) -> float:
    """Wall time, device included."""
    start = time.perf_counter()
    way(sum_D)
    if sum_D.is_cuda:
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def main() -> None:
    """Print one line of JSON: milliseconds a million numbers and ratios to torch.randn."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--numbers", type=int, default=4_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--skip", nargs="*", default=[], choices=list(WAYS))
    chosen = parser.parse_args()
    sum_D = torch.zeros(chosen.numbers, dtype=torch.float64, device=chosen.device)
    ways = {name: way for name, way in WAYS.items() if name not in chosen.skip}
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(-1, chosen.repeats):  # the first warms up
        for name, way in ways.items():
            ms = milliseconds(way, sum_D)
            if turn >= 0:
                numbers = 10_000 if way is exact else chosen.numbers
                taken[name].append(ms * 1e6 / numbers)
    machine = torch.cuda.get_device_name() if chosen.device == "cuda" else "cpu, 1 thread"
    per_million = {name: statistics.median(times) for name, times in taken.items()}
    over_randn = {name: ms / per_million["torch.randn"] for name, ms in per_million.items()}
    print(
        json.dumps(
            {
                "machine": machine,
                "numbers": chosen.numbers,
                "ms_per_million": {name: round(ms, 4) for name, ms in per_million.items()},
                "over_randn": {name: round(ratio, 2) for name, ratio in over_randn.items()},
            }
        )
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
