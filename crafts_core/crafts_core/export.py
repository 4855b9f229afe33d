"""A trained generator as others use it: a stock diffusers directory, or a stock LoRA file.

Neither needs a line of this project to load. Both are written beside their place and renamed, so
a full disk leaves no half of one.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from crafts_core.adapters import lora_tensors, merged_unet
from crafts_core.foundation import Foundation
from crafts_core.plan import AdapterConfig
from crafts_core.quiet import quiet_transformers


def save_pipeline(
    directory: Path,
    foundation: Foundation,
    *,
    adapter: AdapterConfig,
    state: Mapping[str, Tensor],
    card: str,
) -> None:
    """Write the foundation with the adapter merged in, as a Stable Diffusion pipeline.

    ``DiffusionPipeline.from_pretrained(directory)`` loads it. An existing directory is replaced.

    Args:
        directory: Where to.
        foundation: What the adapter was trained on.
        adapter: The plan's adapter section.
        state: The trained weights.
        card: Text of ``README.md``; ``model_card`` composes one.

    Raises:
        AdapterError: the state does not fit.
    """
    generator = foundation.generator
    unet = merged_unet(generator.unet, adapter, state)
    staging = directory.with_name(directory.name + ".writing")
    shutil.rmtree(staging, ignore_errors=True)
    with quiet_transformers():
        # Importing the pipeline class makes transformers talk about image processors.
        from diffusers import StableDiffusionPipeline

        pipeline = StableDiffusionPipeline(
            vae=generator.vae,
            text_encoder=generator.text_encoder,
            tokenizer=generator.tokenizer,
            unet=unet,
            scheduler=generator.sampling_scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.save_pretrained(staging, safe_serialization=True)
    (staging / "README.md").write_text(card, encoding="utf-8")
    shutil.rmtree(directory, ignore_errors=True)
    staging.rename(directory)


def save_lora(path: Path, state: Mapping[str, Tensor]) -> None:
    """Write a LoRA file for ``pipeline.load_lora_weights(path.parent, weight_name=path.name)``.

    Raises:
        AdapterError: the state holds full weights, which are no LoRA.
    """
    staging = path.with_name(path.name + ".writing")
    save_file(lora_tensors(state), staging, metadata={"format": "pt"})
    staging.replace(path)


def model_card(
    *,
    study: str,
    foundation: Foundation,
    sites: list[str],
    privacy: str,
    rounds: int,
) -> str:
    """The README of an exported generator: what it is, who made it, what it promises.

    Args:
        study: Name of the study.
        foundation: The public starting point.
        sites: Sites that agreed to be named.
        privacy: One or two sentences on what was promised to patients.
        rounds: Rounds of training behind the weights.
    """
    manifest = foundation.manifest
    named = ", ".join(sites) if sites else "not named"
    return f"""---
library_name: diffusers
pipeline_tag: text-to-image
tags: [histopathology, synthetic-data, federated-learning, differential-privacy]
---
# {study}: a shared generator of synthetic histology tiles

Trained across hospitals in {rounds} rounds; slides never left a site. Follows our reading of the
CRAFTS abstract (arXiv 2512.13164); it is not the authors' model.

| | |
|---|---|
| foundation | {manifest.name} ({manifest.licence}), `{manifest.hash[:16]}` |
| images | {manifest.tile_px} px at {manifest.mpp} microns per pixel |
| sites | {named} |
| privacy | {privacy} |

## Use
```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("path/to/this/directory")
image = pipeline("a histology prompt", num_inference_steps=30, guidance_scale=3.0).images[0]
```

## Intended use
Research and teaching. Every image is synthetic: none shows a patient, and none may be used for
diagnosis. Mark images as synthetic wherever you pass them on.
"""
