"""The README of a drawn data set, with the facts that the Hugging Face hub shows."""

from collections.abc import Mapping

from huggingface_hub import DatasetCard, DatasetCardData

from crafts_core.dataset_layouts import IMAGES
from crafts_core.dataset_plan import DatasetConfig
from crafts_core.provenance import Provenance

_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))


def dataset_card(
    name: str,
    config: DatasetConfig,
    common: Provenance,
    *,
    num_images: Mapping[str, int],
    tile_px: int,
    has_masks: bool,
) -> str:
    """What is in the data set, what drew it, and what it must not be taken for.

    Args:
        name: Its title.
        config: What was asked for.
        common: What all images have in common.
        num_images: Of each split.
        tile_px: Side of an image.
        has_masks: Whether nuclei steered it.
    """
    origin, total = common.origin, sum(num_images.values())
    splits = ", ".join(f"{split} {count:,}" for split, count in num_images.items())
    privacy = origin.privacy or "no hospital's patients are behind these weights, as far as told"
    text = f"""# {name}: synthetic histology images

**Every image is synthetic: none shows a patient's tissue.** Drawn by `crafts dataset`.

| | |
|---|---|
| images | {total:,} of {tile_px} px; {splits} |
| types | {", ".join(config.labels)} |
| generator | {origin.generator}, `{origin.generator_hash[:16]}` |
| foundation | {origin.foundation or "not told"}{_short(origin.foundation_hash)} |
| study, plan | {origin.study or "none"}{_short(origin.plan_hash)} |
| privacy of the patients it was trained on | {privacy} |
| sampler | {common.scheduler}, {common.num_inference_steps} steps, guidance \
{common.guidance_scale:g}, {common.dtype} |
| seed, version | {config.seed}, crafts-federated {common.version} |

## What a label means here
The label is the type that the generator was *asked* for, and the attributes are words of the
caption. Nobody looked at the images: how often one shows what it was asked for is what
`crafts evaluate` measures of the generator.
{_about_masks() if has_masks else ""}
## Splits
Images are independent draws, so a split keeps nothing apart that the generator has in common. A
figure on the test split says how well one learns *this generator*; take real tiles of held-out
patients to say anything of tissue.

## Use
```python
from datasets import load_dataset

dataset = load_dataset("path/to/this/folder")
```
`{IMAGES}/SPLIT` is an image folder by class for torchvision, too. `manifest.json` has the SHA-256
of every file; `crafts provenance FILE` says how an image was drawn.

## Not for
Diagnosis, or a test of a device. Mark the images as synthetic wherever you pass them on.
"""
    return str(
        DatasetCard(f"---\n{_hub_facts(name, num_images, has_masks).to_yaml()}\n---\n{text}")
    )


def _about_masks() -> str:
    return """
## Masks
`masks/` holds the nuclei that steered each image, as 16-bit PNG with a number for each nucleus;
`annotations/` the same as COCO run lengths, and `metadata.jsonl` beside each image. They were
given, not found in the image: where the generator does not follow its mask, they are wrong.
"""


def _hub_facts(name: str, num_images: Mapping[str, int], has_masks: bool) -> DatasetCardData:
    tasks = ["image-classification", "text-to-image"]
    sizes = [word for most, word in _SIZES if sum(num_images.values()) < most]
    files = [{"split": split, "path": f"{IMAGES}/{split}/**"} for split in num_images]
    return DatasetCardData(
        pretty_name=name,
        language="en",
        annotations_creators="machine-generated",
        task_categories=[*tasks, "image-segmentation"] if has_masks else tasks,
        size_categories=sizes[:1] or ["1M<n<10M"],
        tags=["histopathology", "synthetic-data"],
        configs=[{"config_name": "default", "data_files": files}],
    )


def _short(digest: str) -> str:
    return f", `{digest[:16]}`" if digest else ""
