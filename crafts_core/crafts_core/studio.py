"""A generator opened for drawing: with its origin, its ControlNets, and what it was trained on."""

from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Self

import torch
from diffusers import ControlNetModel
from torch import Tensor

from crafts_core.devices import open_device
from crafts_core.errors import CraftsError
from crafts_core.export import CONTROLS
from crafts_core.generator import Generator
from crafts_core.generator_record import RECORD_NAME, read_origin, trained_prompts
from crafts_core.known_words import strange_prompts
from crafts_core.picture_facts import opened, upright_size
from crafts_core.plan_sections import Modality
from crafts_core.pretrained import read_part
from crafts_core.provenance import Origin, Provenance
from crafts_core.sampler_config import DTYPES, DtypeName, SamplerConfig
from crafts_core.sampling import Drawing, Images, Sampler
from crafts_core.tiles.conditions import FORMATS, Bytes, read_condition, to_floats

_TORCH: dict[DtypeName, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_CPU_BATCH, _MAX_BATCH = 16, 256
_SHARE_OF_FREE_MEMORY = 0.8
_MAX_KEPT_CONDITIONS = 256


class Studio:
    """Draws images of one generator and says of each where it comes from.

    Args:
        directory: The generator's.
        generator: As loaded.
        origin: What its images say of it.
        compile_denoiser: Compile the denoiser at the first batch.
    """

    def __init__(
        self,
        directory: Path,
        generator: Generator,
        origin: Origin,
        *,
        compile_denoiser: bool = False,
    ) -> None:
        self.directory = directory
        self.generator = generator
        self.origin = origin
        self.trained_on = tuple(prompt.text for prompt in trained_prompts(directory))
        self._compile_denoiser = compile_denoiser
        self._samplers: dict[tuple[SamplerConfig, Modality | None], Sampler] = {}
        self._conditions: OrderedDict[tuple[Modality, Path], Bytes] = OrderedDict()

    @classmethod
    def open(
        cls,
        directory: Path,
        *,
        device: str = "cpu",
        dtype: DtypeName = "auto",
        compile_denoiser: bool = False,
    ) -> Self:
        """Load a generator or foundation.

        Args:
            directory: A diffusers directory.
            device: As torch names it.
            dtype: ``auto`` is bfloat16 on a GPU that has it, float32 elsewhere.
            compile_denoiser: Takes minutes at the first batch and pays on a GPU, for long runs.

        Raises:
            CraftsError: there is no such device, the numbers do not go with it, or the generator
                cannot be read.
        """
        opened_device = open_device(device)
        generator = Generator.from_directory(
            directory, device=opened_device, dtype=_dtype_on(opened_device, dtype)
        )
        return cls(directory, generator, read_origin(directory), compile_denoiser=compile_denoiser)

    def provenance(self, config: SamplerConfig) -> Provenance:
        """What all images drawn so have in common."""
        return Provenance(
            origin=self.origin,
            scheduler=config.scheduler,
            num_inference_steps=config.num_inference_steps,
            guidance_scale=config.guidance_scale,
            dtype=str(self.generator.dtype).removeprefix("torch."),
        )

    def draw(
        self,
        drawings: Sequence[Drawing],
        config: SamplerConfig,
        *,
        control: Modality | None = None,
        masks: Sequence[Path] = (),
    ) -> Images:
        """One batch, uint8 (B, H, W, 3); ``masks`` has one for each image where there is control.

        Raises:
            CraftsError: an image is not finite, they do not fit into the device's memory, a mask
                cannot be read, or no such ControlNet was trained.
        """
        conditions = None if control is None else self._stacked(control, masks)
        try:
            return self._sampler(config, control).draw(drawings, conditions)
        except torch.OutOfMemoryError as error:
            raise CraftsError(
                f"{self.generator.device} has no memory for {len(drawings)} images at a time; "
                "choose a smaller batch size"
            ) from error

    def check_controls(self, controls: Collection[Modality]) -> None:
        """Raises CraftsError where one has no ControlNet here."""
        for modality in controls:
            self._control_directory(modality)

    def condition(self, control: Modality, mask: Path) -> Bytes:
        """What is read of a mask: stored channels (C, H, W) at the size of an image.

        Raises:
            ConditionError: what is wrong with the file.
        """
        key = (control, mask)
        if key not in self._conditions:
            while len(self._conditions) >= _MAX_KEPT_CONDITIONS:
                self._conditions.popitem(last=False)
            self._conditions[key] = read_condition(mask, control, tile_px=self.generator.tile_px)
        return self._conditions[key]

    def warnings(self, prompts: Sequence[str], masks: Sequence[Path] = ()) -> list[str]:
        """What will not be drawn as asked, one line each: nothing is left out in silence."""
        texts = list(dict.fromkeys(prompts))
        told = []
        if not self.origin.foundation:
            told.append(
                f"{self.directory} has no {RECORD_NAME}, so its images name no study and no "
                "promise to patients; if it was exported by one, copy it again"
            )
        told += [
            f"a prompt is longer than the generator reads; left out: {rest!r}"
            for rest in self.generator.unread(texts)
            if rest
        ]
        told += [
            f"no word of {prompt!r} is one that this generator was trained on; it will draw some "
            "tissue all the same (`crafts prompts` lists what it knows)"
            for prompt in strange_prompts(texts, self.trained_on)
        ]
        side = self.generator.tile_px
        for mask in dict.fromkeys(masks):
            width, height = _size(mask)
            if (width, height) != (side, side):
                told.append(
                    f"mask {mask} has {width}x{height} pixels; its central square is used, at "
                    f"{side}x{side}"
                )
        return told

    def batch_size(self, config: SamplerConfig, *, is_steered: bool) -> int:
        """Images at a time: on a GPU what fits into its free memory, as two trials tell.

        A ControlNet at most doubles what the denoiser needs; the trials are without.
        """
        device = self.generator.device
        if device.type != "cuda":
            return _CPU_BATCH
        trial = replace(config, num_inference_steps=2)  # PixArt's pipeline takes no single one
        peaks = []
        for count in (1, 4):
            torch.cuda.reset_peak_memory_stats(device)
            Sampler(self.generator, trial).draw([Drawing(prompt="")] * count)
            peaks.append(torch.cuda.max_memory_allocated(device))
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(device)
        bytes_per_image = (peaks[1] - peaks[0]) // 3
        return fitting_batch(free, bytes_per_image=bytes_per_image * (2 if is_steered else 1))

    def _sampler(self, config: SamplerConfig, control: Modality | None) -> Sampler:
        key = (config, control)
        if key not in self._samplers:
            self._samplers[key] = Sampler(
                self.generator,
                config,
                control=None if control is None else self._control_net(control),
                compile_denoiser=self._compile_denoiser,
            )
        return self._samplers[key]

    def _control_directory(self, modality: Modality) -> Path:
        directory = self.directory / CONTROLS / modality
        if not directory.is_dir():
            raise CraftsError(
                f"{self.directory} has no ControlNet for {modality}: no such stage trained"
            )
        return directory

    def _control_net(self, modality: Modality) -> ControlNetModel:
        directory = self._control_directory(modality)
        network = read_part(ControlNetModel, directory, dtype=self.generator.dtype)
        return network.to(self.generator.device).eval().requires_grad_(False)

    def _stacked(self, control: Modality, masks: Sequence[Path]) -> Tensor:
        return torch.stack(
            [torch.from_numpy(to_floats(self.condition(control, mask), control)) for mask in masks]
        )


def fitting_batch(free_bytes: int, *, bytes_per_image: int) -> int:
    """The largest power of two of images that leaves a fifth of the free memory, at most 256."""
    fits = int(free_bytes * _SHARE_OF_FREE_MEMORY) // max(1, bytes_per_image)
    return 1 << (min(max(fits, 1), _MAX_BATCH).bit_length() - 1)


def _dtype_on(device: torch.device, name: DtypeName) -> torch.dtype:
    """Raises CraftsError where numbers and device do not go together."""
    if name not in DTYPES:
        raise CraftsError(f"unknown dtype {name}; known: {', '.join(DTYPES)}")
    if name == "auto":
        is_half = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if is_half else torch.float32
    if name == "float16" and device.type == "cpu":
        raise CraftsError("float16 is for GPUs; on a CPU use float32 or bfloat16")
    return _TORCH[name]


def _size(mask: Path) -> tuple[int, int]:
    with opened(mask, FORMATS) as image:
        return upright_size(image)
