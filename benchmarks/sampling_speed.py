"""Images a second of ``crafts sample``'s sampler beside the stock pipeline, in one process.

Four questions, the first two with ratios of things timed in the same run, in turns:

* *equal settings*: the same steps, guidance and scheduler at several batch sizes. ``stock`` is
  ``StableDiffusionPipeline`` called with captions and asked for PIL images;
* *defaults*: ours at ours (UniPC, 10 steps) against stock at its own (50 steps, guidance 7.5);
* *many images* (``--run 1000``): both at their defaults, each in a process of its own, from the
  first caption to the last file, with the most memory that the process had;
* *distance*: of some settings to 120 steps of DDIM from the same noise, in dB; and, by each of two
  encoders and for several seeds, the structure distance of the default's images and of 50 steps of
  DDIM, from the same captions and noise, to real tiles (``--real``, a store or a folder with
  captions) or else to images of 120 steps from other noise. A seed says *within* where the
  default's distance lies in the 90 % interval of that of 50 steps.

    python benchmarks/sampling_speed.py --foundation DIR --out results/sampling.json
    python benchmarks/sampling_speed.py --turns 0 --images 0 --run 1000 --out results/run.json
    python benchmarks/sampling_speed.py --turns 0 --images 240 --seeds 5 --out results/steps.json
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from rich.console import Console

from crafts_core.evaluation.bench import Bench, BenchSettings
from crafts_core.evaluation.encoder import load_encoder
from crafts_core.evaluation.evaluate import EvaluationConfig
from crafts_core.evaluation.real_tiles import RealTiles, middle
from crafts_core.evaluation.yardstick import Yardstick
from crafts_core.foundation import Foundation, embedded_path, load
from crafts_core.generator import Generator
from crafts_core.sampler_config import SamplerConfig, SchedulerName
from crafts_core.sampling import Drawing, Images, Sampler, sample_images
from crafts_core.vocabulary import prompt_bank

GUIDANCE = SamplerConfig().guidance_scale
ENCODERS = ("embedded", "imagenet")
ARMS: dict[str, tuple[SchedulerName, int]] = {
    "default": (SamplerConfig().scheduler, SamplerConfig().num_inference_steps),
    "fifty": ("ddim", 50),
}
NUM_BOOTSTRAP = 500
NUM_PIXELS = 16
"""Images whose pixels are compared: settings differ by decibels, images by less."""
OTHER_SEED = 1_000_000
"""Noise of the reference, which no arm has."""


def stock_pipeline(generator: Generator, scheduler: Any) -> Any:
    """The same weights in the pipeline as diffusers has it."""
    pipeline = StableDiffusionPipeline(
        vae=generator.vae,
        text_encoder=generator.text_encoder,
        tokenizer=generator.tokenizer,
        unet=generator.denoiser,
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


def pixels(generator: Generator, num: int, reference_steps: int) -> list[dict[str, Any]]:
    """Each setting against many DDIM steps from the same noise, in dB."""
    prompts = [each.text for each in prompt_bank()][: min(num, NUM_PIXELS)]
    settings: list[tuple[SchedulerName, int]] = [
        ("ddim", 50), ("ddim", 20), ("unipc", 8), ("unipc", 10), ("unipc", 15), ("dpm++", 10),
        ("euler", 10),
    ]  # fmt: skip
    reference = drawn(generator, prompts, "ddim", reference_steps, 0).astype(np.float64)
    rows = []
    for scheduler, steps in settings:
        images = drawn(generator, prompts, scheduler, steps, 0)
        error = np.sqrt(np.mean(np.square(images - reference)))
        told = round(float(20 * np.log10(255 / error)), 1)
        rows.append({"scheduler": scheduler, "steps": steps, "psnr_db": told})
    return rows


def drawn(
    generator: Generator, prompts: list[str], scheduler: SchedulerName, steps: int, seed: int
) -> Images:
    """Images at one guidance."""
    return sample_images(
        generator, prompts, scheduler=scheduler, num_inference_steps=steps, seed=seed,
        guidance_scale=GUIDANCE,
    )  # fmt: skip


def real_reference(path: Path, foundation: Path, num: int) -> RealTiles:
    """Tiles of a site's store, or of a folder that says captions and scale."""
    settings = BenchSettings(config=EvaluationConfig(), foundation=foundation, max_tiles=4 * num)
    return Bench.open(path, [], settings).held_out


def drawn_reference(generator: Generator, num: int, steps: int) -> RealTiles:
    """Images of many steps, from noise that no arm has; a prompt is their patient."""
    prompts = [each.text for each in prompt_bank()][:num]
    images_NHWC = drawn(generator, prompts, "ddim", steps, OTHER_SEED)
    return RealTiles(images_NHWC=images_NHWC, patients=np.asarray(prompts), captions=prompts)


def structure(
    foundation: Foundation, reference: RealTiles, num: int, seeds: int
) -> list[dict[str, Any]]:
    """Structure distance of both arms, same prompts and noise, by each encoder and seed."""
    mpp = foundation.manifest.mpp
    yardsticks = {}
    for name in ENCODERS:
        embed = partial(load_encoder(name).embed, mpp=mpp)
        yardsticks[name] = Yardstick.fit(
            reference, embed, is_clip=False, num_bootstrap=NUM_BOOTSTRAP, seed=0
        )
    rows = []
    for seed in range(seeds):
        chosen = reference.take(np.random.default_rng(seed).choice(len(reference), num))
        images = {
            name: middle(
                drawn(foundation.generator, list(chosen.captions), *setting, seed),
                reference.side_px,
            )
            for name, setting in ARMS.items()
        }
        for encoder, yardstick in yardsticks.items():
            row: dict[str, Any] = {"encoder": encoder, "seed": seed}
            for name, arm in images.items():
                found = yardstick.distances(arm, yardstick.embed(arm), chosen.patients)
                row[name] = [round(x, 5) for x in (found.structure, *found.structure_interval)]
            rows.append(row | {"lies": where(row["default"][0], *row["fifty"][1:])})
    return rows


def where(value: float, low: float, high: float) -> str:
    """Of a distance, and the interval of another."""
    return "within" if low <= value <= high else "nearer" if value < low else "farther"


def verdict(rows: list[dict[str, Any]], encoder: str) -> str:
    """What all seeds of one encoder say together."""
    own = [row for row in rows if row["encoder"] == encoder]
    apart = [row["default"][0] - row["fifty"][0] for row in own]
    spread = statistics.stdev(apart) if len(apart) > 1 else float("nan")
    lies = [row["lies"] for row in own]
    answer = "yes" if "farther" not in lies else "no"
    return (
        f"{encoder}: within the interval of 50 steps? {answer} ({lies.count('within')} of "
        f"{len(own)} seeds within, {lies.count('nearer')} nearer, {lies.count('farther')} farther; "
        f"{ARMS['default'][1]} less 50 steps {statistics.mean(apart):+.5f}, "
        f"{spread:.5f} between seeds)"
    )


def drawer(who: str, generator: Generator) -> Callable[[list[str], int], list[Image.Image]]:
    """Captions, and the first one's number, to images, at the defaults of ``ours`` or ``stock``."""
    if who == "stock":
        pipeline = stock_pipeline(generator, generator.sampling_scheduler())
        return lambda prompts, _first: pipeline(prompts).images
    sampler = Sampler(generator, SamplerConfig())

    def ours(prompts: list[str], first: int) -> list[Image.Image]:
        places = enumerate(prompts, start=first)
        images = sampler.draw([Drawing(prompt=text, index=place) for place, text in places])
        return [Image.fromarray(image) for image in images]

    return ours


def one_run(who: str, foundation: Path, num: int, batch: int) -> dict[str, float]:
    """Draw and write ``num`` images as ``ours`` or ``stock`` does by default, in this process."""
    torch.set_num_threads(1)
    generator = load(foundation).generator
    draw = drawer(who, generator)
    bank = [each.text for each in prompt_bank()]
    with tempfile.TemporaryDirectory() as folder:
        wall, processor = time.perf_counter(), time.process_time()
        for start in range(0, num, batch):
            places = range(start, min(start + batch, num))
            images = draw([bank[place % len(bank)] for place in places], start)
            for place, image in zip(places, images, strict=True):
                image.save(Path(folder) / f"{place}.png")
        taken = {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - processor}
    return {**taken, "peak_gib": peak_bytes() / 2**30}


def peak_bytes() -> int:
    """Most memory that this process ever had; ``getrusage`` would count its parent's, too."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    (line,) = [line for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024


def many_images(foundation: Path, num: int, batch: int) -> dict[str, Any]:
    """Both in a process of their own, one after the other."""
    runs = {}
    for who in ("ours", "stock"):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as alone:
            runs[who] = alone.submit(one_run, who, foundation, num, batch).result()
    ratios = {name: runs["stock"][name] / runs["ours"][name] for name in runs["ours"]}
    return {"images": num, "batch": batch, **runs, "stock_over_ours": ratios}


def timed(generator: Generator, batches: list[int], steps: int, turns: int) -> dict[str, Any]:
    """The first two questions."""
    return {
        "equal_settings": {
            str(batch): equal_settings(generator, batch, steps, turns) for batch in batches
        },
        "defaults": at_defaults(generator, max(batches), max(1, turns // 2)),
    }


def told(result: dict[str, Any]) -> list[str]:
    """What was measured, in lines."""
    lines = [
        f"batch {batch}: {row['ratio']:.2f} of stock ({row['least']:.2f} to {row['most']:.2f})"
        for batch, row in result.get("equal_settings", {}).items()
    ]
    if "defaults" in result:
        lines.append(
            f"at defaults: {1 / result['defaults']['ratio']:.1f} times the images a second"
        )
    if run := result.get("run"):
        ratios, ours, stock = run["stock_over_ours"], run["ours"], run["stock"]
        lines.append(
            f"{run['images']} images in one run: {ratios['wall_s']:.2f} times the images a second "
            f"({ratios['cpu_s']:.2f} by processor time), peak memory {ours['peak_gib']:.2f} GiB "
            f"beside {stock['peak_gib']:.2f}"
        )
    lines += [str(row) for row in (*result.get("pixels", ()), *result.get("structure", ()))]
    return lines + [
        verdict(result["structure"], each) for each in ENCODERS if "structure" in result
    ]


def main() -> None:
    """Measure, print, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--foundation", type=Path, default=embedded_path())
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--turns", type=int, default=5, help="0 leaves the timed parts out.")
    parser.add_argument(
        "--images", type=int, default=60, help="For the distances; 0 leaves them out."
    )
    parser.add_argument("--seeds", type=int, default=1, help="For the structure distance.")
    parser.add_argument("--real", type=Path, help="Store or folder of real tiles with captions.")
    parser.add_argument("--reference-steps", type=int, default=120)
    parser.add_argument("--run", type=int, default=0, help="Images in one run; 0 leaves it out.")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    foundation, num = load(arguments.foundation), arguments.images
    generator = foundation.generator
    result: dict[str, Any] = {
        "machine": platform.processor() or platform.machine(),
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers")},
        "foundation": foundation.manifest.hash,
        "tile_px": generator.tile_px,
    }
    if arguments.turns:
        result |= timed(generator, arguments.batch, arguments.steps, arguments.turns)
    if arguments.run:
        result["run"] = many_images(arguments.foundation, arguments.run, max(arguments.batch))
    if num:
        reference = (
            real_reference(arguments.real, arguments.foundation, num)
            if arguments.real
            else drawn_reference(generator, num, arguments.reference_steps)
        )
        result["pixels"] = pixels(generator, num, arguments.reference_steps)
        result["structure"] = structure(foundation, reference, num, arguments.seeds)
    for line in told(result):
        Console().print(line, highlight=False, soft_wrap=True)
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
