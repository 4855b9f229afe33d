"""The weights that travel: how they sit in the UNet, how they go in and out, and where they start.

An adapted layer computes ``W0 x + B (A x)``: A is the *first* factor, B the *second*, their product
is not scaled. Factor names on the wire are ``<module>.first`` and ``<module>.second``, so they do
not depend on the library that injects them. ``kind = "full"`` trains every UNet weight under its
own name.

Shape letters: O outputs, I inputs (times kernel for a convolution), R rank, S stacked updates.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.func import functional_call

from crafts_core.errors import CraftsError
from crafts_core.exchange import ExchangeError, check_tensors
from crafts_core.foundation import Foundation
from crafts_core.plan import AdapterConfig, Factor
from crafts_core.public_update import (
    PublicUpdateConfig,
    influence,
    leading_right_directions,
    public_update,
)

State = dict[str, Tensor]
_PEFT_NAME = "crafts"
_FIRST, _SECOND = ".first", ".second"
_LEAST_INFLUENCE = 1e-6
"""Relative to the most influential direction."""


class AdapterError(CraftsError):
    """The adapter of a plan does not fit the UNet, or a state does not fit the adapter."""


class Adapter:
    """An adapter attached to one UNet, which it owns from then on.

    Attaching changes the UNet in place: hand in ``copy.deepcopy(foundation.generator.unet)`` when
    the foundation serves more than one run, or ``detach`` afterwards.
    """

    def __init__(self, unet: UNet2DConditionModel, parameters: Mapping[str, str]) -> None:
        """Wrap a prepared UNet; ``parameters`` maps wire names to parameter names."""
        self.unet = unet
        self._denoise: Callable[..., Any] = unet
        self._compiled: Callable[..., Any] | None = None
        self._half = False
        self._paths = dict(parameters)
        named = dict(unet.named_parameters())
        self._parameters = {name: named[path] for name, path in self._paths.items()}

    @classmethod
    def attach(cls, unet: UNet2DConditionModel, config: AdapterConfig) -> Self:
        """Put factors beside the targets, or open every weight, as the plan says.

        Raises:
            AdapterError: a target matches no Linear or Conv2d layer, or the rank is too high.
        """
        unet.requires_grad_(False)
        if config.kind == "full":
            return cls(unet, {name: name for name, _ in unet.named_parameters()})
        names = list(target_layers(unet, config))
        lora = LoraConfig(
            r=config.rank, lora_alpha=config.rank, target_modules=names, init_lora_weights=False
        )
        inject_adapter_in_model(lora, unet, adapter_name=_PEFT_NAME)
        unet.requires_grad_(False)
        paths = {}
        for name in names:
            paths[name + _FIRST] = f"{name}.lora_A.{_PEFT_NAME}.weight"
            paths[name + _SECOND] = f"{name}.lora_B.{_PEFT_NAME}.weight"
        return cls(unet, paths)

    def trainable(self, factor: Factor) -> dict[str, nn.Parameter]:
        """The parameters of ``factor``; exactly these require gradients afterwards.

        Raises:
            AdapterError: the adapter has no such factor.
        """
        chosen = {name: self._parameters[name] for name in factor_names(self._parameters, factor)}
        for name, parameter in self._parameters.items():
            parameter.requires_grad_(name in chosen)
            parameter.grad = None
        return chosen

    def run_with(
        self, *, half: bool = False, checkpointing: bool = False, compiled: bool = False
    ) -> None:
        """How ``predict`` runs from now on; without arguments, exactly as it is written.

        Args:
            half: Autocast to bfloat16; the prediction is float32 again.
            checkpointing: Keep no activations for the backward pass, compute them twice.
            compiled: By ``torch.compile``; forward hooks on the UNet's layers do not fire then.
        """
        self._half = half
        if checkpointing:
            self.unet.enable_gradient_checkpointing()
        else:
            self.unet.disable_gradient_checkpointing()
        if compiled and self._compiled is None:
            self._compiled = torch.compile(self.unet)
        ready = self._compiled if compiled else None
        self._denoise = self.unet if ready is None else ready

    def predict(self, noisy_BCHW: Tensor, timesteps_B: Tensor, text_BLD: Tensor) -> Tensor:
        """The denoiser with this adapter: noise or velocity, as the foundation predicts."""
        with torch.autocast(noisy_BCHW.device.type, torch.bfloat16, enabled=self._half):
            prediction: Tensor = self._denoise(noisy_BCHW, timesteps_B, text_BLD).sample
        return prediction.float() if self._half else prediction

    def predict_with(
        self, state: Mapping[str, Tensor], noisy_BCHW: Tensor, timesteps_B: Tensor, text_BLD: Tensor
    ) -> Tensor:
        """The denoiser with other adapter weights; this adapter's own stay as they are.

        The base weights are shared, so theta1 costs no second model.
        """
        weights = {
            self._paths[name]: tensor.to(self._parameters[name]) for name, tensor in state.items()
        }
        output = functional_call(self.unet, weights, (noisy_BCHW, timesteps_B, text_BLD))
        prediction: Tensor = output.sample
        return prediction

    def state(self) -> State:
        """Float32 copies of all factors on the CPU."""
        return {name: _copied(parameter) for name, parameter in self._parameters.items()}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Put weights in.

        Raises:
            AdapterError: names or shapes differ from this adapter's, or a value is not finite.
        """
        try:
            check_tensors(state, self._parameters)
        except ExchangeError as error:
            raise AdapterError(f"state does not fit the adapter: {error}") from error
        for name, parameter in self._parameters.items():
            parameter.copy_(state[name])

    def merged(self) -> UNet2DConditionModel:
        """A plain UNet with the adapter added into its weights. This adapter is untouched."""
        unet = copy.deepcopy(self.unet)
        for layer in _lora_layers(unet).values():
            layer.merge()
        return _without_lora(unet)

    def detach(self) -> UNet2DConditionModel:
        """Take the factors out again. The UNet computes what it did before ``attach``."""
        self._parameters, self._paths = {}, {}
        return _without_lora(self.unet)


def target_layers(
    unet: UNet2DConditionModel, config: AdapterConfig
) -> dict[str, nn.Linear | nn.Conv2d]:
    """Name -> layer for every Linear or Conv2d whose name ends with one of the targets.

    Raises:
        AdapterError: a target matches nothing, or the rank is larger than a layer allows.
    """
    layers = {
        name: module
        for name, module in unet.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }
    chosen = {}
    for target in config.targets:
        matches = {
            name: layer
            for name, layer in layers.items()
            if name == target or name.endswith("." + target)
        }
        if not matches:
            raise AdapterError(f"adapter target {target!r} matches no Linear or Conv2d of the UNet")
        chosen.update(matches)
    for name, layer in chosen.items():
        num_inputs = layer.weight[0].numel()
        if config.rank > num_inputs:
            raise AdapterError(f"rank {config.rank} is more than the {num_inputs} inputs of {name}")
    return dict(sorted(chosen.items()))


def initial_state(
    foundation: Foundation,
    config: AdapterConfig,
    seed: int,
    *,
    public_work: PublicUpdateConfig | None = None,
) -> State:
    """Where a study starts: an adapter that changes nothing yet.

    The second factor is zero. The first has orthogonal rows from the foundation's public update,
    each as long as gives every number of the second factor the same influence on the prediction;
    or, if the plan says ``random``, normal rows of unit expected norm. Full weights start at the
    foundation's own. Everything follows from public files and the seed.

    Raises:
        AdapterError: the config does not fit the foundation's UNet.
    """
    unet = foundation.generator.unet
    if config.kind == "full":
        return {name: _copied(weight) for name, weight in unet.named_parameters()}
    layers = target_layers(unet, config)
    if config.first_factor == "public":
        first = _public_first(foundation, list(layers), config.rank, seed, public_work)
    else:
        generator = torch.Generator().manual_seed(seed)
        sizes = {name: layer.weight[0].numel() for name, layer in layers.items()}
        first = {
            name: torch.randn(config.rank, size, generator=generator) / size**0.5
            for name, size in sizes.items()
        }
    state = {}
    for name, layer in layers.items():
        shape = layer.weight.shape
        ones = [1] * (len(shape) - 2)
        state[name + _FIRST] = first[name].reshape(config.rank, *shape[1:])
        state[name + _SECOND] = torch.zeros(shape[0], config.rank, *ones)
    return state


def _public_first(
    foundation: Foundation,
    modules: list[str],
    rank: int,
    seed: int,
    public_work: PublicUpdateConfig | None,
) -> dict[str, Tensor]:
    """A of every module, shape (R, I): public directions, scaled to equal influence."""
    updates = public_update(foundation, modules, seed=seed, config=public_work)
    directions = {
        name: leading_right_directions(update, rank, seed=seed) for name, update in updates.items()
    }
    found = influence(foundation, directions, seed=seed, config=public_work)
    # A direction that moves nothing must not become huge.
    floor = _LEAST_INFLUENCE * max(float(values.max()) for values in found.values())
    return {
        name: rows_RI / found[name].clamp(min=floor).sqrt()[:, None]
        for name, rows_RI in directions.items()
    }


def factor_names(state: Mapping[str, Tensor], factor: Factor) -> list[str]:
    """The sorted names of one factor's tensors.

    Raises:
        AdapterError: LoRA was asked for ``all``, or full weights for a factor.
    """
    is_lora = all(name.endswith((_FIRST, _SECOND)) for name in state)
    if is_lora == (factor == "all"):
        kind = "LoRA factors" if is_lora else "full weights"
        raise AdapterError(f"an adapter of {kind} has no factor {factor!r}")
    endings = {"first": (_FIRST,), "second": (_SECOND,), "both": (_FIRST, _SECOND), "all": ("",)}
    return sorted(name for name in state if name.endswith(endings[factor]))


def add_delta(
    state: Mapping[str, Tensor], delta: Mapping[str, Tensor], scale: float = 1.0
) -> State:
    """``state + scale * delta`` in float32; tensors that ``delta`` does not name are copied.

    Raises:
        AdapterError: ``delta`` names a tensor that ``state`` lacks, or of another shape.
    """
    for name, tensor in delta.items():
        if name not in state or state[name].shape != tensor.shape:
            raise AdapterError(f"delta {name} does not fit the state it is added to")
    return {
        name: tensor.float() + scale * delta[name].float() if name in delta else tensor.clone()
        for name, tensor in state.items()
    }


def merged_unet(
    unet: UNet2DConditionModel, config: AdapterConfig, state: Mapping[str, Tensor]
) -> UNet2DConditionModel:
    """A plain copy of ``unet`` with the adapter ``state`` added into its weights."""
    adapter = Adapter.attach(copy.deepcopy(unet), config)
    adapter.load_state(state)
    return adapter.merged()


def lora_tensors(state: Mapping[str, Tensor]) -> State:
    """The state under the names that diffusers' ``load_lora_weights`` reads.

    Raises:
        AdapterError: the state holds full weights.
    """
    factor_names(state, "both")
    renamed = {}
    for name, tensor in state.items():
        module, _, factor = name.rpartition(".")
        letter = "A" if factor == "first" else "B"
        renamed[f"unet.{module}.lora_{letter}.weight"] = tensor.contiguous()
    return renamed


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32, copy=True)


def _lora_layers(unet: UNet2DConditionModel) -> dict[str, LoraLayer]:
    return {name: module for name, module in unet.named_modules() if isinstance(module, LoraLayer)}


def _without_lora(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Put the base layers back, and forget what peft noted on the model."""
    for name, layer in _lora_layers(unet).items():
        unet.set_submodule(name, layer.get_base_layer())
    if hasattr(unet, "peft_config"):
        del unet.peft_config
    return unet.requires_grad_(False)
