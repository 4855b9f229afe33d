"""A trained generator as others use it: a stock diffusers directory, or a stock LoRA file.

Neither needs a line of this project to load. Both are written beside their place and renamed, so
a full disk leaves no half of one. What was trained of ControlNets lies below ``controlnet/``, a
stock directory for each modality.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from safetensors.torch import load_file, save, save_file
from torch import Tensor
from transformers import CLIPTokenizer

from crafts_core.adapters import merged_control_net, merged_denoiser
from crafts_core.durable import share_as_umask_says, write_file
from crafts_core.errors import CraftsError
from crafts_core.foundation import Foundation
from crafts_core.generator_record import (
    PROMPT_BANK_NAME,
    RECORD_NAME,
    GeneratorRecord,
    parts_hash,
    prompt_bank_text,
)
from crafts_core.plan_sections import AdapterConfig, Modality
from crafts_core.quiet import quiet_transformers
from crafts_core.retrieval_record import PICKED, Retrieval
from crafts_core.state import lora_tensors, modalities_in
from crafts_core.told_colours import with_colours

CONTROLS = "controlnet"
CARD = "README.md"
_MEASURED = "\n## Measured\n"
_OF_VERSION_4 = "text_model."
_HUB_LICENCES = frozenset(
    {"apache-2.0", "mit", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "openrail++"}
)
"""Of the identifiers that the Hugging Face hub knows, those that a foundation is likely to have."""


def save_pipeline(
    directory: Path,
    foundation: Foundation,
    *,
    adapter: AdapterConfig,
    state: Mapping[str, Tensor],
    card: str,
    record: GeneratorRecord | None = None,
    retrieval: Retrieval | None = None,
) -> None:
    """Write the foundation with the adapter merged in, as a stock pipeline.

    ``DiffusionPipeline.from_pretrained(directory)`` loads it, and
    ``ControlNetModel.from_pretrained(directory / "controlnet" / modality)`` each ControlNet of the
    state. An earlier export in the directory is replaced.

    Args:
        directory: Where to.
        foundation: What the adapter was trained on.
        adapter: The plan's adapter section.
        state: The trained weights.
        card: Text of ``README.md``; ``model_card`` composes one.
        record: What its images will say of it, and the colours that its decoder is to have; None
            for an adapter that no study trained.
        retrieval: Public tiles that it was trained on, to be listed beside it.

    Raises:
        AdapterError: the state does not fit.
        CraftsError: something else lies in the directory.
    """
    generator = foundation.generator
    denoiser = merged_denoiser(generator.denoiser, adapter, state)
    colours = None if record is None else record.colours
    staging = directory.with_name(f".{directory.name}.writing")
    _check_is_export(directory)
    shutil.rmtree(staging, ignore_errors=True)
    with quiet_transformers():
        # Importing the pipeline class makes transformers talk about image processors.
        pipeline = generator.stock_pipeline(
            generator.sampling_scheduler(),
            denoiser=denoiser,
            vae=None if colours is None else with_colours(generator.vae, colours),
        )
        pipeline.save_pretrained(staging, safe_serialization=True)
    if isinstance(generator.tokenizer, CLIPTokenizer):
        _also_for_transformers_4(staging)
    for modality in modalities_in(state):
        network = merged_control_net(foundation, adapter, state, modality)
        network.save_pretrained(staging / CONTROLS / modality, safe_serialization=True)
    (staging / CARD).write_text(card, encoding="utf-8")
    bank = prompt_bank_text(foundation.prompt_bank)
    (staging / PROMPT_BANK_NAME).write_text(bank, encoding="utf-8")
    if record is not None:
        whole = record.model_copy(update={"generator_hash": parts_hash(staging)})
        (staging / RECORD_NAME).write_text(whole.model_dump_json(indent=1) + "\n", "utf-8")
    if retrieval is not None:
        (staging / PICKED).write_text(retrieval.as_table(), encoding="utf-8")
    share_as_umask_says(staging, like=staging / CARD)
    if directory.exists():
        shutil.rmtree(directory)
    staging.rename(directory)


def _check_is_export(directory: Path) -> None:
    """Raises CraftsError over anything that no earlier export has written."""
    is_export = (directory / PROMPT_BANK_NAME).is_file() and (directory / CARD).is_file()
    if directory.exists() and not is_export and (directory.is_file() or any(directory.iterdir())):
        raise CraftsError(f"{directory} is there and is no earlier export; name another folder")


def _also_for_transformers_4(directory: Path) -> None:
    """Add the tokenizer's files, and write the names of the text encoder's weights, of version 4.

    Version 5 reads both; version 4 would fill what it does not find with random numbers.
    """
    tokenizer = directory / "tokenizer"
    model = json.loads((tokenizer / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    vocabulary = json.dumps(model["vocab"], ensure_ascii=False)
    (tokenizer / "vocab.json").write_text(vocabulary + "\n", encoding="utf-8")
    merges = "".join(f"{' '.join(pair)}\n" for pair in model["merges"])
    (tokenizer / "merges.txt").write_text("#version: 0.2\n" + merges, encoding="utf-8")
    for path in (directory / "text_encoder").glob("*.safetensors"):
        renamed = {
            _OF_VERSION_4 + name.removeprefix(_OF_VERSION_4): tensor
            for name, tensor in load_file(path).items()
        }
        save_file(renamed, path, metadata={"format": "pt"})


def add_measurement(directory: Path, section: str) -> None:
    """Put what was measured of an exported generator onto its card; once is enough."""
    path = directory / CARD
    card = path.read_text(encoding="utf-8")
    if _MEASURED not in card:
        write_file(path, f"{card}{_MEASURED}{section}")


def save_lora(path: Path, state: Mapping[str, Tensor]) -> None:
    """Write a LoRA file for ``pipeline.load_lora_weights(path.parent, weight_name=path.name)``.

    Raises:
        AdapterError: the state holds full weights, which are no LoRA.
    """
    staging = path.with_name(path.name + ".writing")
    staging.write_bytes(save(lora_tensors(state), metadata={"format": "pt"}))
    staging.replace(path)


def model_card(
    *,
    study: str,
    foundation: Foundation,
    sites: list[str],
    privacy: str,
    rounds: int,
    planned_rounds: int | None = None,
    modalities: Sequence[Modality] = (),
    retrieval: Retrieval | None = None,
    has_told_colours: bool = False,
) -> str:
    """The README of an exported generator: what it is, who made it, what it promises.

    Args:
        study: Name of the study.
        foundation: The public starting point.
        sites: Sites that agreed to be named.
        privacy: One or two sentences on what was promised to patients.
        rounds: Rounds of training behind the weights.
        planned_rounds: Of the whole plan; as many if absent.
        modalities: What it can be steered by beside text.
        retrieval: Public tiles that it was trained on before the sites trained it.
        has_told_colours: Whether its decoder was given the colours that sites told.
    """
    manifest = foundation.manifest
    trained = f"{rounds} rounds"
    if planned_rounds is not None and rounds < planned_rounds:
        trained = f"{rounds} of its plan's {planned_rounds} rounds, which are not over"
    named = ", ".join(sites) if sites else "not named"
    call = (
        'image = pipeline("a histology prompt", num_inference_steps=30, guidance_scale=3.0'
        f"{foundation.generator.kind.card_arguments}).images[0]"
    )
    is_clip = isinstance(foundation.generator.tokenizer, CLIPTokenizer)
    more = (
        f"{_TRIED if is_clip else ''}{_steering(modalities)}{_public_tiles(retrieval)}"
        f"{_TOLD_COLOURS if has_told_colours else ''}"
    )
    text = f"""# {study}: a shared generator of synthetic histology tiles

Trained across hospitals in {trained}; slides never left a site. Follows our reading of the
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
{call}
```
{more}
## Intended use
Research and teaching. Every image is synthetic: none shows a patient, and none may be used for
diagnosis. Mark images as synthetic wherever you pass them on.
"""
    return str(ModelCard(f"---\n{_hub_facts(manifest.licence).to_yaml()}\n---\n{text}"))


_TRIED = """Loads with diffusers 0.35 to 0.42 and transformers 4.57 to 5: tried with diffusers
0.35.2 and transformers 4.57.3, where the same prompts gave the same conditioning.
"""
_TOLD_COLOURS = """
## Colours
Training left it in colours of its own. The decoder's last layer carries them onto those that the
sites had told with noise (mean and spread of each colour's optical density), all images alike:
`colours` of `generator.json`. The LoRA file has none of this.
"""


def hub_licence(licence: str) -> tuple[str, str | None]:
    """A licence as cards on the Hugging Face hub name it: identifier, and name if it has none."""
    known = licence.lower()
    return (known, None) if known in _HUB_LICENCES else ("other", licence)


def _hub_facts(licence: str) -> ModelCardData:
    identifier, name = hub_licence(licence)
    return ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-image",
        language="en",
        tags=["histopathology", "synthetic-data", "federated-learning", "differential-privacy"],
        license=identifier,
        license_name=name,
    )


def _public_tiles(retrieval: Retrieval | None) -> str:
    """The card's section on what was picked of a public pool; nothing where nothing was."""
    if retrieval is None:
        return ""
    credited = "\n".join(
        f"- {source or 'no source named'}: {licence}" for licence, source in retrieval.licences
    )
    return f"""
## Public tiles
Before the sites trained it, it was trained on {retrieval.in_words}, which lay nearest to what the
sites had told of their tissue with noise. The images are listed in `{PICKED}`; pool
`{retrieval.pool[:16]}`. That these tiles are open, and none of a patient of a site, is the word of
whoever made the pool.

{credited or "None was picked."}
"""


_CONDITION_TEXT: dict[Modality, str] = {
    "nuclei": """`nuclei` takes an RGB image: red is 255 inside nuclei; green is 255 on pixels of a
nucleus beside another nucleus or none; blue is the distance to the nearest pixel outside the
nucleus, as a share of the largest one in it, times 255. `crafts sample --control nuclei --mask
LABELS.png` writes it as `condition.png` from an image of numbered nuclei.""",
    "fluorescence": """`fluorescence` takes a float tensor (1, 8, H, W): four channels, each scaled
from its 1 % and 99.5 % quantiles to 0 and 1, then four that are 1 where that channel was
measured.""",
}


def _steering(modalities: Sequence[Modality]) -> str:
    """The card's section on ControlNets; nothing where there are none."""
    if not modalities:
        return ""
    told = "\n\n".join(_CONDITION_TEXT[modality] for modality in modalities)
    return f"""
## Use with a condition
```python
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

path = "path/to/this/directory"
control = ControlNetModel.from_pretrained(f"{{path}}/{CONTROLS}/{modalities[0]}")
pipeline = StableDiffusionControlNetPipeline.from_pretrained(path, controlnet=control)
image = pipeline("a histology prompt", image=condition, num_inference_steps=30).images[0]
```
{told}
The size of a condition is the image's.
"""
