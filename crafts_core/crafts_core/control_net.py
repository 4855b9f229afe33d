"""The ControlNet of stage control: a trainable way in for a condition, beside a frozen generator.

A copy of the foundation's encoder reads the noisy latents plus an embedding of the condition, and
its features are added to the generator's skip connections (Zhang et al. 2023, arXiv 2302.05543).
What trains and travels is

* the *stem* that embeds the condition, every weight and bias;
* the *zero convolutions* through which anything reaches the generator;
* second factors beside layers of the copied encoder, whose first factors are public and fixed.

Each of these is a weight in its own right, or linear in one, so the average of several sites'
updates is the update of averaged weights. Zero convolutions and second factors start at zero: at
the start, the generator draws what it drew. The encoder is the *foundation's*, also where earlier
stages trained the generator: everybody has it, so it need not travel.

On the wire a tensor is ``control.<modality>.<name in the ControlNet>``.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from torch import Tensor, nn

from crafts_core.denoisers import kind_of
from crafts_core.generator import Generator
from crafts_core.lora_layers import matching_layers
from crafts_core.plan_sections import MODALITIES, AdapterConfig, Modality
from crafts_core.state import FIRST, SECOND, AdapterError, control_prefix
from crafts_core.tiles.conditions import NUM_CHANNELS

_STEM_CHANNELS = (16, 32, 96, 256)
_OWN_PARTS = ("controlnet_cond_embedding.", "controlnet_down_blocks.", "controlnet_mid_block.")
_STARTS_AT_ZERO = (
    "controlnet_cond_embedding.conv_out.",
    "controlnet_down_blocks.",
    "controlnet_mid_block.",
)


def build_control_net(
    unet: UNet2DConditionModel, modality: Modality, *, num_halvings: int
) -> ControlNetModel:
    """A frozen ControlNet whose encoder is ``unet``'s; its own layers are not set yet.

    Args:
        unet: Without factors.
        modality: How many channels its condition has.
        num_halvings: How often a condition at image resolution is halved to the latents' size.

    Raises:
        AdapterError: it is no UNet.
    """
    if not kind_of(unet).takes_control:
        raise AdapterError("stage control needs a foundation with a UNet")
    # No wider than what it ends in: every number of it gets its share of the noise.
    widest = int(unet.config.block_out_channels[0])
    every = (*_STEM_CHANNELS, *[_STEM_CHANNELS[-1]] * num_halvings)[: num_halvings + 1]
    channels = tuple(min(width, widest) for width in every)
    network: ControlNetModel = ControlNetModel.from_unet(
        unet,
        conditioning_embedding_out_channels=channels,
        conditioning_channels=NUM_CHANNELS[modality],
    )
    return network.to(unet.device).eval().requires_grad_(False)


def num_halvings_of(generator: Generator) -> int:
    """How often the generator's VAE halves an image."""
    return len(generator.vae.config.block_out_channels) - 1


def own_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """Stem and zero convolutions by their name in the ControlNet."""
    return {
        name: parameter
        for name, parameter in network.named_parameters()
        if name.startswith(_OWN_PARTS)
    }


def steering(
    control: Callable[..., Any],
    noisy_BCHW: Tensor,
    timesteps_B: Tensor,
    text_BLD: Tensor,
    image_BCHW: Tensor,
) -> dict[str, Any]:
    """What a ControlNet adds to a denoiser's features, as keyword arguments of its UNet."""
    steered = control(noisy_BCHW, timesteps_B, text_BLD, image_BCHW)
    return {
        "down_block_additional_residuals": steered.down_block_res_samples,
        "mid_block_additional_residual": steered.mid_block_res_sample,
    }


def initial_control_state(
    network: ControlNetModel, modality: Modality, first: Mapping[str, Tensor], *, seed: int
) -> dict[str, Tensor]:
    """Where a stage control starts, under wire names; nothing of it changes the generator yet.

    The stem's weights are normal with the variance that keeps a signal's (He et al. 2015), its last
    layer and the zero convolutions are zero, as are the second factors.

    Args:
        network: As built, without factors.
        modality: Its condition.
        first: First factors (R, I) of the adapted layers by name.
        seed: Public randomness.
    """
    generator = torch.Generator().manual_seed(seed + 1 + MODALITIES.index(modality))
    state = {}
    for name, parameter in own_parameters(network).items():
        if name.startswith(_STARTS_AT_ZERO) or parameter.ndim == 1:
            state[name] = torch.zeros(parameter.shape)
        else:
            fan_in = parameter[0].numel()
            state[name] = torch.randn(parameter.shape, generator=generator) * (2 / fan_in) ** 0.5
    for name, rows_RI in first.items():
        shape = network.get_submodule(name).weight.shape
        ones = [1] * (len(shape) - 2)
        state[name + FIRST] = rows_RI.reshape(len(rows_RI), *shape[1:])
        state[name + SECOND] = torch.zeros(shape[0], len(rows_RI), *ones)
    return {control_prefix(modality) + name: tensor for name, tensor in state.items()}


def control_layers(
    network: ControlNetModel, config: AdapterConfig
) -> dict[str, nn.Linear | nn.Conv2d]:
    """Layers of the copied encoder that get factors.

    Raises:
        AdapterError: a target matches nothing, or the rank is larger than a layer allows.
    """
    found = matching_layers(network, config.control_targets, config.rank)
    layers = {name: layer for name, layer in found.items() if not name.startswith(_OWN_PARTS)}
    if not layers:
        raise AdapterError(
            "control_targets match no layer of the ControlNet's encoder; name some, such as to_q"
        )
    return layers
