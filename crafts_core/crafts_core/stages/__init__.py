"""The training stages: one loss each, and every loss belongs to one tile."""

from crafts_core.stages.batch import Draws, TileBatch, draw
from crafts_core.stages.objective import (
    BatchCoupledLossError,
    LossPerTile,
    Objective,
    assert_per_tile,
)

__all__ = [
    "BatchCoupledLossError",
    "Draws",
    "LossPerTile",
    "Objective",
    "TileBatch",
    "assert_per_tile",
    "draw",
]
