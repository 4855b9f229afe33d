"""``generator.json``: what an exported generator says of itself, and the origin of its images.

Stock diffusers passes over the file. A foundation has ``foundation.json`` instead; any other
diffusers directory has neither, and its images then name its folder and the hash of its weights.
"""

import hashlib
import json
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from crafts_core import __version__
from crafts_core.errors import CraftsError
from crafts_core.fields import Sha256, describe_first_error
from crafts_core.foundation_manifest import (
    DENOISER_FOLDERS,
    MANIFEST_NAME,
    read_manifest,
    sha256_of,
)
from crafts_core.provenance import Origin
from crafts_core.vocabulary import Prompt, prompt_bank

RECORD_NAME, PROMPT_BANK_NAME = "generator.json", "prompt_bank.json"
_PARTS = (*DENOISER_FOLDERS, "vae", "text_encoder", "tokenizer", "scheduler", "controlnet")


class ToldColours(BaseModel):
    """What becomes of each colour of its images, with values from -1 to 1 (``told_colours``)."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    gain: tuple[float, float, float]
    offset: tuple[float, float, float]


class GeneratorRecord(BaseModel):
    """Who trained an exported generator, from what, and what was promised to patients."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[1] = 1
    study: str
    plan_hash: Sha256
    rounds: int
    foundation: str
    foundation_hash: Sha256
    privacy: str
    mpp: float | None = None
    """Microns per pixel; None in records of earlier versions."""
    generator_hash: Sha256 | None = None
    """``parts_hash`` as it was exported; None in records of earlier versions."""
    colours: ToldColours | None = None
    """That its decoder has beside the foundation's, where sites told their colour."""
    version: str = __version__


def read_origin(directory: Path) -> Origin:
    """What images of a generator say of it. Reads all its files once, for the hash.

    Raises:
        CraftsError: ``generator.json`` or ``foundation.json`` is damaged, or the files are not
            those that were exported.
    """
    found = parts_hash(directory)
    drawn_by = Origin(generator=directory.resolve().name, generator_hash=found)
    if (directory / RECORD_NAME).is_file():
        record = _read_record(directory / RECORD_NAME)
        if record.generator_hash not in (None, found):
            raise CraftsError(
                f"{directory} is not as it was exported: a file is missing, added or altered; copy "
                f"it again, or remove its {RECORD_NAME} if it was changed on purpose (its images "
                "then name no study)"
            )
        shared = record.model_dump(include=set(Origin.model_fields) - {"generator_hash"})
        return drawn_by.model_copy(update=shared)
    if (directory / MANIFEST_NAME).is_file():
        manifest = read_manifest(directory)
        foundation = {"foundation": manifest.name, "foundation_hash": manifest.hash}
        return drawn_by.model_copy(update=foundation | {"mpp": manifest.mpp})
    return drawn_by


def parts_hash(directory: Path) -> str:
    """SHA-256 over names and hashes of the files that decide what a generator draws."""
    digest = hashlib.sha256()
    files = [path for part in _PARTS for path in (directory / part).rglob("*") if path.is_file()]
    for path in sorted(files):
        name = path.relative_to(directory).as_posix()
        digest.update(f"{sha256_of(path)}  {name}\n".encode())
    return digest.hexdigest()


def trained_prompts(directory: Path) -> tuple[Prompt, ...]:
    """The public captions that a generator was trained on; the package's where it names none.

    Raises:
        CraftsError: it is no generator, or its ``prompt_bank.json`` is damaged.
    """
    if not any((directory / name).is_dir() for name in DENOISER_FOLDERS):
        raise CraftsError(f"{directory} is no generator: it has no {' or '.join(DENOISER_FOLDERS)}")
    path = directory / PROMPT_BANK_NAME
    return read_prompt_bank(path) if path.is_file() else prompt_bank()


def read_prompt_bank(path: Path) -> tuple[Prompt, ...]:
    """The captions of a ``prompt_bank.json``.

    Raises:
        CraftsError: the file is missing or holds something else.
    """
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
        return tuple(
            Prompt(text=str(record["text"]), cancer_code=str(record["cancer_code"]))
            for record in records
        )
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise CraftsError(f"cannot read {path}: {error}") from error


def prompt_bank_text(prompts: tuple[Prompt, ...]) -> str:
    """The content of a ``prompt_bank.json``."""
    records = [{"text": each.text, "cancer_code": each.cancer_code} for each in prompts]
    return json.dumps(records, indent=1, ensure_ascii=False) + "\n"


def _read_record(path: Path) -> GeneratorRecord:
    try:
        return GeneratorRecord.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        raise CraftsError(f"{path}: {describe_first_error(error)}; export it again") from error
    except (OSError, UnicodeDecodeError) as error:
        raise CraftsError(f"cannot read {path}: {error}") from error
