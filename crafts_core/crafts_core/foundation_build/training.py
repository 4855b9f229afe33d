"""One resumable training loop for every part of a foundation.

Its whole state (weights, average, optimizer, schedule, both random generators) is written every few
minutes, so a build that is interrupted goes on where it was and gives the same bytes.
"""

import io
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from crafts_core.durable import write_file
from crafts_core.progress import Progress

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How one part is trained, and where its unfinished state is kept."""

    name: str
    state: Path
    seed: int
    steps: int
    batch: int
    learning_rate: float
    device: torch.device
    progress: Progress
    ema_decay: float | None = None
    weight_decay: float = 0.01
    save_every_s: float = 300.0


def train(
    model: nn.Module, loss_of: Callable[[Rows, np.random.Generator], Tensor], num_rows: int,
    recipe: Recipe,
) -> None:  # fmt: skip
    """AdamW, a warm-up and a cosine to zero, gradients clipped to 1; the average at the end.

    Args:
        model: Trained in place; holds the moving average afterwards where the recipe has one.
        loss_of: The loss of some rows; draws from the generator it is given and from torch's.
        num_rows: Rows to choose from, without replacement within a batch.
        recipe: Lengths and rates. Its state stays: whoever has stored the model removes it.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=recipe.learning_rate, total_steps=recipe.steps, pct_start=0.05
    )
    average = _average(model, recipe)
    rng = np.random.default_rng(recipe.seed)
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    if average is not None:
        parts["average"] = average
    done = _resume(recipe, parts, rng)
    model.train()
    saved = time.monotonic()
    for step in range(done, recipe.steps):
        loss = loss_of(rng.choice(num_rows, min(recipe.batch, num_rows), replace=False), rng)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if average is not None:
            average.step(model.parameters())
        recipe.progress(f"{recipe.name}, loss {loss.item():.4f}", step + 1, recipe.steps)
        if time.monotonic() - saved > recipe.save_every_s or step + 1 == recipe.steps:
            _save(recipe, parts, rng, step + 1)
            saved = time.monotonic()
    if average is not None:
        average.copy_to(model.parameters())


def _average(model: nn.Module, recipe: Recipe) -> EMAModel | None:
    if recipe.ema_decay is None:
        return None
    return EMAModel(model.parameters(), decay=recipe.ema_decay, use_ema_warmup=True, power=0.75)


def _save(recipe: Recipe, parts: dict[str, Any], rng: np.random.Generator, done: int) -> None:
    """A kill, or a power failure, leaves the last whole state."""
    state = {name: part.state_dict() for name, part in parts.items()}
    state |= {
        "done": done,
        "torch": torch.get_rng_state(),
        "numpy": rng.bit_generator.state,
    }
    if recipe.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(recipe.device)
    whole = io.BytesIO()
    torch.save(state, whole)
    write_file(recipe.state, whole.getvalue())


def _resume(recipe: Recipe, parts: dict[str, Any], rng: np.random.Generator) -> int:
    """Put the saved state in; the number of steps that are done."""
    if not recipe.state.exists():
        return 0
    state = torch.load(recipe.state, map_location=recipe.device, weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(state[name])
    torch.set_rng_state(state["torch"].cpu())
    if recipe.device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].cpu(), recipe.device)
    rng.bit_generator.state = state["numpy"]
    return int(state["done"])
