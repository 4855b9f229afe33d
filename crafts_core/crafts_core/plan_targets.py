"""Whether a plan's adapter fits its foundation, from the headers of the weights: needs no torch.

A plan whose targets match no layer could be signed, offered and approved, and would then fail in
every site's log. Coordinator and sites ask this before anything is signed or approved.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from crafts_core.foundation_manifest import DENOISER_FOLDERS, FoundationError
from crafts_core.plan import Plan

_WEIGHTS = "diffusion_pytorch_model.safetensors"
_ENCODER = ("conv_in", "time_embedding.", "down_blocks.", "mid_block.")
"""What a ControlNet copies of the denoiser."""
_MOST_HEADER_BYTES = 100 << 20
SUGGESTED = (
    "conv_in",
    "down_blocks.0.resnets.0.conv1",
    "down_blocks.0.resnets.0.conv2",
    "up_blocks.3.resnets.0.conv1",
    "up_blocks.3.resnets.0.conv2",
    "up_blocks.3.resnets.0.conv_shortcut",
    "up_blocks.3.resnets.1.conv1",
    "up_blocks.3.resnets.1.conv2",
    "up_blocks.3.resnets.1.conv_shortcut",
    "conv_out",
    "up_blocks.1.attentions.0.add_v_proj",
    "up_blocks.1.attentions.1.add_v_proj",
    "up_blocks.2.attentions.0.add_v_proj",
    "up_blocks.2.attentions.1.add_v_proj",
)
"""What the shipped studies train: layers at full latent resolution, and what a word adds."""
Layers = Mapping[str, int]
"""Linear and convolutional layers by name, and how many inputs an output has."""


def target_problems(plan: Plan, foundation: Path) -> Iterator[str]:
    """Everything that keeps the plan's adapter from being attached to this foundation.

    Args:
        plan: Of any source.
        foundation: A foundation's folder.

    Raises:
        FoundationError: its weights cannot be read.
    """
    adapter, layers = plan.adapter, _layers(foundation)
    if plan.gives_lora:
        yield from _problems("targets", adapter.targets, adapter.rank, layers)
    is_steered = any(stage.modality is not None for stage in plan.stage)
    if is_steered and not (foundation / "unet").is_dir():
        yield "stage control needs a foundation with a UNet: no ControlNet steers a transformer"
    elif is_steered:
        encoder = {name: size for name, size in layers.items() if name.startswith(_ENCODER)}
        yield from _problems("control_targets", adapter.control_targets, adapter.rank, encoder)


def suggested_adapter(foundation: Path) -> dict[str, object]:
    """An adapter for a first plan: that of the shipped studies where the denoiser is of their kind.

    Raises:
        FoundationError: the foundation's weights cannot be read.
    """
    if set(SUGGESTED) <= _layers(foundation).keys():
        return {"kind": "lora", "targets": list(SUGGESTED), "schedule": "second_only"}
    return {"kind": "lora"}


def _problems(key: str, targets: Sequence[str], rank: int, layers: Layers) -> Iterator[str]:
    if not targets:
        yield f"adapter.{key}: name at least one, such as to_q"
    for target in targets:
        found = [name for name in layers if name == target or name.endswith("." + target)]
        if not found:
            yield f"adapter.{key}: {target!r} matches no Linear or Conv2d of the foundation"
        narrow = [name for name in found if layers[name] < rank]
        if narrow:
            yield f"adapter.rank: {rank} is more than the {layers[narrow[0]]} inputs of {narrow[0]}"


def _layers(foundation: Path) -> Layers:
    """Weights of two dimensions are of a Linear, of four of a Conv2d; norms have one."""
    folders = [name for name in DENOISER_FOLDERS if (foundation / name).is_dir()]
    weights = foundation / (*folders, *DENOISER_FOLDERS)[0] / _WEIGHTS
    try:
        with weights.open("rb") as file:
            num_bytes = int.from_bytes(file.read(8), "little")
            if num_bytes > _MOST_HEADER_BYTES:
                raise ValueError("its header is longer than any")
            header = json.loads(file.read(num_bytes))
        shapes = {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FoundationError(f"cannot read {weights}; get the foundation again") from error
    return {
        name.removesuffix(".weight"): math.prod(shape[1:])
        for name, shape in shapes.items()
        if name.endswith(".weight") and len(shape) in (2, 4)
    }
