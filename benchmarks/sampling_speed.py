"""Images a second of ``crafts sample``'s sampler beside the stock pipeline, in one process.

Three questions, each with ratios of things timed in the same run, in turns:

* *equal settings*: the same steps, guidance and scheduler at several batch sizes. ``stock`` is
  ``StableDiffusionPipeline`` called with captions and asked for PIL images;
* *defaults*: ours at ours (UniPC, 12 steps) against stock at its own (50 steps, guidance 7.5);
* *distance*: of images at the defaults and at 50 steps to 120 steps of DDIM. In pixels from the
  same noise (dB), and between sets from other noise as squared MMD of two encoders' features (the
  foundation's aligner, and its VAE's latents, pooled), with a 90 % interval over half-samples,
  whose spread is that of the whole estimate.

    python benchmarks/sampling_speed.py --foundation DIR --out results/sampling.json
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from rich.console import Console

from crafts_core.foundation import Foundation, embedded_path, load
from crafts_core.generator import Generator
from crafts_core.sampler_config import SamplerConfig, SchedulerName
from crafts_core.sampling import Drawing, Images, Sampler, sample_images
from crafts_core.vocabulary import prompt_bank

GUIDANCE = 3.0


def stock_pipeline(generator: Generator, scheduler: Any) -> Any:
    """The same weights in the pipeline as diffusers has it."""
    pipeline = StableDiffusionPipeline(
        vae=generator.vae,
        text_encoder=generator.text_encoder,
        tokenizer=generator.tokenizer,
        unet=generator.unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def in_turns(
    first: Callable[[], object], second: Callable[[], object], turns: int
) -> dict[str, float]:
    """Medians of processor seconds, and the median of the ratios within a turn."""
    times: list[tuple[float, float]] = []
    for turn in range(turns + 1):
        pair = [first, second] if turn % 2 else [second, first]
        taken = {}
        for work in pair:
            start = time.process_time()
            work()
            taken[work] = time.process_time() - start
        if turn:  # the first one warms up
            times.append((taken[first], taken[second]))
    ratios = [one / other for one, other in times]
    return {
        "ours_s": statistics.median(one for one, _ in times),
        "stock_s": statistics.median(other for _, other in times),
        "ratio": statistics.median(ratios),
        "least": min(ratios),
        "most": max(ratios),
    }


def equal_settings(generator: Generator, batch: int, steps: int, turns: int) -> dict[str, float]:
    """DDIM at the same steps and guidance."""
    prompts = [each.text for each in prompt_bank()[:batch]]
    pipeline = stock_pipeline(generator, generator.sampling_scheduler())
    sampler = Sampler(
        generator,
        SamplerConfig(scheduler="ddim", num_inference_steps=steps, guidance_scale=GUIDANCE),
    )
    drawings = [Drawing(prompt=prompt, index=place) for place, prompt in enumerate(prompts)]

    def stock() -> None:
        pipeline(prompts, num_inference_steps=steps, guidance_scale=GUIDANCE)

    def ours() -> None:
        sampler._hidden_LD.clear()  # captions are encoded anew, as stock does
        sampler.draw(drawings)

    return in_turns(ours, stock, turns)


def at_defaults(generator: Generator, batch: int, turns: int) -> dict[str, float]:
    """Ours with no setting, stock with none."""
    prompts = [each.text for each in prompt_bank()[:batch]]
    pipeline = stock_pipeline(generator, generator.sampling_scheduler())
    sampler = Sampler(generator, SamplerConfig())
    drawings = [Drawing(prompt=prompt, index=place) for place, prompt in enumerate(prompts)]
    return in_turns(lambda: sampler.draw(drawings), lambda: pipeline(prompts), turns)


def distances(foundation: Foundation, num: int, reference_steps: int) -> list[dict[str, Any]]:
    """Each setting against many DDIM steps: pixels of the same noise, features of another's."""
    generator, prompts = foundation.generator, [each.text for each in prompt_bank()][:num]
    settings: list[tuple[SchedulerName, int]] = [
        ("ddim", 50), ("ddim", 20), ("unipc", 8), ("unipc", 12), ("unipc", 15), ("dpm++", 12),
        ("euler", 12),
    ]  # fmt: skip

    def drawn(scheduler: SchedulerName, steps: int, seed: int) -> Images:
        return sample_images(
            generator, prompts, scheduler=scheduler, num_inference_steps=steps, seed=seed,
            guidance_scale=GUIDANCE,
        )  # fmt: skip

    reference = drawn("ddim", reference_steps, 0).astype(np.float64)
    others = features(foundation, drawn("ddim", reference_steps, 1))
    rows = []
    for scheduler, steps in settings:
        images = drawn(scheduler, steps, 0)
        error = np.sqrt(np.mean(np.square(images - reference)))
        row: dict[str, Any] = {"scheduler": scheduler, "steps": steps}
        row["psnr_db"] = round(float(20 * np.log10(255 / error)), 1)
        for name, x_ND in features(foundation, images).items():
            row[name] = [round(value, 5) for value in mmd_with_interval(x_ND, others[name])]
        rows.append(row)
    return rows


def features(foundation: Foundation, images_NHWC: Images) -> dict[str, Any]:
    """Rows (N, D) of two encoders."""
    tiles_NCHW = torch.from_numpy(images_NHWC).permute(0, 3, 1, 2)
    latents_NCHW = foundation.generator.encode_images(tiles_NCHW.float() / 127.5 - 1.0)
    pooled = torch.cat([latents_NCHW.mean((2, 3)), latents_NCHW.std((2, 3))], dim=1)
    return {
        "aligner": foundation.aligner.embed_images(tiles_NCHW).double().numpy(),
        "vae": pooled.double().numpy(),
    }


def mmd_with_interval(x_ND: Any, y_MD: Any, num_halves: int = 200) -> tuple[float, float, float]:
    """Unbiased squared MMD, Gaussian kernel of the median distance; and 5 % and 95 %."""
    both = np.concatenate([x_ND, y_MD])
    squares = np.square(both[:, None] - both[None]).sum(axis=2)
    kernel = np.exp(-squares / np.median(squares[squares > 0]))
    num_x = len(x_ND)
    rng = np.random.default_rng(0)

    def mmd2(x: Any, y: Any) -> float:
        own = [
            (kernel[np.ix_(rows, rows)].sum() - len(rows)) / (len(rows) * (len(rows) - 1))
            for rows in (x, y)
        ]
        return float(sum(own) - 2 * kernel[np.ix_(x, y)].mean())

    rows, columns = np.arange(num_x), np.arange(num_x, len(both))
    halves = [
        mmd2(rng.permutation(rows)[: num_x // 2], rng.permutation(columns)[: len(columns) // 2])
        for _ in range(num_halves)
    ]
    low, high = np.quantile(halves, [0.05, 0.95])
    return mmd2(rows, columns), float(low), float(high)


def main() -> None:
    """Measure, print, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--foundation", type=Path, default=embedded_path())
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument(
        "--images", type=int, default=60, help="For the distances; 0 leaves them out."
    )
    parser.add_argument("--reference-steps", type=int, default=120)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    foundation, console = load(arguments.foundation), Console()
    generator = foundation.generator
    result: dict[str, Any] = {
        "machine": platform.processor() or platform.machine(),
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers")},
        "tile_px": generator.tile_px,
        "equal_settings": {},
    }
    for batch in arguments.batch:
        row = equal_settings(generator, batch, arguments.steps, arguments.turns)
        result["equal_settings"][str(batch)] = row
        console.print(f"batch {batch}: {row['ratio']:.2f} of stock ({row['least']:.2f} to "
                      f"{row['most']:.2f})")  # fmt: skip
    result["defaults"] = at_defaults(generator, max(arguments.batch), max(1, arguments.turns // 2))
    console.print(f"at defaults: {1 / result['defaults']['ratio']:.1f} times the images a second")
    if arguments.images:
        result["distance"] = distances(foundation, arguments.images, arguments.reference_steps)
        for row in result["distance"]:
            console.print(row)
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
