"""Ten prompts as a run's checkpoint draws them, beside the foundation; kept in the run's folder.

``checkpoints/RUN/samples/HASH/`` holds ``prompts.json`` and a PNG for each, by the beginning of the
checkpoint's or the foundation's hash: drawn once for each, by a command, shown by the pages. Of a
checkpoint it is what an export would give, the moving average over the rounds so far.
"""

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from crafts_core.durable import write_directory
from crafts_core.plan import Plan
from crafts_server.checkpoints import Checkpoint
from crafts_server.errors import CheckpointError, StorageError
from crafts_server.home import CoordinatorHome

if TYPE_CHECKING:
    from crafts_core.foundation import Foundation
    from crafts_core.generator import Generator

NUM_PROMPTS = 10
_PROMPTS = "prompts.json"
_SEED = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplePair:
    """A prompt, and what both draw for it from the same noise, as data URIs."""

    prompt: str
    foundation: str
    checkpoint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """Of the newest checkpoint that was drawn."""

    round: int
    pairs: tuple[SamplePair, ...]


def samples_of(home: CoordinatorHome, plan: Plan, chain: Sequence[Checkpoint]) -> Samples | None:
    """What was drawn of a run last, if anything was. Draws nothing."""
    for checkpoint in reversed(chain[1:]):
        folder = _folder(home, checkpoint.manifest.run_id, checkpoint.hash)
        public = _folder(home, checkpoint.manifest.run_id, plan.study.foundation)
        if (folder / _PROMPTS).exists() and (public / _PROMPTS).exists():
            prompts = json.loads((folder / _PROMPTS).read_bytes())
            pairs = tuple(
                SamplePair(
                    prompt=str(prompt),
                    foundation=_uri(public / _file_name(index)),
                    checkpoint=_uri(folder / _file_name(index)),
                )
                for index, prompt in enumerate(prompts)
            )
            return Samples(round=checkpoint.round, pairs=pairs)
    return None


def draw_samples(home: CoordinatorHome, run_id: str, plan: Plan, *, device: str) -> int:
    """Draw the newest checkpoint, and the foundation where it was not; gives the round.

    Raises:
        CheckpointError: there is no round yet, or a checkpoint was altered.
        FoundationError: the foundation here is another than the plan's.
        StorageError: the disk refuses.
    """
    from crafts_core.adapters import merged_denoiser  # torch takes seconds; pages need none
    from crafts_core.foundation import load
    from crafts_server.export import shared_state

    chain = home.checkpoints(run_id).chain()
    if len(chain) < 2:
        raise CheckpointError("the run has no committed round yet")
    wanted = {
        name: folder
        for name in (plan.study.foundation, chain[-1].hash)
        if not (folder := _folder(home, run_id, name)).exists()
    }
    if not wanted:
        return chain[-1].round
    foundation = load(home.foundation_path, device=device)
    if foundation.manifest.hash != plan.study.foundation:
        raise CheckpointError(
            f"the run is of foundation {plan.study.foundation[:16]}, the one here is "
            f"{foundation.manifest.hash[:16]}; set foundation in coordinator.toml"
        )
    for name, folder in wanted.items():
        generator = foundation.generator
        if name == chain[-1].hash:
            state = shared_state(chain, plan)
            denoiser = merged_denoiser(generator.denoiser, plan.adapter, state)
            generator = replace(generator, denoiser=denoiser)
        _write(folder, _drawn(generator, foundation, plan, name))
    return chain[-1].round


def _drawn(
    generator: "Generator", foundation: "Foundation", plan: Plan, name: str
) -> dict[str, bytes]:
    """The files of one folder; each image says that it is synthetic."""
    from PIL import Image

    from crafts_core.provenance import Origin, Provenance, encode_png
    from crafts_core.sampler_config import SamplerConfig
    from crafts_core.sampling import sample_images

    bank, settings = [each.text for each in foundation.prompt_bank], SamplerConfig()
    prompts = bank[:: max(1, len(bank) // NUM_PROMPTS)][:NUM_PROMPTS]
    images = sample_images(
        generator,
        prompts,
        scheduler=settings.scheduler,
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
        seed=_SEED,
        batch_size=1,
    )
    provenance = Provenance(
        origin=Origin(
            generator=name,
            foundation=foundation.manifest.name,
            foundation_hash=foundation.manifest.hash,
            study=plan.study.name,
            plan_hash=plan.hash,
        ),
        seed=_SEED,
        scheduler=settings.scheduler,
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
    )
    files = {
        _file_name(index): encode_png(
            Image.fromarray(image), provenance.of_image(prompts[index], index=index)
        )
        for index, image in enumerate(images)
    }
    return files | {_PROMPTS: json.dumps(prompts).encode()}


def _write(folder: Path, files: dict[str, bytes]) -> None:
    try:
        write_directory(folder, files)
    except FileExistsError:
        return  # somebody else has drawn the same meanwhile
    except OSError as error:
        raise StorageError(f"cannot write {folder}: {error.strerror or error}") from error


def _folder(home: CoordinatorHome, run_id: str, name: str) -> Path:
    return home.path / "checkpoints" / run_id / "samples" / name[:16]


def _file_name(index: int) -> str:
    return f"{index:02d}.png"


def _uri(path: Path) -> str:
    try:
        return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}; remove its folder and draw again") from error
