"""A training step of a foundation's parts in bfloat16, in units of one in float32.

    OMP_NUM_THREADS=1 python benchmarks/build_step.py

Steps alternate, so that a busy neighbour meets both. `foundation build` takes the faster numbers of
its device (``autocast_where_faster``); below 1 bfloat16 is faster.
"""

import json
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from crafts_core.foundation_build.config import BuildConfig
from crafts_core.foundation_build.diffusion_training import new_unet, new_vae

BATCH, REPEATS = 8, 9


def seconds(predict: Callable[[], Tensor], *, half: bool) -> float:
    """Of one prediction and its gradient."""
    start = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        predicted = predict()
    predicted.float().square().mean().backward()
    return time.perf_counter() - start


def ratio(predict: Callable[[], Tensor]) -> float:
    """Median over pairs of steps."""
    for half in (False, True):
        seconds(predict, half=half)
    return statistics.median(
        seconds(predict, half=True) / seconds(predict, half=False) for _ in range(REPEATS)
    )


def main() -> None:
    """Print one JSON object."""
    config = BuildConfig()
    unet, vae = new_unet(config), new_vae(config)
    side = unet.config.sample_size
    noisy_BCHW = torch.randn(BATCH, config.latent_channels, side, side)
    t_B, text_BLD = torch.arange(BATCH), torch.randn(BATCH, config.max_tokens, config.text_width)
    crop_BCHW = torch.randn(BATCH, 3, config.vae_crop_px, config.vae_crop_px)
    result = {
        "machine": platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "denoiser": ratio(lambda: unet(noisy_BCHW, t_B, text_BLD).sample),
        "vae": ratio(lambda: vae.decode(vae.encode(crop_BCHW).latent_dist.mean).sample),
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
