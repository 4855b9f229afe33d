"""``foundation.json``: what a foundation directory holds, and the SHA-256 of every file in it.

The hash of the manifest is the identity of a foundation: plans name it, sites compare it.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from importlib import metadata, resources
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from crafts_core import __version__
from crafts_core.durable import share_as_umask_says
from crafts_core.errors import CraftsError
from crafts_core.fields import Sha256, describe_first_error

EMBEDDED = "embedded"
MANIFEST_NAME = "foundation.json"
DENOISER_FOLDERS = ("unet", "transformer")
"""Of a diffusers directory, one for each kind in ``denoisers``; to ask needs no torch."""
ALLOWED_SUFFIXES = frozenset({".safetensors", ".json", ".txt", ".md"})
"""Weights travel as safetensors; everything else is text. Pickled weights can run code."""
PICKLE_SUFFIXES = frozenset({".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle"})
_PLAIN_PATH = re.compile(r"[^\x00-\x1f\x7f\\]+")
_LIBRARIES = ("torch", "diffusers", "transformers", "safetensors")

Count = Annotated[int, Field(ge=1)]
Correlation = Annotated[float, Field(ge=-1, le=1)]


class FoundationError(CraftsError):
    """A foundation directory is missing, incomplete, altered, or holds what it must not hold."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class LatentAlignerConfig(_Section):
    """Sizes of ``latent_aligner.safetensors``."""

    in_channels: Count
    width: Count
    embedding_dim: Count


class AlignmentRange(_Section):
    """r_lo and r_hi of the alignment gate, measured on the public probe."""

    r_lo: Correlation
    r_hi: Correlation

    @model_validator(mode="after")
    def _range_is_not_empty(self) -> Self:
        if not self.r_lo < self.r_hi:
            raise ValueError(f"expected r_lo < r_hi, got {self.r_lo} and {self.r_hi}")
        return self


class FoundationManifest(_Section):
    """What ``foundation.json`` says."""

    format_version: Literal[1] = 1
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]
    licence: Annotated[str, Field(min_length=1, max_length=200)]
    kind: Literal["embedded", "imported"]
    versions: dict[str, str]
    tile_px: Count
    mpp: Annotated[float, Field(gt=0)]
    latent_shape: tuple[Count, Count, Count]
    """(C, H, W) of one tile's latent."""
    latent_aligner: LatentAlignerConfig
    alignment: AlignmentRange
    files: dict[str, Sha256]
    """POSIX path relative to the directory -> SHA-256."""

    @model_validator(mode="after")
    def _paths_stay_inside(self) -> Self:
        for name in self.files:
            path = PurePosixPath(name)
            is_inside = not (path.is_absolute() or ".." in path.parts)
            if not (is_inside and path.as_posix() == name and _PLAIN_PATH.fullmatch(name)):
                raise ValueError(
                    f"file path {name!r} must be relative, normal, and without '..', "
                    "backslashes or control characters"
                )
            if name == MANIFEST_NAME:
                raise ValueError(f"{MANIFEST_NAME} cannot list itself")
        return self

    @property
    def hash(self) -> str:
        """SHA-256 of the canonical JSON of the manifest."""
        values = self.model_dump(mode="json")
        canonical = json.dumps(values, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


def write_manifest(
    directory: Path,
    *,
    name: str,
    licence: str,
    kind: Literal["embedded", "imported"],
    tile_px: int,
    mpp: float,
    latent_shape: tuple[int, ...],
    latent_aligner: Mapping[str, int],
    alignment: Mapping[str, float],
) -> FoundationManifest:
    """Hash every file of ``directory`` and write ``foundation.json`` beside them.

    All of them are then as readable as the umask says.

    Raises:
        FoundationError: the directory holds a file that is not allowed, or a value is impossible.
    """
    versions = {library: metadata.version(library) for library in _LIBRARIES}
    paths = [path for path in _files_of(directory) if path != MANIFEST_NAME]
    manifest = _validated(
        {
            "name": name,
            "licence": licence,
            "kind": kind,
            "versions": {"crafts-federated": __version__, **versions},
            "tile_px": tile_px,
            "mpp": mpp,
            "latent_shape": tuple(latent_shape),
            "latent_aligner": dict(latent_aligner),
            "alignment": dict(alignment),
            "files": {path: sha256_of(directory / path) for path in paths},
        }
    )
    text = manifest.model_dump_json(indent=1) + "\n"
    (directory / MANIFEST_NAME).write_text(text, encoding="utf-8")
    share_as_umask_says(directory, like=directory / MANIFEST_NAME)
    return manifest


def read_manifest(directory: Path) -> FoundationManifest:
    """Parse ``foundation.json`` without looking at the files it lists.

    Raises:
        FoundationError: there is none, or it is not a manifest.
    """
    path = directory / MANIFEST_NAME
    try:
        return _validated(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise FoundationError(
            f"no foundation at {directory} ({MANIFEST_NAME} is missing); "
            "build one with `crafts-server foundation build` or import one"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise FoundationError(f"cannot read {path}: {error}") from error


def parse_manifest(text: bytes) -> FoundationManifest:
    """A manifest that came from somewhere else.

    Raises:
        FoundationError: it is not a manifest.
    """
    try:
        return _validated(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise FoundationError(f"{MANIFEST_NAME} cannot be read: {error}") from error


def verify(directory: Path) -> FoundationManifest:
    """Check that the directory holds exactly the files of its manifest, byte for byte.

    Raises:
        FoundationError: names the first file that is missing, unknown, altered or not allowed.
    """
    manifest = read_manifest(directory)
    present = set(_files_of(directory)) - {MANIFEST_NAME}
    for path in sorted(present | manifest.files.keys()):
        if path not in present:
            raise FoundationError(f"foundation {directory}: {path} is missing; copy it again")
        if path not in manifest.files:
            raise FoundationError(f"foundation {directory}: {path} is not in {MANIFEST_NAME}")
        if sha256_of(directory / path) != manifest.files[path]:
            raise FoundationError(
                f"foundation {directory}: {path} does not match its SHA-256; copy it again"
            )
    return manifest


def embedded_path() -> Path:
    """Where the foundation that ships with the package lies."""
    return Path(str(resources.files("crafts_core"))) / "assets" / EMBEDDED


def named_path(name: str, *, base: Path = Path()) -> Path:
    """Where a foundation lies: ``embedded``, or a folder from ``base`` on."""
    return embedded_path() if name == EMBEDDED else base / name


def refuse_unsafe(path: Path) -> None:
    """Refuse links, pickled weights and file kinds that a foundation does not need.

    Raises:
        FoundationError: says which file and what to do.
    """
    if path.is_symlink():
        raise FoundationError(f"{path} is a link; a foundation holds plain files only")
    if path.suffix in PICKLE_SUFFIXES:
        raise FoundationError(
            f"{path} is a pickle and could run code; convert it to safetensors and remove it"
        )
    if path.suffix not in ALLOWED_SUFFIXES:
        expected = ", ".join(sorted(ALLOWED_SUFFIXES))
        raise FoundationError(f"{path}: expected one of {expected}; remove the file")


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _files_of(directory: Path) -> list[str]:
    paths = sorted(path for path in directory.rglob("*") if path.is_symlink() or path.is_file())
    for path in paths:
        refuse_unsafe(path)
    return [path.relative_to(directory).as_posix() for path in paths]


def _validated(values: object) -> FoundationManifest:
    try:
        return FoundationManifest.model_validate(values)
    except ValidationError as error:
        raise FoundationError(f"{MANIFEST_NAME}: {describe_first_error(error)}") from error
