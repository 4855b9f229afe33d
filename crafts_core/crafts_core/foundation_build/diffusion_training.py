"""VAE, text-conditioned UNet and latent aligner of a built foundation.

Shape letters: N tiles, V views of a tile, B batch, C H W channels and pixels, L D text tokens and
width, U captions.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from diffusers.training_utils import compute_snr
from torch import Tensor
from torch.nn import functional

from crafts_core.aligner import LatentAligner
from crafts_core.devices import autocast_where_faster
from crafts_core.foundation_build.config import BuildConfig
from crafts_core.foundation_build.public_tiles import PublicTiles
from crafts_core.foundation_build.structure_net import StructureNet, perceptual_loss
from crafts_core.foundation_build.training import Recipe, Rows, train
from crafts_core.foundation_build.views import cropped, other_stains, turned
from crafts_core.pixels import to_pixels

MIN_SNR_GAMMA = 5.0
LATENT_ALIGNER_WIDTH = 64


def new_vae(config: BuildConfig) -> AutoencoderKL:
    """Stable Diffusion's layout without attention, which small tiles do not need.

    Residual branches start at zero, so training starts from a plain downscaling.
    """
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(config.vae_channels),
        up_block_types=("UpDecoderBlock2D",) * len(config.vae_channels),
        block_out_channels=config.vae_channels,
        layers_per_block=1,
        latent_channels=config.latent_channels,
        norm_num_groups=8,
        sample_size=config.tile_px,
        mid_block_add_attention=False,
    )
    for module in vae.modules():
        if isinstance(module, ResnetBlock2D):
            torch.nn.init.zeros_(module.conv2.weight)
            torch.nn.init.zeros_(module.conv2.bias)
    return vae


def train_vae(
    tiles: PublicTiles, net: StructureNet, config: BuildConfig, recipe: Recipe
) -> AutoencoderKL:
    """L1 on pixels, on their fine detail and on their colour; what ``net`` sees; a very small KL.

    Stains are changed at random, beyond the public ones: what the VAE cannot hold, no adapter can
    draw, and hospitals' stains are what separates them from the foundation.
    """
    torch.manual_seed(recipe.seed)
    vae = new_vae(config).to(recipe.device)
    seen = perceptual_loss(net.to(recipe.device))

    def loss_of(rows: Rows, rng: np.random.Generator) -> Tensor:
        cut_BCHW = cropped(to_pixels(tiles.image_NHWC[rows]), config.vae_crop_px, rng)
        pixels_BCHW = turned(other_stains(cut_BCHW), rng).to(recipe.device)
        with autocast_where_faster(recipe.device):
            posterior = vae.encode(pixels_BCHW).latent_dist
            decoded_BCHW = vae.decode(posterior.sample()).sample
            structure = seen(decoded_BCHW, pixels_BCHW).float()
        kl: Tensor = posterior.kl().float().mean()
        distance = pixel_distance(decoded_BCHW, pixels_BCHW) + config.vae_perceptual * structure
        return distance + 1e-6 * kl

    train(vae, loss_of, len(tiles), recipe)
    vae.eval()
    sample_NHWC = tiles.image_NHWC[:: max(1, len(tiles) // 2048)]
    latents_NCHW = encode_tiles(vae, sample_NHWC, recipe.device)
    vae.register_to_config(scaling_factor=float(1.0 / latents_NCHW.std()))
    return vae


def pixel_distance(decoded_BCHW: Tensor, pixels_BCHW: Tensor) -> Tensor:
    """L1 of pixels, of their fine detail and of their colour."""
    error_BCHW = decoded_BCHW.float() - pixels_BCHW
    detail_BCHW = error_BCHW - functional.avg_pool2d(error_BCHW, 5, stride=1, padding=2)
    colour_BCHW = functional.avg_pool2d(error_BCHW, 8)
    return error_BCHW.abs().mean() + detail_BCHW.abs().mean() + 2.0 * colour_BCHW.abs().mean()


@torch.no_grad()
def encode_tiles(
    vae: AutoencoderKL, image_NHWC: npt.NDArray[np.uint8], device: torch.device
) -> Tensor:
    """Unscaled latent means, (N, C, H, W) float32 on the CPU."""
    return _encode(vae, to_pixels, image_NHWC, device)


@torch.no_grad()
def encode_views(
    vae: AutoencoderKL, image_NHWC: npt.NDArray[np.uint8], num_views: int, recipe: Recipe
) -> Tensor:
    """Scaled latents of every tile as it is and in other stains and turns, (V, N, C, H, W).

    The first view is the tile untouched. Kept in half precision: a build of 10,000 tiles has
    60,000 latents.
    """
    torch.manual_seed(recipe.seed)
    rng = np.random.default_rng(recipe.seed)

    def look(image_BHWC: npt.NDArray[np.uint8]) -> Tensor:
        return turned(other_stains(to_pixels(image_BHWC), strength=0.5), rng)

    views = []
    for view in range(num_views):
        recipe.progress("latents", view, num_views)
        change = to_pixels if view == 0 else look
        latents_NCHW = _encode(vae, change, image_NHWC, recipe.device)
        views.append((latents_NCHW * vae.config.scaling_factor).half())
    return torch.stack(views)


def _encode(
    vae: AutoencoderKL,
    look: Callable[[npt.NDArray[np.uint8]], Tensor],
    image_NHWC: npt.NDArray[np.uint8],
    device: torch.device,
) -> Tensor:
    parts = []
    for start in range(0, len(image_NHWC), 64):
        pixels_BCHW = look(image_NHWC[start : start + 64]).to(device)
        with autocast_where_faster(device):
            parts.append(vae.encode(pixels_BCHW).latent_dist.mean.float().cpu())
    return torch.cat(parts)


def new_scheduler() -> DDPMScheduler:
    """Stable Diffusion's schedule with v-prediction and zero terminal SNR.

    Without the last, the mean colour of a tile leaks through the noisiest step, and a generator
    cannot take on another laboratory's stain (Lin et al. 2023, arXiv 2305.08891).
    """
    return DDPMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        steps_offset=1,
    )


def new_unet(config: BuildConfig) -> UNet2DConditionModel:
    """Text reaches the denoiser at half, a quarter and an eighth of the latent's resolution.

    The lighter cross-attention block (DeepFloyd IF's, stock diffusers) attends to tokens and to the
    latent at once, without a feed-forward of its own: half the time of Stable Diffusion's block.
    """
    return UNet2DConditionModel(
        sample_size=config.tile_px // 2 ** (len(config.vae_channels) - 1),
        in_channels=config.latent_channels,
        out_channels=config.latent_channels,
        layers_per_block=1,
        block_out_channels=config.unet_channels,
        down_block_types=(
            "DownBlock2D",
            "SimpleCrossAttnDownBlock2D",
            "SimpleCrossAttnDownBlock2D",
            "DownBlock2D",
        ),
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=(
            "UpBlock2D",
            "SimpleCrossAttnUpBlock2D",
            "SimpleCrossAttnUpBlock2D",
            "UpBlock2D",
        ),
        cross_attention_dim=config.text_width,
        attention_head_dim=32,
        norm_num_groups=16,
    )


def train_unet(
    latents_VNCHW: Tensor,
    caption_NV: npt.NDArray[np.int64],
    text_ULD: Tensor,
    null_text_LD: Tensor,
    config: BuildConfig,
    recipe: Recipe,
) -> UNet2DConditionModel:
    """v-prediction with min-SNR weights; a random view and a random caption of each tile.

    Timesteps are drawn as often as they weigh (Hang et al. 2023, arXiv 2303.09556), and spread over
    a batch: the expected gradient is the weighted one, its variance smaller.
    """
    torch.manual_seed(recipe.seed)
    unet = new_unet(config).to(recipe.device)
    scheduler = new_scheduler()
    share_T = timestep_shares(scheduler)

    def loss_of(rows: Rows, rng: np.random.Generator) -> Tensor:
        view_B = rng.integers(len(latents_VNCHW), size=len(rows))
        clean_BCHW = latents_VNCHW[view_B, rows].float().to(recipe.device)
        told_B = caption_NV[rows, rng.integers(caption_NV.shape[1], size=len(rows))]
        text_BLD = text_ULD[told_B].to(recipe.device)
        text_BLD[torch.from_numpy(rng.random(len(rows)) < 0.1).to(recipe.device)] = null_text_LD
        noise_BCHW = torch.randn_like(clean_BCHW)
        t_B = torch.from_numpy(spread_timesteps(share_T, len(rows), rng)).to(recipe.device)
        noisy_BCHW = scheduler.add_noise(clean_BCHW, noise_BCHW, t_B)
        target_BCHW = scheduler.get_velocity(clean_BCHW, noise_BCHW, t_B)
        with autocast_where_faster(recipe.device):
            velocity_BCHW = unet(noisy_BCHW, t_B, text_BLD).sample
        loss: Tensor = (velocity_BCHW.float() - target_BCHW).square().mean()
        return loss

    null_text_LD = null_text_LD.to(recipe.device)
    train(unet, loss_of, len(caption_NV), recipe)
    return unet.eval()


def timestep_shares(scheduler: DDPMScheduler) -> npt.NDArray[np.float64]:
    """How often each timestep is drawn: its min-SNR weight over all weights."""
    timesteps_T = torch.arange(len(scheduler.alphas_cumprod))
    snr_T = compute_snr(scheduler, timesteps_T)
    # The floor keeps the noisiest steps, which decide colour and layout, in training.
    weight_T = (snr_T.clamp(max=MIN_SNR_GAMMA) / (snr_T + 1)).clamp(min=0.1).double()
    shares: npt.NDArray[np.float64] = (weight_T / weight_T.sum()).numpy()
    return shares


def spread_timesteps(
    share_T: npt.NDArray[np.float64], count: int, rng: np.random.Generator
) -> npt.NDArray[np.int64]:
    """Timesteps by their shares, one from each of ``count`` equal parts of their distribution."""
    place_B = (np.arange(count) + rng.random(count)) / count
    return np.searchsorted(share_T.cumsum(), place_B).clip(max=len(share_T) - 1)


def train_latent_aligner(
    unet: UNet2DConditionModel,
    latents_NCHW: Tensor,
    caption_N: npt.NDArray[np.int64],
    text_ULD: Tensor,
    image_embedding_ND: Tensor,
    config: BuildConfig,
    recipe: Recipe,
) -> LatentAligner:
    """Head from the UNet's denoised latent to the tile's aligner embedding.

    Half of each batch is clean latents, half x0 predictions at random timesteps: that is what the
    head is asked about during alignment.
    """
    torch.manual_seed(recipe.seed)
    head = LatentAligner(
        in_channels=config.latent_channels,
        width=LATENT_ALIGNER_WIDTH,
        embedding_dim=config.embedding_dim,
    ).to(recipe.device)
    scheduler = new_scheduler()
    alphas_cumprod = scheduler.alphas_cumprod.to(recipe.device)

    def loss_of(rows: Rows, rng: np.random.Generator) -> Tensor:
        clean_BCHW = latents_NCHW[rows].float().to(recipe.device)
        t_B = torch.from_numpy(rng.integers(800, size=len(rows) // 2)).to(recipe.device)
        half_BCHW = clean_BCHW[: len(t_B)]
        text_BLD = text_ULD[caption_N[rows[: len(t_B)]]].to(recipe.device)
        noisy_BCHW = scheduler.add_noise(half_BCHW, torch.randn_like(half_BCHW), t_B)
        with torch.no_grad():
            velocity_BCHW = unet(noisy_BCHW, t_B, text_BLD).sample
        alpha_B111 = alphas_cumprod[t_B][:, None, None, None]
        denoised_BCHW = alpha_B111.sqrt() * noisy_BCHW - (1 - alpha_B111).sqrt() * velocity_BCHW
        predicted_BD = head(torch.cat([denoised_BCHW, clean_BCHW[len(t_B) :]]))
        target_BD = image_embedding_ND[rows].to(recipe.device)
        loss: Tensor = 1 - functional.cosine_similarity(predicted_BD, target_BD).mean()
        return loss

    train(head, loss_of, len(caption_N), recipe)
    return head.eval()
