"""Ways to train faster that must not change the gradient.

``torch.compile`` gave silently wrong gradients for this kind of UNet while its loss was exact, so
the trainer believes no shortcut before it has compared gradients of public tiles with and without.
"""

from dataclasses import dataclass
from typing import Literal

from crafts_client.home import SiteConfig
from crafts_core.adapters import Adapter


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """How a site trains: memory and time only."""

    microbatch_tiles: int
    """Tiles times draws in one backward pass."""
    group_rows: int = 16
    """Tiles times draws that keep the device busy; below it several patients share a backward
    pass. 16 on a CPU, 32 on a GPU (benchmarks/private_step.py)."""
    precision: Literal["float32", "bfloat16"] = "float32"
    checkpointing: bool = False
    compile: bool = False

    @classmethod
    def of(cls, config: SiteConfig) -> "Speed":
        """What ``site.toml`` asks for."""
        return cls(
            microbatch_tiles=config.microbatch_tiles,
            group_rows=32 if config.device.startswith("cuda") else 16,
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
        """Patients to a backward pass, where each fills ``rows`` of it."""
        if self.compile:
            return 1  # compiled code runs no hooks
        return max(1, min(self.group_rows, self.microbatch_tiles) // rows)
