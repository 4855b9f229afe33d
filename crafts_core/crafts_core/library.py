"""What ``import crafts`` offers to whoever has a generator: draw, make a data set, measure."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from PIL import Image

from crafts_core.dataset import Dataset, draw_dataset
from crafts_core.dataset_plan import (
    DEFAULT_SPLITS,
    DatasetConfig,
    PackedLayout,
    list_masks,
)
from crafts_core.evaluation.bench import Bench, BenchSettings
from crafts_core.evaluation.evaluate import EvaluationConfig
from crafts_core.evaluation.evaluation_page import evaluate_on
from crafts_core.evaluation.figures import Comparison
from crafts_core.evaluation.show import Show
from crafts_core.evaluation.validation import warning_of
from crafts_core.foundation_manifest import embedded_path
from crafts_core.image_folder import ImagePlan, batches, write_whole
from crafts_core.image_requests import ImageRequest
from crafts_core.plan_sections import Modality
from crafts_core.progress import Progress
from crafts_core.provenance import Origin, Provenance, encode_png
from crafts_core.sampler_config import DtypeName, SamplerConfig, SchedulerName
from crafts_core.studio import Studio
from crafts_core.tissue_types import read_types

_DEFAULTS = SamplerConfig()


@dataclass(frozen=True, slots=True)
class SyntheticImage:
    """An image that was drawn, and how."""

    image: Image.Image
    provenance: Provenance

    def save(self, path: str | Path) -> None:
        """Write a PNG that says in its metadata that it is synthetic, of what, and from where.

        Raises:
            ValueError: the name is not one of a PNG.
        """
        if Path(path).suffix.lower() != ".png":
            raise ValueError(f"expected a name that ends in .png, got {path}")
        write_whole(Path(path), encode_png(self.image, self.provenance))


class Generator:
    """A generator of synthetic histology. ``Generator.load`` opens one."""

    def __init__(self, studio: Studio) -> None:
        self._studio = studio

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        device: str = "cpu",
        dtype: DtypeName = "auto",
        compile_denoiser: bool = False,
    ) -> Self:
        """Open an exported generator or a foundation.

        Args:
            path: Its directory.
            device: As torch names it.
            dtype: ``auto`` is bfloat16 on a GPU that has it, float32 elsewhere.
            compile_denoiser: Compile the denoiser at the first batch: for long runs on a GPU.

        Raises:
            CraftsError: there is no such device, or the generator cannot be read.
        """
        studio = Studio.open(
            Path(path), device=device, dtype=dtype, compile_denoiser=compile_denoiser
        )
        return cls(studio)

    @property
    def origin(self) -> Origin:
        """Study, plan, foundation and promise to patients, as every image will say."""
        return self._studio.origin

    @property
    def tile_px(self) -> int:
        """Side of an image, in pixels."""
        return self._studio.generator.tile_px

    @property
    def captions(self) -> tuple[str, ...]:
        """The public captions that it was trained on."""
        return self._studio.trained_on

    def sample(
        self,
        prompts: str | Sequence[str],
        *,
        num: int = 1,
        negative_prompt: str = "",
        seed: int = 0,
        num_inference_steps: int = _DEFAULTS.num_inference_steps,
        guidance_scale: float = _DEFAULTS.guidance_scale,
        scheduler: SchedulerName = _DEFAULTS.scheduler,
        control: Modality | None = None,
        mask: str | Path | None = None,
        batch_size: int | None = None,
    ) -> list[SyntheticImage]:
        """Draw images; those of the first prompt come first. A string is one prompt.

        The same arguments draw the same images as ``crafts sample``. What will not be drawn as
        asked (a prompt too long, words it never saw) is a warning.

        Args:
            prompts: Captions.
            num: Images of each.
            negative_prompt: What they should not show.
            seed: Which images.
            num_inference_steps: Denoising steps.
            guidance_scale: 1 follows the caption as trained; more exaggerates it.
            scheduler: ``unipc``, ``dpm++``, ``ddim`` or ``euler``.
            control: ``nuclei`` or ``fluorescence``, with a mask.
            mask: What steers every image.
            batch_size: Images at a time; chosen by the device if None.

        Raises:
            ValueError: a setting is out of its range.
            CraftsError: a mask cannot be read, or an image came out as NaN.
        """
        if num < 1 or (control is None) != (mask is None):
            raise ValueError("expected num of at least 1, and control and mask together")
        config = SamplerConfig(
            scheduler=scheduler,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
        )
        requests = [
            ImageRequest(
                prompt=prompt,
                negative_prompt=negative_prompt,
                count=num,
                control=control,
                mask=None if mask is None else Path(mask),
            )
            for prompt in ([prompts] if isinstance(prompts, str) else prompts)
        ]
        self._warn(requests, config)
        plan = ImagePlan(requests, self._studio.provenance(config), seed=seed)
        is_steered = control is not None
        size = batch_size or self._studio.batch_size(config, is_steered=is_steered)
        return self._drawn(plan, config, size)

    def dataset(
        self,
        path: str | Path,
        types: str | Sequence[str],
        *,
        per_type: int,
        splits: dict[str, float] | None = None,
        layouts: Sequence[PackedLayout] = (),
        masks: str | Path | None = None,
        seed: int = 0,
        attributes: bool = True,
        config: SamplerConfig = _DEFAULTS,
        batch_size: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Dataset:
        """Draw an annotated data set, as ``crafts dataset`` does, or go on with one.

        Args:
            path: Its folder.
            types: TCGA codes, names, or ``normal <organ>``; ``all`` is every cancer type.
            per_type: Images of each.
            splits: Shares of ``train``, ``validation`` and ``test``; 0.8, 0.1, 0.1 if None.
            layouts: ``webdataset`` and ``parquet``, beside the image folder.
            masks: Folder of numbered nuclei that steer and annotate the images.
            seed: Which images.
            attributes: Captions say growth pattern, grade, stroma and features.
            config: How they are drawn.
            batch_size: Images at a time; chosen by the device if None.
            progress: Called with (images done, images in all).

        Raises:
            CraftsError: says what cannot be done and why.
        """
        asked = DatasetConfig(
            labels=tuple(read_types([types] if isinstance(types, str) else types)),
            per_type=per_type,
            splits=tuple((DEFAULT_SPLITS if splits is None else splits).items()),
            with_attributes=attributes,
            seed=seed,
        )
        return draw_dataset(
            self._studio,
            Path(path),
            asked,
            config,
            layouts=layouts,
            masks=[] if masks is None else list_masks(Path(masks)),
            batch_size=batch_size,
            progress=progress,
        )

    def _warn(self, requests: Sequence[ImageRequest], config: SamplerConfig) -> None:
        if config.guidance_scale == 1 and any(each.negative_prompt for each in requests):
            warnings.warn("negative prompts have no effect at guidance_scale 1", stacklevel=3)
        prompts = [text for each in requests for text in (each.prompt, each.negative_prompt)]
        masks = [each.mask for each in requests if each.mask is not None]
        for line in self._studio.warnings(prompts, masks):
            warnings.warn(line, stacklevel=3)

    def _drawn(self, plan: ImagePlan, config: SamplerConfig, size: int) -> list[SyntheticImage]:
        drawn = []
        for batch in batches((plan[place] for place in range(len(plan))), size):
            images = self._studio.draw(
                [each.drawing for each in batch],
                config,
                control=batch[0].control,
                masks=[each.mask for each in batch if each.mask is not None],
            )
            for each, pixels in zip(batch, images, strict=True):
                drawn.append(SyntheticImage(Image.fromarray(pixels), each.provenance))
        return drawn


def evaluate(
    subject: str | Path,
    real: str | Path,
    *,
    training: str | Path | None = None,
    foundation: str | Path | None = None,
    encoder: str = "embedded",
    num: int = 192,
    max_tiles: int = 2000,
    seed: int = 0,
    sampler: SamplerConfig = _DEFAULTS,
    mpp: float | None = None,
    device: str = "cpu",
    page: str | Path | None = None,
    show: Show = "auto",
    progress: Progress | None = None,
) -> Comparison:
    """How near images are to real ones, as ``crafts evaluate`` measures it.

    Args:
        subject: An exported generator, or a folder of images.
        real: A site's store, or a folder of images, of patients that nobody trained on.
        training: The same of patients that were trained on: teaches judges and colour map.
        foundation: Where training started; the embedded one if None.
        encoder: What sees tiles: a name, or a local path (docs/encoders.md).
        num: Images drawn from each generator.
        max_tiles: Real images, or images of a folder, at most.
        seed: Which.
        sampler: How generators draw.
        mpp: Microns per pixel of images that do not say theirs.
        device: As torch names it.
        page: Where a page with plots and pictures is written.
        show: Its pictures; ``auto`` shows real ones only if both are folders.
        progress: Called with what, done and all.

    Raises:
        ValueError: a setting is out of its range.
        CraftsError: says what cannot be measured and why.
    """
    settings = BenchSettings(
        config=EvaluationConfig(encoder=encoder, num_images=num, seed=seed, **asdict(sampler)),
        foundation=_path(foundation),
        training=_path(training),
        max_tiles=max_tiles,
        mpp=mpp,
        device=device,
    )
    bench = Bench.open(Path(real), [Path(subject)], settings, progress)
    if warning := warning_of(bench.encoder):
        warnings.warn(warning, stacklevel=2)
    return evaluate_on(bench, Path(subject), page=_path(page), show=show, progress=progress)


def embedded_foundation() -> Path:
    """The public foundation that comes with the package; it draws, too."""
    return embedded_path()


def _path(path: str | Path | None) -> Path | None:
    return None if path is None else Path(path)
