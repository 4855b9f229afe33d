"""Where drawn tiles differ from real ones: in texture, or in how it is laid out.

    python benchmarks/texture_and_layout.py RUN [RUN ...] --encoder embedded --encoder imagenet

``RUN`` is a folder of one simulated study, measured on its own held-out patients. Tiles and images
are looked at in grey, each by itself at one mean and contrast, so that no encoder can go by stain.
What was done to real tiles tells what a distance means: blur takes texture and leaves the layout,
shuffled patches keep texture and lose the layout.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from crafts_core.command_line import say
from crafts_core.evaluation.baselines import reconstruct
from crafts_core.evaluation.changes import PATCHES_PX, blurred, shuffled
from crafts_core.evaluation.colour import grey_structure
from crafts_core.evaluation.encoder import Encoder, Images, load_encoder
from crafts_core.evaluation.fidelity import Reference, mmd_to_reference, real_floor
from crafts_core.evaluation.real_tiles import RealTiles
from crafts_core.foundation import Foundation, embedded_path, load
from crafts_core.generator import Generator
from crafts_core.sampling import sample_images
from crafts_simulations.sites import heldout_store
from crafts_simulations.workspace import Workspace

_NUM_BOOTSTRAP = 200


def rows_of(
    run: Workspace, foundation: Foundation, asked: RealTiles, guidances: list[float], steps: int
) -> Iterator[tuple[str, Images]]:
    """What was done to tiles, what was drawn from their captions, each with its name."""
    tiles_NHWC = asked.images_NHWC
    rng = np.random.default_rng(0)
    yield "real tiles, blurred", blurred(tiles_NHWC, mpp=foundation.manifest.mpp)
    for patch_px in PATCHES_PX:
        yield f"real tiles, patches of {patch_px} px shuffled", shuffled(tiles_NHWC, patch_px, rng)
    yield "real tiles through the VAE", reconstruct(foundation.generator, tiles_NHWC)
    trained = Generator.from_directory(run.generator, device=torch.device("cpu"))
    for guidance in guidances:
        for name, generator in (("foundation", foundation.generator), ("trained", trained)):
            say(f"{run.path}: drawing with {name}, guidance {guidance:g}", err=True)
            yield (
                f"{name}, guidance {guidance:g}",
                sample_images(
                    generator,
                    list(asked.captions),
                    num_inference_steps=steps,
                    guidance_scale=guidance,
                ),
            )


def told(distance: float, low: float, high: float) -> str:
    """A distance with its interval."""
    return f"{distance:.3f} ({low:.3f} to {high:.3f})"


def table_of(
    run: Workspace,
    foundation: Foundation,
    encoders: list[Encoder],
    arguments: argparse.Namespace,
) -> Iterator[str]:
    """Lines of the table of one run."""
    store = heldout_store(run)
    held_out = RealTiles.read(store, np.arange(store.num_tiles)).in_order_of_content()
    rng = np.random.default_rng(0)
    asked = held_out.take(rng.choice(len(held_out), arguments.images))
    grey_NHWC, mpp = grey_structure(held_out.images_NHWC), foundation.manifest.mpp
    references = [
        Reference.fit(each.embed(grey_NHWC, mpp=mpp), held_out.patients) for each in encoders
    ]
    yield "| | " + " | ".join(each.name for each in encoders) + " |"
    yield "|---" * (len(encoders) + 1) + "|"
    floors = [real_floor(each, num_splits=_NUM_BOOTSTRAP, seed=0) for each in references]
    yield "| real tiles of other patients | " + " | ".join(told(d, *i) for d, i in floors) + " |"
    for name, images_NHWC in rows_of(run, foundation, asked, arguments.guidance, arguments.steps):
        seen_NHWC = grey_structure(images_NHWC)
        cells = []
        for encoder, reference in zip(encoders, references, strict=True):
            distance, interval = mmd_to_reference(
                encoder.embed(seen_NHWC, mpp=mpp),
                asked.patients,
                reference,
                num_bootstrap=_NUM_BOOTSTRAP,
                seed=0,
            )
            cells.append(told(distance, *interval))
        yield f"| {name} | " + " | ".join(cells) + " |"


def main() -> None:
    """Print one table a run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, nargs="+")
    parser.add_argument("--encoder", action="append", required=True)
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.5, 3.0])
    parser.add_argument("--images", type=int, default=192)
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    foundation = load(embedded_path())
    encoders = [load_encoder(each) for each in arguments.encoder]
    for path in arguments.run:
        print(f"\n{path.name}: {arguments.images} images a row.\n")
        for line in table_of(Workspace(path), foundation, encoders, arguments):
            print(line, flush=True)


if __name__ == "__main__":
    main()
