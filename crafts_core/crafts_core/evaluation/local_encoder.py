"""Encoders from a local path, in the layouts that they are published in. Nothing is downloaded.

    DIR/config.json with model_type            transformers: CLIP, DINO, DINOv2, DINOv3
    DIR/config.json with architecture          timm (UNI, Virchow, H-optimus and others)
    DIR/open_clip_config.json                  open_clip
    FILE.pt with FILE.pt.json beside it        TorchScript

Weights are safetensors, or pickles that hold tensors alone. A TorchScript file is a program and is
run: open only one whose origin you trust.

Shape letters: N images, C H W channels and pixels, L tokens, D features, E before projection.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from crafts_core.evaluation.encoder import EncoderError
from crafts_core.evaluation.network_encoder import NetworkEncoder, Preparation, identity
from crafts_core.fields import describe_first_error
from crafts_core.foundation_manifest import FoundationError
from crafts_core.pretrained import fill, read_part, read_weights, readable

_CLIP = "clip"
_POOLED_BY_CLASS_TOKEN = {
    "vit": ("ViTModel", {"add_pooling_layer": False}),
    "dinov2": ("Dinov2Model", {}),
    "dinov2_with_registers": ("Dinov2WithRegistersModel", {}),
    "dinov3_vit": ("DINOv3ViTModel", {}),
}
"""transformers' model_type to its class; all put the class token first, after the last norm."""
_PREPARED_BY = "preprocessor_config.json"
_TIMM_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_OPEN_CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")


def load_local(path: Path) -> NetworkEncoder:
    """The encoder at a path, whatever its layout.

    Raises:
        EncoderError: no layout that is known, or a library is not installed.
        FoundationError: a file is missing, damaged, or holds more than weights.
    """
    if path.is_file():
        return _load_torchscript(path)
    if (path / "open_clip_config.json").is_file():
        return _load_open_clip(path)
    config = _read_json(path / "config.json")
    if "model_type" in config:
        return _load_transformers(path, config["model_type"])
    if "architecture" in config:
        return _load_timm(path, config)
    raise EncoderError(
        f"{path / 'config.json'} names neither model_type (transformers) nor architecture (timm)"
    )


def _load_transformers(path: Path, model_type: str) -> NetworkEncoder:
    import transformers

    network: Callable[[Tensor], Tensor]
    if model_type == _CLIP:
        model = read_part(transformers.CLIPModel, path, dtype=torch.float32).eval()
        network = partial(_projected, model)
    elif model_type in _POOLED_BY_CLASS_TOKEN:
        name, options = _POOLED_BY_CLASS_TOKEN[model_type]
        model = read_part(getattr(transformers, name), path, dtype=torch.float32, **options).eval()
        network = partial(_class_token, model)
    else:
        known = ", ".join((_CLIP, *_POOLED_BY_CLASS_TOKEN))
        raise EncoderError(f"{path}: expected model_type {known}, got {model_type}")
    told = _read_json(path / _PREPARED_BY)
    size = told.get("crop_size") or told.get("size")
    if isinstance(size, dict):
        size = size.get("height") or size.get("shortest_edge")
    preparation = _preparation(
        path / _PREPARED_BY, size, told.get("image_mean"), told.get("image_std")
    )
    weights = sorted(path.glob("*.safetensors"))
    return _encoder(path, weights, preparation, network, is_clip=model_type == _CLIP)


def _load_timm(path: Path, config: dict[str, Any]) -> NetworkEncoder:
    timm = _library("timm", path)
    told = config.get("pretrained_cfg") or {}
    size = (told.get("input_size") or [None])[-1]
    preparation = _preparation(path / "config.json", size, told.get("mean"), told.get("std"))
    with readable(path):
        model: nn.Module = timm.create_model(
            config["architecture"],
            pretrained=False,
            num_classes=0,
            **(config.get("model_args") or {}),
        )
    weights = _weights(path, _TIMM_WEIGHTS)
    fill(model, read_weights(weights), weights)
    return _encoder(path, [weights], preparation, model.eval().requires_grad_(False))


def _load_open_clip(path: Path) -> NetworkEncoder:
    open_clip = _library("open_clip", path)
    config = _read_json(path / "open_clip_config.json")
    told, sizes = config.get("preprocess_cfg") or {}, config.get("model_cfg") or {}
    size = (sizes.get("vision_cfg") or {}).get("image_size", 224)
    preparation = _preparation(
        path / "open_clip_config.json", size, told.get("mean"), told.get("std")
    )
    if "hf_model_name" in (sizes.get("text_cfg") or {}):
        raise EncoderError(
            f"{path}: its text tower would be downloaded; save the image tower as TorchScript"
        )
    with readable(path):
        model: nn.Module = open_clip.CLIP(**sizes)
    weights = _weights(path, _OPEN_CLIP_WEIGHTS)
    fill(model, read_weights(weights), weights)
    model.eval().requires_grad_(False)
    return _encoder(path, [weights], preparation, partial(_encoded, model), is_clip=True)


def _load_torchscript(path: Path) -> NetworkEncoder:
    beside = path.with_name(path.name + ".json")
    told = _read_json(beside)
    preparation = _preparation(beside, told.get("input_px"), told.get("mean"), told.get("std"))
    with readable(path):
        model = torch.jit.load(path, map_location="cpu").eval()
    return _encoder(path, [path], preparation, model)


def _encoder(
    path: Path,
    weights: list[Path],
    preparation: Preparation,
    network: Callable[[Tensor], Tensor],
    *,
    is_clip: bool = False,
) -> NetworkEncoder:
    configs = [path / "config.json", path / "open_clip_config.json"] if path.is_dir() else []
    told = [config.read_text("utf-8") for config in configs if config.is_file()]
    return NetworkEncoder(
        name=path.resolve().name,
        hash=identity(weights, preparation.model_dump_json(), *told),
        preparation=preparation,
        network=network,
        is_clip=is_clip,
    )


def _projected(model: Any, images_NCHW: Tensor) -> Tensor:
    pooled_NE = model.vision_model(pixel_values=images_NCHW).pooler_output
    features_ND: Tensor = model.visual_projection(pooled_NE)
    return features_ND


def _class_token(model: Any, images_NCHW: Tensor) -> Tensor:
    tokens_NLD: Tensor = model(pixel_values=images_NCHW).last_hidden_state
    return tokens_NLD[:, 0]


def _encoded(model: Any, images_NCHW: Tensor) -> Tensor:
    features_ND: Tensor = model.encode_image(images_NCHW)
    return features_ND


def _preparation(path: Path, input_px: Any, mean: Any, std: Any) -> Preparation:
    try:
        return Preparation.model_validate({"input_px": input_px, "mean": mean, "std": std})
    except ValidationError as error:
        raise EncoderError(
            f"{path} does not say how images are prepared ({describe_first_error(error)}); "
            "expected size, mean and std"
        ) from error


def _weights(path: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        if (path / name).is_file():
            return path / name
    raise FoundationError(f"{path} holds no weights; expected {' or '.join(names)}")


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise EncoderError(f"{path} is missing; it says how the encoder beside it is used")
    with readable(path):
        found = json.loads(path.read_text("utf-8"))
    if not isinstance(found, dict):
        raise EncoderError(f"{path}: expected a JSON object")
    return found


def _library(name: str, path: Path) -> ModuleType:
    try:
        return __import__(name)
    except ImportError as error:
        package = name.replace("open_clip", "open-clip-torch")
        raise EncoderError(
            f"{path} needs {package}: pip install {package} (it brings a torch build of its own; "
            "or save the image tower as TorchScript)"
        ) from error
