"""Every way to a patient's gradient against autograd on that patient alone.

On the layers that diffusion models are made of: a UNet in full, LoRA on attention and convolutions,
a ControlNet, LoRA on a transformer, with checkpointing and in bfloat16, for patients with as many
tiles and with fewer.
"""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from diffusers import ControlNetModel, PixArtTransformer2DModel, UNet2DConditionModel
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from crafts_core.denoisers import predict
from crafts_privacy.gradients import FlatGradient, GroupGradients

SIZE, TEXT = 8, 16
KINDS = ["lora", "lora-conv", "full", "controlnet", "pixart"]
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


def _unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=SIZE, in_channels=2, out_channels=2, block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), layers_per_block=1,
        cross_attention_dim=TEXT, attention_head_dim=8, norm_num_groups=4,
    )  # fmt: skip


def _transformer() -> PixArtTransformer2DModel:
    """Its text has one column more, which says which tokens count."""
    return PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=2, out_channels=4, num_layers=2,
        cross_attention_dim=8, sample_size=SIZE, caption_channels=TEXT - 1,
    )  # fmt: skip


class Denoiser(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.denoiser = (_transformer() if kind == "pixart" else _unet()).requires_grad_(
            kind == "full"
        )
        self.control: ControlNetModel | None = None
        if kind == "controlnet":
            self.control = ControlNetModel.from_unet(
                self.denoiser, conditioning_embedding_out_channels=(4, 8, 8)
            ).requires_grad_(True)
            for parameter in self.control.controlnet_down_blocks.parameters():
                nn.init.normal_(parameter, std=0.1)  # zero outputs would hide all other gradients
        elif kind != "full":
            convolutions = ["conv1", "conv_shortcut"] if kind == "lora-conv" else []
            targets = [*ATTENTION, *convolutions, *(["proj_out"] if kind == "pixart" else [])]
            lora = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
            inject_adapter_in_model(lora, self.denoiser)

    def losses(self, tiles: Sequence[int]) -> Tensor:
        """Per tile; a tile is the seed of its inputs."""
        made = [torch.Generator().manual_seed(tile) for tile in tiles]
        noisy, target = (torch.stack([torch.randn(2, SIZE, SIZE, generator=g) for g in made])
                         for _ in range(2))  # fmt: skip
        text = torch.stack([torch.randn(3, TEXT, generator=g) for g in made])
        if isinstance(self.denoiser, PixArtTransformer2DModel):
            text[..., -1] = 1.0
        times = torch.cat([torch.randint(1000, (1,), generator=g) for g in made])
        extra = {}
        if self.control is not None:
            mask = torch.stack([torch.rand(3, 4 * SIZE, 4 * SIZE, generator=g) for g in made])
            steered = self.control(noisy, times, text, mask)
            extra = {
                "down_block_additional_residuals": steered.down_block_res_samples,
                "mid_block_additional_residual": steered.mid_block_res_sample,
            }
        output = predict(self.denoiser, noisy, times, text, steering=extra)
        return (output.float() - target).square().mean((1, 2, 3))

    def trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.parameters() if parameter.requires_grad]


def reference(model: Denoiser, patients: Sequence[Sequence[int]]) -> Tensor:
    """One plain backward pass for each *tile*, added up."""
    trained = model.trained()
    rows = []
    for tiles in patients:
        row = torch.zeros(sum(parameter.numel() for parameter in trained))
        for tile in tiles:
            loss = model.losses([tile]).sum() / len(tiles)
            grads = torch.autograd.grad(loss, trained, allow_unused=True, materialize_grads=True)
            row += torch.cat([grad.flatten() for grad in grads])
        rows.append(row)
    return torch.stack(rows)


def folded(model: Denoiser, patients: Sequence[Sequence[int]], dtype: torch.dtype) -> Tensor:
    """Tile 0 fills places of patients with fewer tiles, and weighs nothing."""
    most = max(map(len, patients))
    missing = [most - len(tiles) for tiles in patients]
    filled = [[*tiles, *[0] * rest] for tiles, rest in zip(patients, missing, strict=True)]
    weights = [
        [1 / max(len(tiles), 1)] * len(tiles) + [0.0] * rest
        for tiles, rest in zip(patients, missing, strict=True)
    ]
    half = torch.autocast("cpu", dtype) if dtype != torch.float32 else nullcontext()
    with in_groups(model, len(patients), most) as gradients:
        with half:
            losses = model.losses([tile for tiles in filled for tile in tiles])
        return gradients.compute(losses * torch.tensor(weights).flatten())


def in_groups(model: nn.Module, num_patients: int, num_tiles: int) -> GroupGradients:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return GroupGradients(model, trained, num_patients=num_patients, num_tiles=num_tiles)


def one_by_one(model: Denoiser, patients: Sequence[Sequence[int]], dtype: torch.dtype) -> Tensor:
    flat, rows = FlatGradient(model.trained()), []

    def parts(tiles: Sequence[int]) -> Iterator[Tensor]:
        for tile in tiles:
            with torch.autocast("cpu", dtype) if dtype != torch.float32 else nullcontext():
                losses = model.losses([tile])
            yield losses.sum() / len(tiles)

    for tiles in patients:
        rows.append(flat.compute(parts(tiles)).clone())
    flat.release()
    return torch.stack(rows)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return float(((found - wanted).norm(dim=1) / wanted.norm(dim=1)).max())


@pytest.mark.slow
@pytest.mark.parametrize("path", [folded, one_by_one])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("patients", [[[1, 2], [3, 4], [5, 6]], [[1, 2, 3], [4]]], ids=str)
def test_a_patients_gradient_is_autograds(path, kind, patients, checkpointing: bool) -> None:
    model = Denoiser(kind)
    wanted = reference(model, patients)
    if checkpointing:
        part = model.control or model.denoiser
        part.enable_gradient_checkpointing()
    assert relative_error(path(model, patients, torch.float32), wanted) < 1e-4


@pytest.mark.parametrize("path", [folded, one_by_one])
@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_gradients_are_near_and_in_float32(path, kind: str) -> None:
    model, patients = Denoiser(kind), [[1, 2], [3, 4]]
    found = path(model, patients, torch.bfloat16)
    assert found.dtype == torch.float32
    assert relative_error(found, reference(model, patients)) < 0.3


def test_a_place_that_only_fills_has_a_zero_row() -> None:
    model = Denoiser("lora")
    found = folded(model, [[1], [], [2]], torch.float32)
    assert relative_error(found[[0, 2]], reference(model, [[1], [2]])) < 1e-4
    assert not found[1].any()


def test_a_layer_that_runs_twice_adds_both_times() -> None:
    layer = nn.Linear(3, 3)
    inputs = torch.randn(4, 3)
    with in_groups(layer, 2, 2) as gradients:
        found = gradients.compute(layer(layer(inputs)).square().sum(1))
    for row, part in zip(found, inputs.split(2), strict=True):
        grads = torch.autograd.grad(layer(layer(part)).square().sum(), list(layer.parameters()))
        assert torch.allclose(row, torch.cat([grad.flatten() for grad in grads]), atol=1e-6)


def test_a_layer_without_a_rule_is_refused_before_training() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.ones(3))

    layer = Scale()
    with pytest.raises(ValueError, match="Scale by patient; train patient by patient"):
        in_groups(layer, 1, 1)


def test_what_changes_a_layers_output_in_place_is_refused() -> None:
    layer = nn.Linear(3, 3)
    gradients = in_groups(layer, 2, 1)
    with gradients, pytest.raises(RuntimeError, match="inplace"):
        gradients.compute(torch.relu_(layer(torch.randn(2, 3))).sum(1))


def test_what_changes_a_layers_input_in_place_is_refused() -> None:
    layer, inputs = nn.Linear(3, 3), torch.randn(2, 3)
    with in_groups(layer, 2, 1) as gradients:
        losses = layer(inputs).sum(1)
        inputs += 1
        with pytest.raises(RuntimeError, match="inplace"):
            gradients.compute(losses)


def test_a_layer_that_mixes_the_batch_is_refused() -> None:
    layer = nn.Linear(3, 3)
    with in_groups(layer, 2, 1) as gradients:
        losses = layer(torch.randn(1, 3)).sum(1).expand(2)
        with pytest.raises(RuntimeError, match="expected 2 rows in every pass"):
            gradients.compute(losses)


def test_a_pass_of_another_shape_is_refused() -> None:
    """A last group that is smaller would round otherwise, and its size tells who was drawn."""
    layer = nn.Linear(3, 3)
    with in_groups(layer, 3, 2) as gradients:
        losses = layer(torch.randn(4, 3)).sum(1)
        with pytest.raises(RuntimeError, match="expected 6 rows in every pass"):
            gradients.compute(losses)


@pytest.mark.parametrize("kind", KINDS)
def test_passes_side_by_side_are_the_same_to_the_last_bit(kind: str) -> None:
    """None goes backward through a layer before all have begun to."""
    model, groups = Denoiser(kind), [[1, 2], [3, 4], [5, 6]]
    together = threading.Barrier(len(groups), timeout=60)

    def wait(_: Tensor) -> None:
        together.wait()

    def one_pass(tiles: Sequence[int]) -> Tensor:
        losses = model.losses(tiles)
        losses.register_hook(wait)  # as it begins to go backward
        try:
            return gradients.compute(losses)
        except RuntimeError as error:  # its rows are gone
            raise AssertionError("passes met in one set of rows") from error

    with in_groups(model, 2, 1) as gradients:
        expected = [gradients.compute(model.losses(tiles)) for tiles in groups]
        with ThreadPoolExecutor(len(groups)) as pool:
            found = list(pool.map(one_pass, groups))
    for row, wanted in zip(found, expected, strict=True):
        assert torch.equal(row, wanted)


def test_a_pass_that_another_thread_began_is_refused() -> None:
    """It would fill the rows of whatever that thread runs now, or none."""
    layer = nn.Linear(3, 3)
    with in_groups(layer, 2, 1) as gradients, ThreadPoolExecutor(1) as other:
        losses = layer(torch.randn(2, 3)).sum(1)
        with pytest.raises(RuntimeError, match="in another thread than its forward"):
            other.submit(gradients.compute, losses).result()
