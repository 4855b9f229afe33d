"""Low-rank factors beside the layers of a diffusers model: which, put in, merged, taken out.

An adapted layer computes ``W0 x + B (A x)``: A is the *first* factor, B the *second*, their product
is not scaled. Factor names are ``<module>.first`` and ``<module>.second``, so they do not depend on
the library that injects them.
"""

import copy
import re
from collections.abc import Sequence
from typing import TypeVar

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from crafts_core.state import FIRST, SECOND, AdapterError

_PEFT_NAME = "crafts"
Model = TypeVar("Model", bound=nn.Module)


def matching_layers(
    model: nn.Module, targets: Sequence[str], rank: int
) -> dict[str, nn.Linear | nn.Conv2d]:
    """Name -> layer for every Linear or Conv2d whose name ends with one of the targets.

    Raises:
        AdapterError: a target matches nothing, or the rank is larger than a layer allows.
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }
    chosen = {}
    for target in targets:
        matches = {
            name: layer
            for name, layer in layers.items()
            if name == target or name.endswith("." + target)
        }
        if not matches:
            raise AdapterError(
                f"adapter target {target!r} matches no Linear or Conv2d of the {_kind(model)}"
            )
        chosen.update(matches)
    for name, layer in chosen.items():
        num_inputs = layer.weight[0].numel()
        if rank > num_inputs:
            raise AdapterError(f"rank {rank} is more than the {num_inputs} inputs of {name}")
    return dict(sorted(chosen.items()))


def add_factors(model: nn.Module, names: Sequence[str], rank: int) -> dict[str, str]:
    """Put frozen factors beside some layers; gives factor name -> parameter name."""
    # A pattern of whole names: in a list, "conv_in" would also mean every "....conv_in".
    exactly = "|".join(re.escape(name) for name in names)
    lora = LoraConfig(r=rank, lora_alpha=rank, target_modules=exactly, init_lora_weights=False)
    inject_adapter_in_model(lora, model, adapter_name=_PEFT_NAME)
    model.requires_grad_(False)
    paths = {}
    for name in names:
        paths[name + FIRST] = f"{name}.lora_A.{_PEFT_NAME}.weight"
        paths[name + SECOND] = f"{name}.lora_B.{_PEFT_NAME}.weight"
    return paths


def with_factors_merged(model: Model) -> Model:
    """A plain copy with all factors added into the weights. ``model`` is untouched."""
    plain = copy.deepcopy(model)
    for layer in _lora_layers(plain).values():
        layer.merge()
    return without_factors(plain)


def without_factors(model: Model) -> Model:
    """Put the base layers back, and forget what peft noted on the model."""
    for name, layer in _lora_layers(model).items():
        model.set_submodule(name, layer.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config
    return model.requires_grad_(False)


def _lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def _kind(model: nn.Module) -> str:
    return "ControlNet" if type(model).__name__ == "ControlNetModel" else "denoiser"
