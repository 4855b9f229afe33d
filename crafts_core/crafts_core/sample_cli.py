"""``crafts sample``, ``prompts`` and ``provenance``: draw, what can be drawn, what was drawn."""

import json
import math
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from crafts_core.command_line import one_line_errors, progress_bars, say
from crafts_core.image_requests import (
    MAX_IMAGES,
    MAX_SEED,
    ImageRequest,
    num_images,
    read_requests,
)
from crafts_core.plan_sections import MODALITIES, Modality
from crafts_core.sampler_config import MAX_STEPS, DtypeName, SamplerConfig, SchedulerName
from crafts_core.vocabulary import (
    CANCER_TYPES,
    FEATURES,
    GRADES,
    NORMAL_ORGANS,
    PATTERN_PHRASES,
    STROMA_AMOUNTS,
)

if TYPE_CHECKING:
    from crafts_core.studio import Studio

GeneratorDir = Annotated[
    Path, typer.Argument(exists=True, file_okay=False, help="Exported generator or foundation.")
]
Seed = Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Same seed, same images.")]
Steps = Annotated[int, typer.Option(min=1, max=MAX_STEPS, help="Denoising steps.")]
Guidance = Annotated[
    float, typer.Option(min=1.0, help="1 follows captions as trained; more exaggerates them.")
]
Scheduler = Annotated[SchedulerName, typer.Option(help="Sampler, as diffusers knows it.")]
Device = Annotated[str, typer.Option(help="Torch device, for example cpu or cuda.")]
Dtype = Annotated[
    DtypeName, typer.Option(help="Numbers to draw with; auto is bfloat16 on a GPU that has it.")
]
BatchSize = Annotated[
    int | None,
    typer.Option(min=1, max=4096, help="Images at a time; on a GPU what fits, if not given."),
]
Compile = Annotated[
    bool, typer.Option("--compile", help="Compile the denoiser first: for long runs on a GPU.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]

_DEFAULTS = SamplerConfig()
GO_ON = "the same command goes on"


def sample(
    generator_dir: GeneratorDir,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="Caption; repeat for more.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="Captions, one a line (.txt), or a table of images (.csv, .tsv, .jsonl).",
        ),
    ] = None,
    negative: Annotated[
        str, typer.Option(help="What images of --prompt should not show; needs guidance.")
    ] = "",
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder for images.")] = Path(
        "samples"
    ),
    num: Annotated[
        int, typer.Option(min=1, max=MAX_IMAGES, help="Images per prompt, or row without a count.")
    ] = 4,
    seed: Seed = 0,
    steps: Steps = _DEFAULTS.num_inference_steps,
    guidance: Guidance = _DEFAULTS.guidance_scale,
    scheduler: Scheduler = _DEFAULTS.scheduler,
    control: Annotated[
        str | None, typer.Option(help="What steers --prompt beside text: nuclei or fluorescence.")
    ] = None,
    mask: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, help="Numbered nuclei, or fluorescence (PNG, TIFF)."
        ),
    ] = None,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    batch_size: BatchSize = None,
    compile_denoiser: Compile = False,
    as_json: AsJson = False,
) -> None:
    """Draw images from captions. Every PNG says in its metadata that it is synthetic.

    Interrupted or killed, the same command goes on; another one replaces the images of the first.
    A table has one kind of image a row: caption, or type with attributes; negative, count, seed,
    control, mask. With a mask, condition.png is what was read of it.
    """
    config = checked_config(scheduler, steps, guidance)
    modality = _checked_control(control, mask)
    if not prompt and prompts is None:
        raise typer.BadParameter("give --prompt, or --prompts with a file")
    if not prompt and (negative or control):
        raise typer.BadParameter("--negative and --control go with --prompt; a table has columns")
    with one_line_errors("crafts", advice=GO_ON):
        requests = [
            ImageRequest(
                prompt=text, negative_prompt=negative, count=num, control=modality, mask=mask
            )
            for text in prompt or ()
        ]
        if prompts is not None:
            requests += read_requests(prompts, count=num)
        num_images(requests)
        studio = open_studio(generator_dir, device, dtype, compile_denoiser=compile_denoiser)
        files = _draw(
            studio, requests, config, out=out, seed=seed, batch_size=batch_size, columns=num
        )
    if as_json:
        say(json.dumps({"files": [str(path) for path in files]}))
    else:
        say(f"{num_images(requests)} images and a contact sheet in {out}")


def checked_config(scheduler: SchedulerName, steps: int, guidance: float) -> SamplerConfig:
    """Settings of a command as a value; what is out of range is wrong use."""
    if not math.isfinite(guidance):
        raise typer.BadParameter(f"--guidance must be a number from 1 up, got {guidance}")
    return SamplerConfig(scheduler=scheduler, num_inference_steps=steps, guidance_scale=guidance)


def open_studio(
    generator_dir: Path, device: str, dtype: DtypeName, *, compile_denoiser: bool
) -> "Studio":
    """Load a generator. Torch and diffusers take seconds to import; ``--help`` should not."""
    from crafts_core.studio import Studio

    return Studio.open(generator_dir, device=device, dtype=dtype, compile_denoiser=compile_denoiser)


def tell(studio: "Studio", requests: list[ImageRequest], config: SamplerConfig) -> None:
    """Say on stderr what will not be drawn as asked."""
    if config.guidance_scale == 1 and any(each.negative_prompt for each in requests):
        say("crafts: negative prompts have no effect at guidance 1", err=True)
    prompts = [text for each in requests for text in (each.prompt, each.negative_prompt)]
    masks = [each.mask for each in requests if each.mask is not None]
    for line in studio.warnings(prompts, masks):
        say(f"crafts: {line}", err=True)


def _checked_control(control: str | None, mask: Path | None) -> Modality | None:
    if (control is None) != (mask is None):
        raise typer.BadParameter("--control and --mask belong together")
    if control is not None and control not in MODALITIES:
        raise typer.BadParameter(f"--control must be {' or '.join(MODALITIES)}, got {control}")
    return next((each for each in MODALITIES if each == control), None)


def _draw(
    studio: "Studio",
    requests: list[ImageRequest],
    config: SamplerConfig,
    *,
    out: Path,
    seed: int,
    batch_size: int | None,
    columns: int,
) -> list[Path]:
    from crafts_core.image_folder import ImagePlan, draw_into, write_conditions, write_sheet

    tell(studio, requests, config)
    plan = ImagePlan(requests, studio.provenance(config), seed=seed)
    with progress_bars() as progress:
        files = draw_into(
            out, plan, studio, config, batch_size=batch_size, progress=partial(progress, "images")
        )
    write_conditions(out, plan, studio)
    return [*files, write_sheet(out, files, plan, columns=columns)]


def prompts(
    generator_dir: Annotated[
        Path | None,
        typer.Argument(
            exists=True, file_okay=False, help="Whose captions; the package's if not given."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List what a generator was publicly trained to draw: types, attributes, captions.

    Captions of hospitals are their patients' and are in no list.
    """
    from crafts_core.generator_record import trained_prompts
    from crafts_core.vocabulary import prompt_bank

    with one_line_errors("crafts"):
        bank = prompt_bank() if generator_dir is None else trained_prompts(generator_dir)
    types = {each.code: f"{each.name}, {each.organ}" for each in CANCER_TYPES}
    attributes: dict[str, list[str]] = {
        "growth_pattern": list(PATTERN_PHRASES),
        "nuclear_grade": list(GRADES),
        "stroma": list(STROMA_AMOUNTS),
        "features": list(FEATURES),
    }
    normal = [f"normal {organ}" for organ in NORMAL_ORGANS]
    if as_json:
        told = {"types": types, "normal": normal, "attributes": attributes}
        say(json.dumps({**told, "captions": [each.text for each in bank]}))
        return
    say("types:")
    for code, name in types.items():
        say(f"  {code:6}{name}")
    say("normal tissue:", *(f"  {name}" for name in normal))
    for name, words in attributes.items():
        say(f"{name}:", f"  {', '.join(words)}")
    say("captions:")
    for each in bank:
        say(f"  {each.text}")


def provenance(
    files: Annotated[
        list[Path], typer.Argument(exists=True, dir_okay=False, help="Images; any number.")
    ],
    as_json: AsJson = False,
) -> None:
    """Read back what an image says of its origin; exit status 1 if one says nothing."""
    from crafts_core.provenance import read_provenance

    with one_line_errors("crafts"):
        found = {str(path): read_provenance(path) for path in files}
    if as_json:
        say(json.dumps({name: said.model_dump() for name, said in found.items()}))
        return
    for name, said in found.items():
        say(f"{name}: {said.title if not said.synthetic else 'synthetic'}")
        values = said.model_dump(exclude={"synthetic", "origin", "prompts"})
        shown = {**said.origin.model_dump(), "prompt": "; ".join(said.prompts), **values}
        for key, value in shown.items():
            if value not in ("", None):
                say(f"  {key.replace('_', ' ')}: {value}")
