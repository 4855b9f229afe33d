"""Ways to train faster that must not change the gradient.

``torch.compile`` gave silently wrong gradients for this kind of UNet while its loss was exact, so
the trainer believes no shortcut before it has compared gradients of public tiles with and without.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from crafts_client.home import SiteConfig
from crafts_core.adapters import Adapter

_MOST_SIDE_BY_SIDE = 8
"""Python runs one thread at a time, for about a tenth of a pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """How a site trains: memory and time only."""

    microbatch_tiles: int
    """Tiles times draws in all backward passes that run at a time."""
    group_rows: int = 8
    """Tiles times draws that a pass is worth running for; whoever has no more shares a backward
    pass with others. 8 on a CPU's core (16 are a few per cent quicker, and twice as many are filled
    in vain), 32 on a GPU (benchmarks/private_step.py); 0 trains patients one by one."""
    cores: int = 1
    """Of a CPU, for a pass each at the same time. How many of them run changes no result."""
    precision: Literal["float32", "bfloat16"] = "float32"
    checkpointing: bool = False
    compile: bool = False

    @classmethod
    def of(cls, config: SiteConfig) -> "Speed":
        """What ``site.toml`` asks for, the same on each device: they take every step together.

        Processes on one CPU share the threads that torch has now.
        """
        devices = (config.device, *config.more_devices)
        all_on_cpu = not any(device.startswith("cuda") for device in devices)
        return cls(
            microbatch_tiles=config.microbatch_tiles,
            group_rows=32 if config.device.startswith("cuda") else 8,
            cores=max(1, torch.get_num_threads() // len(devices)) if all_on_cpu else 1,
            precision=config.precision,
            checkpointing=config.checkpointing,
            compile=config.compile,
        )

    @property
    def changes_the_passes(self) -> bool:
        return self.precision != "float32" or self.checkpointing or self.compile

    @property
    def tolerance(self) -> float:
        """Largest believable relative error of a gradient.

        Half precision rounds each value by 0.4 %, and a gradient adds many of alternating sign;
        wrong code was off by a half.
        """
        return 0.25 if self.precision == "bfloat16" else 1e-2

    def apply(self, adapter: Adapter) -> None:
        """Make the adapter run so."""
        adapter.run_with(
            half=self.precision == "bfloat16",
            checkpointing=self.checkpointing,
            compiled=self.compile,
        )

    def group_size(self, rows: int) -> int:
        """Patients to a backward pass, where each fills ``rows`` of it; 0 trains one by one."""
        if self.compile:
            return 0  # compiled code runs no hooks
        return min(self.group_rows, self.microbatch_tiles) // rows

    def side_by_side(self, rows: int) -> int:
        """Passes that run at a time: as many as cores, and as memory has room for.

        ``microbatch_tiles`` bounds the rows of all that run together. A shortcut may not be for
        several threads: then it is one.
        """
        size = self.group_size(rows)
        if not size or self.changes_the_passes:
            return 1
        return max(1, min(self.cores, _MOST_SIDE_BY_SIDE, self.microbatch_tiles // (size * rows)))

    def at_a_time(self, rows: int) -> int:
        """Patients whose gradients are computed at the same time."""
        return max(1, self.group_size(rows) * self.side_by_side(rows))
