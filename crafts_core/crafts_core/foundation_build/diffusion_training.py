"""VAE, text-conditioned UNet and latent aligner of the embedded foundation.

Shape letters: N tiles, B batch, C H W channels and pixels, L D text tokens and width, U captions.
"""

from collections.abc import Callable

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from diffusers.training_utils import EMAModel, compute_snr
from torch import Tensor
from torch.nn import functional

from crafts_core.aligner import LatentAligner
from crafts_core.foundation_build.aligner_training import Progress, augment, to_pixels
from crafts_core.foundation_build.config import BuildConfig
from crafts_core.foundation_build.public_tiles import PublicTiles

MIN_SNR_GAMMA = 5.0


def train_vae(
    tiles: PublicTiles, config: BuildConfig, *, device: torch.device, progress: Progress
) -> AutoencoderKL:
    """L1 on pixels, on their fine detail and on their colour; a very small KL.

    Colours are shifted at random, far beyond the public stains: what the VAE cannot hold, no
    adapter can draw, and hospitals' stains are what separates them from the foundation. Residual
    branches start at zero, so training starts from a plain downscaling.
    """
    torch.manual_seed(config.seed + 1)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(config.vae_channels),
        up_block_types=("UpDecoderBlock2D",) * len(config.vae_channels),
        block_out_channels=config.vae_channels,
        layers_per_block=1,
        latent_channels=config.latent_channels,
        norm_num_groups=8,
        sample_size=config.tile_px,
    ).to(device)
    for module in vae.modules():
        if isinstance(module, ResnetBlock2D):
            torch.nn.init.zeros_(module.conv2.weight)
            torch.nn.init.zeros_(module.conv2.bias)
    ema = EMAModel(vae.parameters(), decay=0.995)
    rng = np.random.default_rng(config.seed + 1)

    def loss_of(rows: np.ndarray) -> Tensor:
        pixels_BCHW = augment(other_laboratories(to_pixels(tiles.image_NHWC[rows])), rng).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            posterior = vae.encode(pixels_BCHW).latent_dist
            decoded_BCHW = vae.decode(posterior.sample()).sample
        error_BCHW = decoded_BCHW.float() - pixels_BCHW
        detail_BCHW = error_BCHW - functional.avg_pool2d(error_BCHW, 5, stride=1, padding=2)
        kl: Tensor = posterior.kl().float().mean()
        colour_BCHW = functional.avg_pool2d(error_BCHW, 8)
        loss: Tensor = error_BCHW.abs().mean() + detail_BCHW.abs().mean()
        return loss + 2.0 * colour_BCHW.abs().mean() + 1e-6 * kl

    _optimise(
        vae, ema, loss_of, len(tiles.caption_N), config.vae_batch, config.vae_steps, 2e-3, rng,
        lambda text, done: progress(f"VAE, {text}", done, config.vae_steps),
    )  # fmt: skip
    ema.copy_to(vae.parameters())
    vae.eval()
    latents = encode_tiles(vae, tiles.image_NHWC[:: max(1, len(tiles.caption_N) // 2048)], device)
    vae.register_to_config(scaling_factor=float(1.0 / latents.std()))
    return vae


def other_laboratories(pixels_BCHW: Tensor) -> Tensor:
    """Each tile (in [-1, 1]) as another stain and scanner might show it: densities mixed."""
    density_BCHW = -torch.log((pixels_BCHW + 1.0) / 2.0 * 0.996 + 0.004)
    count = len(pixels_BCHW)
    mixing_BCC = torch.eye(3) + 0.12 * torch.randn(count, 3, 3)
    mixing_BCC = mixing_BCC * torch.exp(0.25 * torch.randn(count, 3, 1))
    mixed_BCHW = torch.einsum("bdc,bchw->bdhw", mixing_BCC, density_BCHW).clamp(0.0, 6.0)
    return torch.exp(-mixed_BCHW) * 2.0 - 1.0


@torch.no_grad()
def encode_tiles(vae: AutoencoderKL, image_NHWC: np.ndarray, device: torch.device) -> Tensor:
    """Unscaled latent means, (N, C, H, W) float32 on the CPU."""
    with torch.autocast(device.type, torch.bfloat16):
        parts = [
            vae.encode(to_pixels(image_NHWC[start : start + 64]).to(device)).latent_dist.mean
            for start in range(0, len(image_NHWC), 64)
        ]
    return torch.cat(parts).float().cpu()


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


def train_unet(
    latents_VNCHW: Tensor,
    caption_N: np.ndarray,
    text_ULD: Tensor,
    null_text_LD: Tensor,
    config: BuildConfig,
    *,
    device: torch.device,
    progress: Progress,
) -> UNet2DConditionModel:
    """v-prediction with min-SNR weights; V views (original, flipped) of each latent."""
    torch.manual_seed(config.seed + 2)
    unet = UNet2DConditionModel(
        sample_size=latents_VNCHW.shape[-1],
        in_channels=config.latent_channels,
        out_channels=config.latent_channels,
        layers_per_block=1,
        block_out_channels=config.unet_channels,
        down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        cross_attention_dim=config.text_width,
        attention_head_dim=32,
        norm_num_groups=16,
    ).to(device)
    scheduler = new_scheduler()
    ema = EMAModel(unet.parameters(), decay=0.999, use_ema_warmup=True, power=0.75)
    rng = np.random.default_rng(config.seed + 2)
    alphas_cumprod = scheduler.alphas_cumprod.to(device)

    def loss_of(rows: np.ndarray) -> Tensor:
        view = int(rng.integers(len(latents_VNCHW)))
        clean_BCHW = latents_VNCHW[view][rows].to(device)
        text_BLD = text_ULD[caption_N[rows]].to(device).clone()
        text_BLD[torch.from_numpy(rng.random(len(rows)) < 0.1).to(device)] = null_text_LD.to(device)
        noise_BCHW = torch.randn_like(clean_BCHW)
        t_B = torch.from_numpy(rng.integers(1000, size=len(rows))).to(device)
        noisy_BCHW = scheduler.add_noise(clean_BCHW, noise_BCHW, t_B)
        target_BCHW = scheduler.get_velocity(clean_BCHW, noise_BCHW, t_B)
        with torch.autocast(device.type, torch.bfloat16):
            velocity_BCHW = unet(noisy_BCHW, t_B, text_BLD).sample
        error_B = (velocity_BCHW.float() - target_BCHW).square().mean((1, 2, 3))
        snr_B = compute_snr(_Alphas(alphas_cumprod), t_B)
        # The floor keeps the noisiest steps, which decide colour and layout, in training.
        weight_B = (snr_B.clamp(max=MIN_SNR_GAMMA) / (snr_B + 1)).clamp(min=0.1)
        loss: Tensor = (weight_B * error_B).mean()
        return loss

    _optimise(
        unet, ema, loss_of, len(caption_N), config.unet_batch, config.unet_steps, 1e-3, rng,
        lambda text, done: progress(f"UNet, {text}", done, config.unet_steps),
    )  # fmt: skip
    ema.copy_to(unet.parameters())
    return unet.eval()


class _Alphas:
    """What ``compute_snr`` reads of a scheduler."""

    def __init__(self, alphas_cumprod: Tensor) -> None:
        self.alphas_cumprod = alphas_cumprod


def train_latent_aligner(
    unet: UNet2DConditionModel,
    latents_NCHW: Tensor,
    caption_N: np.ndarray,
    text_ULD: Tensor,
    image_embedding_ND: Tensor,
    config: BuildConfig,
    *,
    device: torch.device,
    progress: Progress,
) -> LatentAligner:
    """Head from the UNet's denoised latent to the tile's aligner embedding.

    Half of each batch is clean latents, half x0 predictions at random timesteps: that is what the
    head is asked about during alignment.
    """
    torch.manual_seed(config.seed + 3)
    head = LatentAligner(
        in_channels=config.latent_channels, width=48, embedding_dim=config.embedding_dim
    ).to(device)
    scheduler = new_scheduler()
    optimizer = torch.optim.AdamW(head.parameters(), lr=2e-3, weight_decay=0.01)
    rng = np.random.default_rng(config.seed + 3)
    for step in range(config.latent_aligner_steps):
        rows = rng.choice(len(caption_N), 64, replace=False)
        clean_BCHW = latents_NCHW[rows].to(device)
        t_B = torch.from_numpy(rng.integers(800, size=len(rows) // 2)).to(device)
        half_BCHW, text_BLD = clean_BCHW[: len(t_B)], text_ULD[caption_N[rows[: len(t_B)]]]
        noisy_BCHW = scheduler.add_noise(half_BCHW, torch.randn_like(half_BCHW), t_B)
        with torch.no_grad():
            velocity_BCHW = unet(noisy_BCHW, t_B, text_BLD.to(device)).sample
        alpha_B111 = scheduler.alphas_cumprod.to(device)[t_B][:, None, None, None]
        denoised_BCHW = alpha_B111.sqrt() * noisy_BCHW - (1 - alpha_B111).sqrt() * velocity_BCHW
        predicted_BD = head(torch.cat([denoised_BCHW, clean_BCHW[len(t_B) :]]))
        target_BD = image_embedding_ND[rows].to(device)
        loss = 1 - functional.cosine_similarity(predicted_BD, target_BD).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        progress(f"latent aligner, loss {loss.item():.3f}", step + 1, config.latent_aligner_steps)
    return head.eval()


def _optimise(
    model: torch.nn.Module,
    ema: EMAModel,
    loss_of: Callable[[np.ndarray], Tensor],
    num_rows: int,
    batch: int,
    steps: int,
    learning_rate: float,
    rng: np.random.Generator,
    progress: Callable[[str, int], None],
) -> None:
    """AdamW with one warm-up and a cosine to zero; EMA after each step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=learning_rate, total_steps=steps, pct_start=0.05
    )
    model.train()
    for step in range(steps):
        loss = loss_of(rng.choice(num_rows, batch, replace=False))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        ema.step(model.parameters())
        progress(f"loss {loss.item():.4f}", step + 1)
