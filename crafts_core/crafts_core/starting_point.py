"""Where a study starts: the public state of an adapter that changes nothing yet."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from crafts_core.adapters import target_layers
from crafts_core.control_net import (
    build_control_net,
    control_layers,
    initial_control_state,
    num_halvings_of,
)
from crafts_core.foundation import Foundation
from crafts_core.plan_sections import GENERATOR_ONLY, MODALITIES, AdapterConfig, Part
from crafts_core.progress import Progress, silent
from crafts_core.public_update import (
    PublicUpdateConfig,
    influence,
    leading_right_directions,
    public_update,
)
from crafts_core.state import FIRST, SECOND, State

_LEAST_INFLUENCE = 1e-6
"""Relative to the most influential direction."""


def initial_state(
    foundation: Foundation,
    config: AdapterConfig,
    seed: int,
    parts: Sequence[Part] = GENERATOR_ONLY,
    *,
    public_work: PublicUpdateConfig | None = None,
    progress: Progress = silent,
) -> State:
    """Where a study starts: an adapter that changes nothing yet.

    The second factor is zero. The first has orthogonal rows from the foundation's public update,
    each as long as gives every number of the second factor the same influence on the prediction;
    or, if the plan says ``random``, normal rows of unit expected norm. Full weights start at the
    foundation's own. The first factors of a ControlNet have the directions that its encoder's
    layers would get in the denoiser, as unit rows: what passes its zero convolutions has no
    influence yet that could be made equal. Everything follows from public files and the seed.

    Raises:
        AdapterError: the config does not fit the foundation's denoiser.
    """
    denoiser, state = foundation.generator.denoiser, {}
    controls = {
        modality: build_control_net(
            denoiser, modality, num_halvings=num_halvings_of(foundation.generator)
        )
        for modality in MODALITIES
        if modality in parts
    }
    if "generator" in parts and config.kind == "full":
        state = {
            name: weight.detach().to("cpu", torch.float32, copy=True)
            for name, weight in denoiser.named_parameters()
        }
    elif "generator" in parts:
        layers = target_layers(denoiser, config)
        first = _directions(foundation, config, layers, seed, public_work, progress)
        if config.first_factor == "public":
            first = _with_equal_influence(foundation, first, seed, public_work)
        for name, rows_RI in first.items():
            shape = layers[name].weight.shape
            ones = [1] * (len(shape) - 2)
            state[name + FIRST] = rows_RI.reshape(config.rank, *shape[1:])
            state[name + SECOND] = torch.zeros(shape[0], config.rank, *ones)
    for modality, network in controls.items():
        layers = control_layers(network, config)
        first = _directions(foundation, config, layers, seed, public_work, progress)
        state |= initial_control_state(network, modality, first, seed=seed)
    return state


def _directions(
    foundation: Foundation,
    config: AdapterConfig,
    layers: Mapping[str, nn.Linear | nn.Conv2d],
    seed: int,
    public_work: PublicUpdateConfig | None,
    progress: Progress,
) -> dict[str, Tensor]:
    """Rows of unit length for A of every layer, shape (R, I)."""
    if config.first_factor == "public":
        updates = public_update(
            foundation, list(layers), seed=seed, config=public_work, progress=progress
        )
        return {
            name: leading_right_directions(update, config.rank, seed=seed)
            for name, update in updates.items()
        }
    generator = torch.Generator().manual_seed(seed)
    sizes = {name: layer.weight[0].numel() for name, layer in layers.items()}
    return {
        name: torch.randn(config.rank, size, generator=generator) / size**0.5
        for name, size in sizes.items()
    }


def _with_equal_influence(
    foundation: Foundation,
    directions: Mapping[str, Tensor],
    seed: int,
    public_work: PublicUpdateConfig | None,
) -> dict[str, Tensor]:
    """Each row as long as gives every number of the second factor the same influence."""
    found = influence(foundation, directions, seed=seed, config=public_work)
    # A direction that moves nothing must not become huge.
    floor = _LEAST_INFLUENCE * max(float(values.max()) for values in found.values())
    return {
        name: rows_RI / found[name].clamp(min=floor).sqrt()[:, None]
        for name, rows_RI in directions.items()
    }
