"""The public adapter that a stage began with (theta1), kept so that it travels once per stage."""

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from crafts_core.adapters import State
from crafts_core.exchange import state_hash


def remember(path: Path, state: Mapping[str, Tensor]) -> None:
    """Replace what is kept."""
    partial = path.with_suffix(".partial")
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, partial)
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.rename(path)


def recall(path: Path, expected_hash: str) -> State | None:
    """The kept adapter if it is the one with this ``state_hash``; None means: ask for it."""
    try:
        state: State = load_file(path)
    except (OSError, SafetensorError):
        return None
    return state if state_hash(state) == expected_hash else None
