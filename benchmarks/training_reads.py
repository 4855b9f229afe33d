"""How long a private step waits for its tiles, on the embedded foundation and a store on disk.

A step takes ``--patients`` patients of ``--tiles`` tiles from the latent cache, as a trainer does,
and the gradient of a denoising loss for the attention weights from each. Reported is the share of
the time that goes into ``PatientTiles.batch``: in the first step, with files out of memory as far
as the system drops them, and the median of the later ones.

    OMP_NUM_THREADS=1 python benchmarks/training_reads.py --out results/reads.json
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import torch

from crafts_client.patients import PatientTiles
from crafts_core.foundation import Foundation, embedded_path, load
from crafts_core.tiles.cache_files import cache_folder
from crafts_core.tiles.latents import LatentCache
from crafts_simulations.small_study import write_random_store


def main() -> None:
    """Measure, print, and write if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--patients", type=int, default=8)
    parser.add_argument("--tiles", type=int, default=8)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    foundation = load(embedded_path())
    with tempfile.TemporaryDirectory() as temporary:
        store = write_random_store(
            Path(temporary) / "tiles",
            foundation,
            num_patients=4 * arguments.patients,
            tiles_each=2 * arguments.tiles,
        )
        cache = LatentCache.open(store, foundation.manifest.hash)
        _forget_pages(cache_folder(store, foundation.manifest.hash))
        patients = PatientTiles(store, cache, foundation)
        shares, waits = [], []
        for step in range(arguments.steps):
            first = step * arguments.patients
            chosen = [
                place % patients.num_patients for place in range(first, first + arguments.patients)
            ]
            wait_s, whole_s = _step(foundation, patients, chosen, arguments.tiles, seed=step)
            shares.append(wait_s / whole_s)
            waits.append(wait_s / (arguments.patients * arguments.tiles))
    result = {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "patients": arguments.patients,
        "tiles": arguments.tiles,
        "share_of_step_first": round(shares[0], 5),
        "share_of_step": round(statistics.median(shares[1:]), 5),
        "microseconds_per_tile": round(1e6 * statistics.median(waits[1:]), 1),
    }
    print(json.dumps(result))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _step(
    foundation: Foundation, patients: PatientTiles, chosen: list[int], tiles: int, *, seed: int
) -> tuple[float, float]:
    """Seconds of waiting for tiles and of the whole step."""
    generator = torch.Generator().manual_seed(seed)
    unet = foundation.generator.denoiser
    parameters = [p.requires_grad_() for name, p in unet.named_parameters() if ".attn" in name]
    wait_s, started = 0.0, time.perf_counter()
    for patient in chosen:
        asked = time.perf_counter()
        batch = patients.batch(patient, max_tiles=tiles, generator=generator)
        wait_s += time.perf_counter() - asked
        noise = torch.randn(batch.latents_BCHW.shape, generator=generator)
        timesteps = torch.randint(1000, (len(noise),), generator=generator)
        predicted = unet(batch.latents_BCHW + noise, timesteps, batch.text_BLD).sample
        loss = (predicted - noise).square().mean()
        torch.autograd.grad(loss, parameters)
    return wait_s, time.perf_counter() - started


def _forget_pages(folder: Path) -> None:
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    main()
