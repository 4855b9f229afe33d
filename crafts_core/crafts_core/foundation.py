"""The foundation: the public starting point of a study, as one verified directory.

``load`` checks every file's hash first and then reads safetensors only, so that every party of a
study starts from the same bytes and no file can run code.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from crafts_core.aligner import Aligner, LatentAligner
from crafts_core.errors import CraftsError
from crafts_core.foundation_import import import_diffusers
from crafts_core.foundation_manifest import (
    FoundationError,
    FoundationManifest,
    embedded_path,
    read_manifest,
    verify,
    write_manifest,
)
from crafts_core.generator import Generator
from crafts_core.generator_record import PROMPT_BANK_NAME, read_prompt_bank
from crafts_core.probe import Probe, correlation_range, load_probe, save_probe
from crafts_core.vocabulary import Prompt

__all__ = [
    "Foundation",
    "FoundationError",
    "FoundationManifest",
    "Probe",
    "correlation_range",
    "embedded_path",
    "import_diffusers",
    "load",
    "read_manifest",
    "save_probe",
    "verify",
    "write_manifest",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Foundation:
    """A loaded foundation. Public, frozen, shared by every run of a process.

    ``anchors_KD`` are the prompt bank's embeddings under the aligner (design: the anchors a_k);
    ``null_text_LD`` is the empty prompt that caption dropout and guidance use.
    """

    path: Path
    manifest: FoundationManifest
    generator: Generator
    aligner: Aligner
    latent_aligner: LatentAligner
    prompt_bank: tuple[Prompt, ...]
    probe: Probe
    anchors_KD: Tensor
    null_text_LD: Tensor

    @property
    def device(self) -> torch.device:
        return self.generator.device


def load(directory: Path, *, device: torch.device | str = "cpu") -> Foundation:
    """Verify a foundation directory and load it.

    Raises:
        FoundationError: a file is missing, unknown, altered, unsafe, or does not fit the others.
    """
    manifest = verify(directory)
    try:
        generator = Generator.from_directory(directory, device=device)
        aligner = Aligner.from_directory(directory / "aligner", device=device)
        latent_aligner = load_latent_aligner(directory, manifest).to(device)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        first_line = str(error).splitlines()[0]
        raise FoundationError(f"foundation {directory} cannot be loaded: {first_line}") from error
    if tuple(manifest.latent_shape) != generator.latent_shape:
        raise FoundationError(
            f"foundation {directory}: manifest says latents {manifest.latent_shape}, "
            f"the denoiser takes {generator.latent_shape}"
        )
    prompt_bank = load_prompt_bank(directory)
    return Foundation(
        path=directory,
        manifest=manifest,
        generator=generator,
        aligner=aligner,
        latent_aligner=latent_aligner,
        prompt_bank=prompt_bank,
        probe=load_probe(directory / "probe"),
        anchors_KD=aligner.embed_captions([prompt.text for prompt in prompt_bank]),
        null_text_LD=generator.encode_captions([""])[0],
    )


def load_latent_aligner(directory: Path, manifest: FoundationManifest) -> LatentAligner:
    """The frozen latent aligner, widened to float32."""
    head = LatentAligner(**manifest.latent_aligner.model_dump())
    state = load_file(directory / "latent_aligner.safetensors")
    head.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    return head.eval().requires_grad_(False)


def load_prompt_bank(directory: Path) -> tuple[Prompt, ...]:
    """The public captions of ``prompt_bank.json``.

    Raises:
        FoundationError: the file is missing, empty or holds something else.
    """
    path = directory / PROMPT_BANK_NAME
    try:
        bank = read_prompt_bank(path)
    except CraftsError as error:
        raise FoundationError(str(error)) from error
    if len(bank) < 3:
        raise FoundationError(f"{path}: expected at least 3 prompts, got {len(bank)}")
    return bank
