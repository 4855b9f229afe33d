"""One part of a generator or aligner from a local directory: whole, finite, or refused in one line.

The libraries fill a missing weight with random numbers and say so in a log that nobody reads; then
the same seed draws another picture each time. Here a part loads as it was saved or not at all.
"""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from crafts_core.foundation_manifest import PICKLE_SUFFIXES, FoundationError
from crafts_core.quiet import quiet_transformers

_WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|model)(?:\.(?P<variant>\w+))?(?:-\d{5}-of-\d{5})?"
    r"(?:\.(?P<late_variant>\w+))?\.safetensors"
)
_LFS = b"version https://git-lfs"


def read_part(
    model_class: Any, directory: Path, *, dtype: torch.dtype | str, **options: Any
) -> Any:
    """Load a part with its stock class.

    Weights in files of a variant (``model.fp16.safetensors``) are taken where there are no others.

    Args:
        model_class: Of diffusers or transformers.
        directory: ``config.json`` and safetensors.
        dtype: What the weights are widened to; ``auto`` leaves them as they are.
        options: What else the class takes.

    Raises:
        FoundationError: a weight is missing, of another shape, not finite, or a file cannot be
            read; the message names it.
    """
    variant = _variant_of(directory)
    with readable(directory):
        config = json.loads((directory / "config.json").read_text("utf-8"))
        if not isinstance(config, dict):  # a library would ask the hub for another
            raise ValueError("config.json holds no settings")
        _refuse_fetched_kernels(config)
    # diffusers has its own word for it.
    named = "dtype" if model_class.__module__.startswith("transformers") else "torch_dtype"
    with readable(directory), quiet_transformers():
        model, found = model_class.from_pretrained(
            directory,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            variant=variant,
            **{named: dtype},
            **options,
        )
    for name in sorted(map(_name_of, (*found["missing_keys"], *found["mismatched_keys"]))):
        raise FoundationError(f"{directory}: weight {name} is missing or has another shape")
    _check_finite(model, directory)
    return model


def _refuse_fetched_kernels(config: Mapping[str, Any]) -> None:
    """Raises ValueError where settings name an attention of a repository.

    Transformers downloads it and runs its code, where the package ``kernels`` is installed.
    """
    for key, value in config.items():
        # A name, or a name for each part of the model.
        if key.endswith("attn_implementation") and "/" in str(value):
            raise ValueError(f"config.json names code to be downloaded, {value}")
        if isinstance(value, dict):
            _refuse_fetched_kernels(value)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of one file: safetensors, or a pickle of nothing but tensors.

    Raises:
        FoundationError: it cannot be read, or holds something else.
    """
    _refuse_lfs_pointer(path)
    with readable(path):
        if path.suffix == ".safetensors":
            weights: dict[str, Tensor] = load_file(path)
            return weights
        try:
            found = torch.load(path, map_location="cpu", weights_only=True)
        except UnpicklingError as error:
            raise FoundationError(
                f"{path} holds more than weights, which could run code; save it as safetensors"
            ) from error
    if not isinstance(found, dict) or not all(isinstance(each, Tensor) for each in found.values()):
        raise FoundationError(f"{path}: expected tensors by name (a state dict)")
    return found


def fill(model: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """Give a model its weights, every one of them; others in the file are left out.

    Raises:
        FoundationError: one is missing, of another shape, or not finite.
    """
    for name, own in model.state_dict().items():
        if name not in weights or weights[name].shape != own.shape:
            raise FoundationError(f"{path}: weight {name} is missing or has another shape")
    model.load_state_dict(weights, strict=False)
    _check_finite(model, path)


@contextmanager
def readable(directory: Path) -> Iterator[None]:
    """What a library raises over damaged files, as one line that names the directory.

    Raises:
        FoundationError: in place of it.
    """
    try:
        yield
    except (
        *(OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError),
        ImportError,  # a tokenizer may need a library of its own
    ) as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FoundationError(f"{directory} cannot be read ({line}); is the copy whole?") from error


def pipeline_kind(directory: Path) -> str | None:
    """The pipeline class that a diffusers directory names, if it names one."""
    try:
        kind = json.loads((directory / "model_index.json").read_text("utf-8"))["_class_name"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return kind if isinstance(kind, str) else None


def _variant_of(directory: Path) -> str | None:
    """Which variant of the weights to read; None where they have their plain name.

    Raises:
        FoundationError: there are no weights that could be read.
    """
    if not directory.is_dir():
        raise FoundationError(f"{directory} is missing; expected a diffusers or CLIP directory")
    files = sorted(directory.glob("*.safetensors"))
    for path in files:
        _refuse_lfs_pointer(path)
    found = [match for path in files if (match := _WEIGHTS.fullmatch(path.name))]
    variants = {match["variant"] or match["late_variant"] for match in found}
    if not variants:
        raise FoundationError(_no_weights(directory, files))
    if None in variants:
        return None
    if len(variants) > 1:
        raise FoundationError(
            f"{directory} holds weights of several variants ({', '.join(sorted(variants))}) and "
            "none without; keep one"
        )
    return variants.pop()


def _refuse_lfs_pointer(path: Path) -> None:
    with path.open("rb") as file:
        if file.read(len(_LFS)) == _LFS:
            raise FoundationError(
                f"{path} is a Git LFS pointer, not the weights; fetch them with git lfs pull"
            )


def _no_weights(directory: Path, files: list[Path]) -> str:
    if files:
        return (
            f"{directory} holds {files[0].name}, which is no name that weights have; rename it to "
            "diffusion_pytorch_model.safetensors, or model.safetensors for text encoder and aligner"
        )
    pickles = sorted(path.name for path in directory.iterdir() if path.suffix in PICKLE_SUFFIXES)
    if pickles:
        return (
            f"{directory} holds {pickles[0]} and no safetensors; pickled weights can run code, "
            "convert them with `save_pretrained(..., safe_serialization=True)` first"
        )
    return f"{directory} holds no *.safetensors file"


def _name_of(key: Any) -> str:
    """Mismatched keys come with their shapes."""
    return key if isinstance(key, str) else str(key[0])


def _check_finite(model: nn.Module, directory: Path) -> None:
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise FoundationError(f"{directory}: weight {name} holds NaN or infinity")
