"""The public adapter that a stage began with (theta1), kept so that it travels once per stage."""

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from crafts_core.durable import write_file
from crafts_core.exchange import state_hash
from crafts_core.state import State


def remember(path: Path, state: Mapping[str, Tensor]) -> None:
    """Replace what is kept."""
    write_file(path, save({name: tensor.contiguous() for name, tensor in state.items()}))


def recall(path: Path, expected_hash: str) -> State | None:
    """The kept adapter if it is the one with this ``state_hash``; None means: ask for it."""
    try:
        state: State = load_file(path)
    except (OSError, SafetensorError):
        return None
    return state if state_hash(state) == expected_hash else None
