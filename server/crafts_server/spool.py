"""Verified updates of the open round, on disk, so that memory does not grow with sites."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from crafts_core.state import State
from crafts_server.errors import StorageError


class UpdateSpool:
    """One directory that lives as long as one round. Nothing in it survives a restart."""

    def __init__(self, directory: Path) -> None:
        """Start empty; what a crash left behind is removed."""
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        self._directory = directory

    def add(self, site: str, delta: Mapping[str, Tensor]) -> Callable[[], State]:
        """Put one delta aside.

        Returns:
            What reads it again.

        Raises:
            StorageError: the disk refuses.
        """
        path = self._directory / f"{site}.safetensors"
        try:
            save_file({name: tensor.contiguous() for name, tensor in delta.items()}, path)
        except (OSError, SafetensorError) as error:  # which one, safetensors' versions differ in
            raise StorageError(
                f"cannot keep the update of {site} in {self._directory}: {error}; "
                "make room and run the same command again"
            ) from error
        return lambda: dict(load_file(path))

    def remove(self) -> None:
        """Forget everything."""
        shutil.rmtree(self._directory, ignore_errors=True)
