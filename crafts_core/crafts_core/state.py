"""An adapter as it travels: named tensors, and what their names say. Knows no network.

The names on the wire are those of the modules that they belong to, with the factor behind:
``<module>.first`` and ``<module>.second``, or the weight's own name. A ControlNet's begin with
``control.<modality>.``. What sites released before training (``releases``) travels along, below
``release.``, and is no weight of any model. Whoever only checks, adds, keeps or sends adapters
needs this and no more.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from crafts_core.errors import CraftsError
from crafts_core.plan_sections import MODALITIES, RELEASES, Factor, Modality

FIRST, SECOND = ".first", ".second"
_PREFIX, _RELEASE = "control.", "release."
State = dict[str, Tensor]


class AdapterError(CraftsError):
    """The adapter of a plan does not fit the model, or a state does not fit the adapter."""


def control_prefix(modality: Modality) -> str:
    """What the wire names of a modality's tensors begin with."""
    return f"{_PREFIX}{modality}."


def generator_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the denoiser."""
    not_its = (_PREFIX, _RELEASE)
    return {name: tensor for name, tensor in state.items() if not name.startswith(not_its)}


def weights_of(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All but what sites released: denoiser and ControlNets."""
    return {name: tensor for name, tensor in state.items() if not name.startswith(_RELEASE)}


def release_name(factor: Factor) -> str:
    """The wire name of what a release tells."""
    return _RELEASE + factor


def control_state(state: Mapping[str, Tensor], modality: Modality) -> dict[str, Tensor]:
    """One ControlNet's tensors, by their wire names."""
    prefix = control_prefix(modality)
    return {name: tensor for name, tensor in state.items() if name.startswith(prefix)}


def modalities_in(state: Mapping[str, Tensor]) -> tuple[Modality, ...]:
    """Which conditions a state can be steered by."""
    return tuple(modality for modality in MODALITIES if control_state(state, modality))


def factor_names(state: Mapping[str, Tensor], factor: Factor) -> list[str]:
    """The sorted names of one factor's tensors.

    Raises:
        AdapterError: LoRA was asked for ``all``, full weights for a factor, or there is nothing.
    """
    if factor in RELEASES:
        if release_name(factor) not in state:
            raise AdapterError(f"the state has no release of {factor}")
        return [release_name(factor)]
    if factor in MODALITIES:
        names = [name for name in control_state(state, factor) if not name.endswith(FIRST)]
        if not names:
            raise AdapterError(f"the adapter has no ControlNet for {factor}")
        return sorted(names)
    names = list(generator_state(state))
    is_lora = all(name.endswith((FIRST, SECOND)) for name in names)
    if is_lora == (factor == "all") or not names:
        kind = "LoRA factors" if is_lora else "full weights"
        raise AdapterError(f"an adapter of {kind} has no factor {factor!r}")
    endings = {"first": (FIRST,), "second": (SECOND,), "both": (FIRST, SECOND), "all": ("",)}
    return sorted(name for name in names if name.endswith(endings[factor]))


def add_delta(
    state: Mapping[str, Tensor], delta: Mapping[str, Tensor], scale: float = 1.0
) -> State:
    """``state + scale * delta`` as float32; tensors that ``delta`` does not name are copied.

    A delta in float64 is added as exactly as that; the sum is rounded once.

    Raises:
        AdapterError: ``delta`` names a tensor that ``state`` lacks, or of another shape.
    """
    for name, tensor in delta.items():
        if name not in state or state[name].shape != tensor.shape:
            raise AdapterError(f"delta {name} does not fit the state it is added to")
    return {
        name: (tensor.double() + scale * delta[name].to(_wide(delta[name]))).float()
        if name in delta
        else tensor.clone()
        for name, tensor in state.items()
    }


def lora_tensors(state: Mapping[str, Tensor]) -> State:
    """The denoiser's part of the state under the names that diffusers' ``load_lora_weights`` reads.

    Raises:
        AdapterError: the state holds full weights, or nothing of the denoiser.
    """
    factor_names(state, "both")
    renamed = {}
    for name, tensor in generator_state(state).items():
        module, _, factor = name.rpartition(".")
        letter = "A" if factor == "first" else "B"
        renamed[f"unet.{module}.lora_{letter}.weight"] = tensor.contiguous()
    return renamed


def _wide(tensor: Tensor) -> torch.dtype:
    """What a tensor is scaled in: float32 or more."""
    return torch.promote_types(tensor.dtype, torch.float32)
