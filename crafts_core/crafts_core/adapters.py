"""The weights that travel: how they sit in the denoiser, and how they go in and out.

``lora_layers`` says what the two factors of a layer are; their names on the wire are those of the
denoiser's modules. ``kind = "full"`` trains each of its weights under its own name. A plan with a
control stage has a ControlNet beside it (``control_net``).

Shape letters: O outputs, I inputs (times kernel for a convolution), R rank, S stacked updates.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Self

import torch
from diffusers import ControlNetModel
from torch import Tensor, nn

from crafts_core.control_net import (
    build_control_net,
    control_layers,
    num_halvings_of,
    own_parameters,
    steering,
)
from crafts_core.denoisers import Denoiser, predict
from crafts_core.exchange import ExchangeError, check_tensors
from crafts_core.foundation import Foundation
from crafts_core.lora_layers import (
    add_factors,
    matching_layers,
    with_factors_merged,
    without_factors,
)
from crafts_core.plan_sections import (
    GENERATOR_ONLY,
    MODALITIES,
    AdapterConfig,
    Factor,
    Modality,
    Part,
)
from crafts_core.state import (
    AdapterError,
    State,
    control_prefix,
    control_state,
    factor_names,
    generator_state,
    weights_of,
)


class Condition(NamedTuple):
    """What steers a prediction: images (B, C, H, W) in [0, 1] at image resolution."""

    modality: Modality
    image_BCHW: Tensor


class Adapter:
    """An adapter attached to one denoiser, which it owns from then on.

    Attaching changes it in place: hand in ``copy.deepcopy(foundation.generator.denoiser)``
    when the foundation serves more than one run, or ``detach`` afterwards.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        parameters: Mapping[str, str],
        controls: Mapping[Modality, ControlNetModel] | None = None,
        control_parameters: Mapping[str, nn.Parameter] | None = None,
    ) -> None:
        """Wrap prepared networks.

        Args:
            denoiser: The denoiser.
            parameters: Wire name to parameter name in ``denoiser``.
            controls: ControlNets by what steers them.
            control_parameters: Their parameters by wire name.
        """
        self.denoiser = denoiser
        self._controls = dict(controls or {})
        self._compiled: dict[nn.Module, Callable[..., Any]] = {}
        self._is_compiled = False
        self._half = False
        self._paths = dict(parameters)
        named = dict(denoiser.named_parameters())
        self._parameters = {name: named[path] for name, path in self._paths.items()}
        self._parameters |= control_parameters or {}

    @classmethod
    def attach(
        cls,
        denoiser: Denoiser,
        config: AdapterConfig,
        parts: Sequence[Part] = GENERATOR_ONLY,
        *,
        num_halvings: int = 0,
    ) -> Self:
        """Put factors beside the targets, or open every weight, as the plan says.

        Args:
            denoiser: The foundation's.
            config: The plan's adapter section.
            parts: What there is beside it: ``Plan.parts``.
            num_halvings: Of an image to a latent; ControlNets need it.

        Raises:
            AdapterError: a target matches no Linear or Conv2d layer, or the rank is too high.
        """
        denoiser.requires_grad_(False)
        controls: dict[Modality, ControlNetModel] = {}
        control_parameters: dict[str, nn.Parameter] = {}
        # First, while the encoder is still the foundation's own.
        for modality in (part for part in MODALITIES if part in parts):
            network = build_control_net(denoiser, modality, num_halvings=num_halvings)
            controls[modality] = network
            control_parameters |= _open_control(network, modality, config)
        if "generator" not in parts:
            paths = {}
        elif config.kind == "full":
            paths = {name: name for name, _ in denoiser.named_parameters()}
        else:
            paths = add_factors(denoiser, list(target_layers(denoiser, config)), config.rank)
        return cls(denoiser, paths, controls, control_parameters)

    @property
    def network(self) -> nn.Module:
        """Everything that a prediction runs through."""
        return nn.ModuleList([self.denoiser, *self._controls.values()])

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
            compiled: By ``torch.compile``; forward hooks on the networks' layers do not fire then.
        """
        self._half, self._is_compiled = half, compiled
        for network in (self.denoiser, *self._controls.values()):
            if checkpointing:
                network.enable_gradient_checkpointing()
            else:
                network.disable_gradient_checkpointing()
            if compiled and network not in self._compiled:
                self._compiled[network] = torch.compile(network)

    def predict(
        self,
        noisy_BCHW: Tensor,
        timesteps_B: Tensor,
        text_BLD: Tensor,
        condition: Condition | None = None,
    ) -> Tensor:
        """The denoiser with this adapter: noise or velocity, as the foundation predicts."""
        with torch.autocast(noisy_BCHW.device.type, torch.bfloat16, enabled=self._half):
            residuals: dict[str, Any] = {}
            if condition is not None:
                steer = self._ready(self._controls[condition.modality])
                residuals = steering(steer, noisy_BCHW, timesteps_B, text_BLD, condition.image_BCHW)
            through = self._ready(self.denoiser)
            prediction = predict(
                self.denoiser,
                noisy_BCHW,
                timesteps_B,
                text_BLD,
                through=through,
                steering=residuals,
            )
        return prediction.float() if self._half else prediction

    def _ready(self, network: nn.Module) -> Callable[..., Any]:
        return self._compiled[network] if self._is_compiled else network

    def denoiser_with(self, state: Mapping[str, Tensor]) -> Denoiser:
        """The denoiser with other adapter weights, frozen; this adapter's own stay as they are.

        What the state does not hold is shared, so theta1 costs no second model.

        Raises:
            AdapterError: a tensor has another shape.
        """
        own = generator_state(state)
        changed = {self._paths[name]: tensor for name, tensor in own.items()}
        named = dict(self.denoiser.named_parameters())
        for path, tensor in changed.items():
            if tensor.shape != named[path].shape:
                raise AdapterError(f"{path} has shape {tuple(tensor.shape)}, not the adapter's")
        memo = {
            id(parameter): nn.Parameter(changed[path].to(parameter, copy=True), requires_grad=False)
            if path in changed
            else parameter
            for path, parameter in named.items()
        }
        memo |= {id(buffer): buffer for buffer in self.denoiser.buffers()}
        return copy.deepcopy(self.denoiser, memo)

    def state(self) -> State:
        """Float32 copies of all factors on the CPU."""
        return {name: _copied(parameter) for name, parameter in self._parameters.items()}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Put weights in; what sites released is none, and is passed over.

        Raises:
            AdapterError: names or shapes differ from this adapter's, or a value is not finite.
        """
        try:
            check_tensors(weights_of(state), self._parameters)
        except ExchangeError as error:
            raise AdapterError(f"state does not fit the adapter: {error}") from error
        for name, parameter in self._parameters.items():
            parameter.copy_(state[name])

    def merged(self) -> Denoiser:
        """A plain denoiser with the adapter added into its weights. This adapter is untouched."""
        return with_factors_merged(self.denoiser)

    def merged_control(self, modality: Modality) -> ControlNetModel:
        """A plain ControlNet with its factors added into its weights."""
        return with_factors_merged(self._controls[modality])

    def detach(self) -> Denoiser:
        """Take the factors out again. It computes what it did before ``attach``."""
        self._parameters, self._paths, self._controls = {}, {}, {}
        return without_factors(self.denoiser)


def _open_control(
    network: ControlNetModel, modality: Modality, config: AdapterConfig
) -> dict[str, nn.Parameter]:
    """Put factors into a ControlNet; its parameters that travel, by wire name."""
    prefix = control_prefix(modality)
    chosen = own_parameters(network)
    paths = add_factors(network, list(control_layers(network, config)), config.rank)
    named = dict(network.named_parameters())
    chosen |= {name: named[path] for name, path in paths.items()}
    return {prefix + name: parameter for name, parameter in chosen.items()}


def target_layers(denoiser: Denoiser, config: AdapterConfig) -> dict[str, nn.Linear | nn.Conv2d]:
    """Name -> layer for every layer of the denoiser that gets factors.

    Raises:
        AdapterError: a target matches nothing, or the rank is larger than a layer allows.
    """
    return matching_layers(denoiser, config.targets, config.rank)


def merged_denoiser(
    denoiser: Denoiser, config: AdapterConfig, state: Mapping[str, Tensor]
) -> Denoiser:
    """A plain copy of ``denoiser`` with the denoiser's part of ``state`` added into its weights."""
    own = generator_state(state)
    parts = GENERATOR_ONLY if own else ()
    adapter = Adapter.attach(copy.deepcopy(denoiser), config, parts)
    adapter.load_state(own)
    return adapter.merged()


def merged_control_net(
    foundation: Foundation, config: AdapterConfig, state: Mapping[str, Tensor], modality: Modality
) -> ControlNetModel:
    """A plain ControlNet with its part of ``state``, factors added into its weights."""
    adapter = Adapter.attach(
        copy.deepcopy(foundation.generator.denoiser),
        config,
        (modality,),
        num_halvings=num_halvings_of(foundation.generator),
    )
    adapter.load_state(control_state(state, modality))
    return adapter.merged_control(modality)


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32, copy=True)
