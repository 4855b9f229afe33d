"""Prompts to images, drawn by the stock diffusers pipeline.

Ours is only what the pipeline leaves open: noise that depends on seed and index alone, each caption
encoded once, and the refusal of what is no image.

Shape letters: B images of one batch, N all images, C H W latent or pixels, L D text.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from PIL import Image, ImageDraw
from torch import Tensor

from crafts_core.errors import CraftsError
from crafts_core.generator import Generator
from crafts_core.quiet import quiet_transformers
from crafts_core.sampler_config import SamplerConfig, SchedulerName

_CLASSES: dict[SchedulerName, Any] = {
    "unipc": UniPCMultistepScheduler,
    "dpm++": DPMSolverMultistepScheduler,
    "ddim": DDIMScheduler,
    "euler": EulerDiscreteScheduler,
}
_MARGIN_PX, _LABEL_PX = 2, 14
_MAX_KEPT_CAPTIONS = 1024

Images = npt.NDArray[np.uint8]


class SamplingError(CraftsError):
    """What was drawn is no image."""


class Control(NamedTuple):
    """A trained ControlNet and what steers it: a condition for each image, at image resolution."""

    network: ControlNetModel
    conditions_NCHW: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """One image to draw. Seed and index choose its noise; other pairs are unrelated."""

    prompt: str
    negative_prompt: str = ""
    seed: int = 0
    index: int = 0


class Sampler:
    """A generator as a stock pipeline, ready to draw one batch after the other.

    Args:
        generator: Whose weights draw.
        config: How.
        control: A ControlNet that steers every image.
        compile_denoiser: Compile it at the first batch; minutes once, for long runs on a GPU.
    """

    def __init__(
        self,
        generator: Generator,
        config: SamplerConfig,
        *,
        control: ControlNetModel | None = None,
        compile_denoiser: bool = False,
    ) -> None:
        self._generator = generator
        self._config = config
        self._is_steered = control is not None
        fewest = generator.kind.fewest_steps
        if config.num_inference_steps < fewest:
            raise SamplingError(f"this generator's pipeline draws in {fewest} steps or more")
        self._pipeline = _stock_pipeline(generator, config.scheduler, control)
        if generator.device.type == "cuda":
            for part in (generator.denoiser, generator.vae):
                part.to(memory_format=torch.channels_last)
        if compile_denoiser:
            generator.denoiser.compile()
        self._hidden_LD: dict[str, Tensor] = {}

    def draw(self, drawings: Sequence[Drawing], conditions_BCHW: Tensor | None = None) -> Images:
        """One batch, uint8 (B, H, W, 3).

        Args:
            drawings: What to draw, at least one.
            conditions_BCHW: What steers each image; given where there is a ControlNet.

        Raises:
            ValueError: conditions do not match drawings or this sampler.
            SamplingError: an image is not finite.
        """
        noise = [
            initial_noise(self._generator, seed=each.seed, index=each.index) for each in drawings
        ]
        latents_BCHW = self.denoise(
            torch.stack(noise),
            self._encoded([each.prompt for each in drawings]),
            self._encoded([each.negative_prompt for each in drawings]),
            conditions_BCHW,
        )
        decoded_BCHW = self._generator.decode_latents(latents_BCHW)
        finite_B = (latents_BCHW.isfinite().all((1, 2, 3))) & decoded_BCHW.isfinite().all((1, 2, 3))
        if not bool(finite_B.all()):
            raise SamplingError(
                f"{int((~finite_B).sum())} of {len(drawings)} images came out as NaN or infinity; "
                f"lower the guidance ({self._config.guidance_scale:g}), try float32, or check the "
                "generator's weights"
            )
        pixels_BHWC = ((decoded_BCHW + 1.0) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
        pixels: Images = pixels_BHWC.cpu().numpy()
        return pixels

    @torch.inference_mode()
    def denoise(
        self,
        noise_BCHW: Tensor,
        text_BLD: Tensor,
        negative_BLD: Tensor,
        conditions_BCHW: Tensor | None = None,
    ) -> Tensor:
        """Unit noise to clean latents, with classifier-free guidance against ``negative_BLD``."""
        num_conditions = 0 if conditions_BCHW is None else len(conditions_BCHW)
        expected = len(noise_BCHW) if self._is_steered else 0
        if num_conditions != expected:
            raise ValueError(f"expected {expected} conditions, got {num_conditions}")
        steering = {} if conditions_BCHW is None else {"image": conditions_BCHW.to(noise_BCHW)}
        latents_BCHW: Tensor = self._pipeline(
            latents=noise_BCHW,
            num_inference_steps=self._config.num_inference_steps,
            guidance_scale=self._config.guidance_scale,
            output_type="latent",
            **self._generator.kind.arguments(text_BLD, negative_BLD),
            **steering,
        ).images
        return latents_BCHW

    def _encoded(self, texts: Sequence[str]) -> Tensor:
        """Hidden states (B, L, D). Images of one kind share a caption: each is encoded once."""
        new = [text for text in dict.fromkeys(texts) if text not in self._hidden_LD]
        if len(self._hidden_LD) + len(new) > _MAX_KEPT_CAPTIONS:
            self._hidden_LD.clear()
            new = list(dict.fromkeys(texts))
        if new:
            self._hidden_LD.update(zip(new, self._generator.encode_captions(new), strict=True))
        return torch.stack([self._hidden_LD[text] for text in texts])


def sample_images(
    generator: Generator,
    prompts: Sequence[str],
    *,
    control: Control | None = None,
    scheduler: SchedulerName = "ddim",
    num_inference_steps: int = 30,
    guidance_scale: float = 3.0,
    seed: int = 0,
    batch_size: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> Images:
    """One image per prompt, uint8 (N, H, W, 3).

    Image ``i`` starts from noise that depends on ``seed`` and ``i`` only, so the batch size changes
    speed and nothing else (to rounding), and more prompts leave the first images as they were.

    Args:
        generator: Whose weights draw.
        prompts: One text per image; ``""`` draws without a caption.
        control: Steers each image, with and without its caption.
        scheduler: Its name. Measurements keep to DDIM, so that old ones compare.
        num_inference_steps: Denoising steps.
        guidance_scale: 1 follows the caption as trained; more exaggerates it.
        seed: Which images.
        batch_size: Images at a time.
        progress: Called with (images done, images in all).

    Raises:
        ValueError: a setting is out of its range.
        SamplingError: an image is not finite.
    """
    if batch_size < 1:
        raise ValueError(f"expected batch_size of at least 1, got {batch_size}")
    if control is not None and len(control.conditions_NCHW) != len(prompts):
        raise ValueError(f"expected {len(prompts)} conditions, got {len(control.conditions_NCHW)}")
    sampler = Sampler(
        generator,
        SamplerConfig(
            scheduler=scheduler,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
        ),
        control=None if control is None else control.network,
    )
    side = generator.tile_px
    images = np.empty((len(prompts), side, side, 3), np.uint8)
    for start in range(0, len(prompts), batch_size):
        rows = range(start, min(start + batch_size, len(prompts)))
        images[start : rows.stop] = sampler.draw(
            [Drawing(prompt=prompts[row], seed=seed, index=row) for row in rows],
            None if control is None else control.conditions_NCHW[start : rows.stop],
        )
        if progress is not None:
            progress(rows.stop, len(prompts))
    return images


def initial_noise(generator: Generator, *, seed: int, index: int) -> Tensor:
    """Unit noise (C, H, W) of image ``index``; other seeds and indices are unrelated.

    But for one pair in four billion: torch's generator on CPUs begins in one of 2^32 states.
    """
    state = int(np.random.SeedSequence([seed, index]).generate_state(1)[0])
    source = torch.Generator().manual_seed(state)
    noise_CHW = torch.randn(generator.latent_shape, generator=source)
    return noise_CHW.to(generator.device, generator.dtype)


def _stock_pipeline(
    generator: Generator, scheduler: SchedulerName, control: ControlNetModel | None
) -> Any:
    with quiet_transformers():
        # Importing a pipeline class makes transformers talk about image processors.
        pipeline = generator.stock_pipeline(
            _CLASSES[scheduler].from_config(generator.scheduler.config, clip_sample=False),
            control=control,
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


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
