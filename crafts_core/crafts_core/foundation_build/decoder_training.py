"""The VAE's decoder, trained on against a critic that knows real tiles.

A decoder that is taught by distances alone draws the mean of what a latent may stand for, which is
blurred. The encoder stays as it is, so latents and the denoiser that was trained on them stay too.

Shape letters: B tiles, C H W channels and pixels.
"""

from itertools import pairwise

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.nn.utils.parametrizations import spectral_norm

from crafts_core.devices import autocast_where_faster
from crafts_core.foundation_build.config import BuildConfig
from crafts_core.foundation_build.diffusion_training import pixel_distance
from crafts_core.foundation_build.public_tiles import PublicTiles
from crafts_core.foundation_build.structure_net import StructureNet, perceptual_loss
from crafts_core.foundation_build.training import Recipe, Rows, train
from crafts_core.foundation_build.views import cropped, other_stains, turned
from crafts_core.pixels import to_pixels

CRITIC_SHARE = 0.35
"""Of the gradient that the distances have where the decoder ends."""
_MOST_WEIGHT = 50.0


def train_decoder(
    vae: AutoencoderKL,
    tiles: PublicTiles,
    net: StructureNet,
    config: BuildConfig,
    recipe: Recipe,
) -> AutoencoderKL:
    """Distances as before and a patch critic's hinge loss (Esser et al. 2021, arXiv 2012.09841).

    Decoder and critic are one model with one optimizer: the critic sees drawn tiles without their
    graph, the decoder sees the critic without its weights, so the sum of the two losses gives each
    its own gradient.
    """
    torch.manual_seed(recipe.seed)
    vae.requires_grad_(False)
    critic = _critic()
    trained = nn.ModuleList([vae.decoder, vae.post_quant_conv, critic]).to(recipe.device)
    trained.requires_grad_(True)
    seen = perceptual_loss(net.to(recipe.device))
    last = vae.decoder.conv_out.weight

    def loss_of(rows: Rows, rng: np.random.Generator) -> Tensor:
        cut_BCHW = cropped(to_pixels(tiles.image_NHWC[rows]), config.vae_crop_px, rng)
        pixels_BCHW = turned(other_stains(cut_BCHW), rng).to(recipe.device)
        with autocast_where_faster(recipe.device):
            with torch.no_grad():
                latents_BCHW = vae.encode(pixels_BCHW).latent_dist.mean
            decoded_BCHW = vae.decode(latents_BCHW).sample
            structure = seen(decoded_BCHW, pixels_BCHW).float()
            fixed = {name: value.detach() for name, value in critic.state_dict().items()}
            doubt = -functional_call(critic, fixed, decoded_BCHW).float().mean()
            real, drawn = critic(pixels_BCHW).float(), critic(decoded_BCHW.detach()).float()
        distance = pixel_distance(decoded_BCHW, pixels_BCHW) + config.vae_perceptual * structure
        judged: Tensor = functional.relu(1 - real).mean() + functional.relu(1 + drawn).mean()
        loss: Tensor = distance + balance(distance, doubt, last) * doubt + judged
        return loss

    train(trained, loss_of, len(tiles), recipe)
    return vae.eval()


def balance(distance: Tensor, doubt: Tensor, last: Tensor) -> Tensor:
    """The weight that keeps the critic's part of the last layer's gradient at its share."""
    (wanted,) = torch.autograd.grad(distance, last, retain_graph=True)
    (asked,) = torch.autograd.grad(doubt, last, retain_graph=True)
    ratio = wanted.norm() / (asked.norm() + 1e-6)
    weight: Tensor = CRITIC_SHARE * ratio.clamp(max=_MOST_WEIGHT).detach()
    return weight


def _critic() -> nn.Sequential:
    """One logit for each patch of some 30 px."""
    widths = (3, 32, 64, 96)
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [spectral_norm(nn.Conv2d(before, after, 4, 2, 1)), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 3, 1, 1))
