"""Prompts to images: DDIM with classifier-free guidance, and files that say they are synthetic.

Shape letters: B images of one batch, N all images, C H W latent or pixels, L D text.
"""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from diffusers import ControlNetModel
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from crafts_core.control_net import steering
from crafts_core.errors import CraftsError
from crafts_core.generator import Generator

_MARGIN_PX, _LABEL_PX = 2, 14


class SamplingError(CraftsError):
    """What was drawn is no image."""


class Control(NamedTuple):
    """A trained ControlNet and what steers it: a condition for each image, at image resolution."""

    network: ControlNetModel
    conditions_NCHW: Tensor

    def of(self, rows: range) -> "Control":
        """The part of some images."""
        return self._replace(conditions_NCHW=self.conditions_NCHW[rows.start : rows.stop])

    def residuals(self, noisy_BCHW: Tensor, timestep: Tensor, text_BLD: Tensor) -> dict[str, Any]:
        """What is added to the denoiser's features."""
        image_BCHW = self.conditions_NCHW.to(noisy_BCHW)
        return steering(self.network, noisy_BCHW, timestep, text_BLD, image_BCHW)


def sample_images(
    generator: Generator,
    prompts: Sequence[str],
    *,
    control: Control | None = None,
    num_inference_steps: int = 30,
    guidance_scale: float = 3.0,
    seed: int = 0,
    batch_size: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> npt.NDArray[np.uint8]:
    """One image per prompt, uint8 (N, H, W, 3).

    Image ``i`` starts from noise that depends on ``seed`` and ``i`` only, so the batch size changes
    speed and nothing else (to rounding), and more prompts leave the first images as they were.

    Args:
        generator: Whose weights draw.
        prompts: One text per image; ``""`` draws without a caption.
        control: Steers each image, with and without its caption.
        num_inference_steps: DDIM steps (eta 0).
        guidance_scale: 1 follows the caption as trained; more exaggerates it.
        seed: Which images.
        batch_size: Images at a time.
        progress: Called with (images done, images in all).

    Raises:
        ValueError: a setting is out of its range.
        SamplingError: an image is not finite.
    """
    if num_inference_steps < 1 or batch_size < 1:
        raise ValueError("num_inference_steps and batch_size must be at least 1")
    if not 1.0 <= guidance_scale < math.inf:
        raise ValueError(f"expected guidance_scale from 1 up, got {guidance_scale}")
    if control is not None and len(control.conditions_NCHW) != len(prompts):
        raise ValueError(f"expected {len(prompts)} conditions, got {len(control.conditions_NCHW)}")
    side = generator.tile_px
    images = np.empty((len(prompts), side, side, 3), np.uint8)
    null_1LD = generator.encode_captions([""])
    for start in range(0, len(prompts), batch_size):
        rows = range(start, min(start + batch_size, len(prompts)))
        text_BLD = generator.encode_captions([prompts[row] for row in rows])
        noise = torch.stack([initial_noise(generator, seed=seed, index=row) for row in rows])
        latents_BCHW = denoise(
            generator,
            noise,
            text_BLD,
            null_1LD,
            control=None if control is None else control.of(rows),
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
        )
        decoded_BCHW = generator.decode_latents(latents_BCHW)
        if not bool(latents_BCHW.isfinite().all() and decoded_BCHW.isfinite().all()):
            raise SamplingError(
                f"images {rows.start} to {rows.stop - 1} came out as NaN or infinity; lower the "
                f"guidance ({guidance_scale:g}), or check the generator's weights"
            )
        pixels_BHWC = ((decoded_BCHW + 1.0) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
        images[start : rows.stop] = pixels_BHWC.cpu().numpy()
        if progress is not None:
            progress(rows.stop, len(prompts))
    return images


def initial_noise(generator: Generator, *, seed: int, index: int) -> Tensor:
    """Unit noise (C, H, W) of image ``index``; other seeds and indices are unrelated."""
    state = int(np.random.SeedSequence([seed, index]).generate_state(1)[0])
    source = torch.Generator().manual_seed(state)
    return torch.randn(generator.latent_shape, generator=source).to(generator.device)


@torch.no_grad()
def denoise(
    generator: Generator,
    noise_BCHW: Tensor,
    text_BLD: Tensor,
    null_1LD: Tensor,
    *,
    control: Control | None = None,
    num_inference_steps: int,
    guidance_scale: float,
) -> Tensor:
    """Noise to clean latents by DDIM (eta 0) with classifier-free guidance."""
    scheduler = generator.sampling_scheduler()
    scheduler.set_timesteps(num_inference_steps, device=generator.device)
    null_BLD = null_1LD.expand_as(text_BLD)
    latents_BCHW: Tensor = noise_BCHW * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        model_input = scheduler.scale_model_input(latents_BCHW, timestep)
        prediction = _predict(generator, control, model_input, timestep, text_BLD)
        if guidance_scale > 1.0:
            unconditional = _predict(generator, control, model_input, timestep, null_BLD)
            prediction = unconditional + guidance_scale * (prediction - unconditional)
        latents_BCHW = scheduler.step(prediction, timestep, latents_BCHW).prev_sample
    return latents_BCHW


def _predict(
    generator: Generator,
    control: Control | None,
    noisy_BCHW: Tensor,
    timestep: Tensor,
    text_BLD: Tensor,
) -> Tensor:
    added = {} if control is None else control.residuals(noisy_BCHW, timestep, text_BLD)
    prediction: Tensor = generator.unet(noisy_BCHW, timestep, text_BLD, **added).sample
    return prediction


def save_png(image_HWC: npt.NDArray[np.uint8], path: Path, *, prompt: str, origin: str) -> None:
    """Write one image whose metadata says that it is synthetic, of what, and from where."""
    note = PngInfo()
    note.add_text("Synthetic", "true")
    note.add_text("Description", f"Synthetic histology image, not a patient's: {prompt}")
    note.add_text("Provenance", json.dumps({"prompt": prompt, "generator": origin}))
    Image.fromarray(image_HWC).save(path, pnginfo=note)


def contact_sheet(
    images_NHWC: npt.NDArray[np.uint8], columns: int, labels: Sequence[str] | None = None
) -> Image.Image:
    """All images in rows of ``columns``, each under its label if there are labels.

    Raises:
        ValueError: there is no image, or labels do not match images.
    """
    count, height, width = images_NHWC.shape[:3]
    if count == 0 or columns < 1:
        raise ValueError("a contact sheet needs at least one image and one column")
    if labels is not None and len(labels) != count:
        raise ValueError(f"expected {count} labels, got {len(labels)}")
    columns = min(columns, count)
    top = _LABEL_PX if labels is not None else 0
    cell_w, cell_h = width + _MARGIN_PX, height + top + _MARGIN_PX
    num_rows = -(-count // columns)
    sheet = Image.new("RGB", (columns * cell_w, num_rows * cell_h), "white")
    pen = ImageDraw.Draw(sheet)
    for index, image in enumerate(images_NHWC):
        x, y = index % columns * cell_w, index // columns * cell_h
        sheet.paste(Image.fromarray(image), (x, y + top))
        if labels is not None:
            pen.text((x + 1, y + 1), labels[index], fill="black")
    return sheet
