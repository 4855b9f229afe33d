"""Images follow from prompts, seed and index, as stock diffusers would draw them."""

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    UniPCMultistepScheduler,
)

from crafts_core.foundation import Foundation
from crafts_core.generator import Generator
from crafts_core.sampler_config import SCHEDULERS, SamplerConfig, SchedulerName
from crafts_core.sampling import (
    Drawing,
    Sampler,
    contact_sheet,
    initial_noise,
    sample_images,
)

PROMPTS = ["tissue with glands", "lung carcinoma", "", "spindle cells"]


def close(one: np.ndarray, two: np.ndarray) -> bool:
    """Equal but for the rounding of a byte."""
    return int(np.abs(one.astype(int) - two.astype(int)).max()) <= 1


STOCK = {
    "ddim": DDIMScheduler,
    "unipc": UniPCMultistepScheduler,
    "dpm++": DPMSolverMultistepScheduler,
    "euler": EulerDiscreteScheduler,
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_images_are_those_of_the_stock_pipeline(
    foundation: Foundation, scheduler: SchedulerName
) -> None:
    """From its own files and captions, with nothing of ours but the noise."""
    pipeline = StableDiffusionPipeline.from_pretrained(foundation.path, safety_checker=None)
    pipeline.scheduler = STOCK[scheduler].from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    noise = [initial_noise(foundation.generator, seed=7, index=row) for row in range(4)]
    stock = pipeline(
        PROMPTS,
        negative_prompt=["", "glands", "", "lung"],
        latents=torch.stack(noise),
        num_inference_steps=4,
        guidance_scale=2.5,
        output_type="np",
    ).images
    config = SamplerConfig(scheduler=scheduler, num_inference_steps=4, guidance_scale=2.5)
    ours = Sampler(foundation.generator, config).draw(
        [
            Drawing(prompt=prompt, negative_prompt=negative, seed=7, index=row)
            for row, (prompt, negative) in enumerate(
                zip(PROMPTS, ["", "glands", "", "lung"], strict=True)
            )
        ]
    )
    assert ours.shape == (4, 32, 32, 3)
    assert close(ours, np.round(stock * 255))


@pytest.mark.parametrize("num_inference_steps", [1, 2, 3])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_few_steps_draw_finite_images(
    foundation: Foundation, scheduler: SchedulerName, num_inference_steps: int
) -> None:
    """A schedule that starts at no signal at all has a first step without a finite ratio."""
    config = SamplerConfig(scheduler=scheduler, num_inference_steps=num_inference_steps)
    image = Sampler(foundation.generator, config).draw([Drawing(prompt="tissue")])
    assert image.std() > 0


def test_each_caption_is_encoded_once(
    foundation: Foundation, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[str] = []
    encode = type(foundation.generator).encode_captions

    def counted(self: object, captions: list[str]) -> torch.Tensor:
        encoded.extend(captions)
        return encode(foundation.generator, captions)

    monkeypatch.setattr(type(foundation.generator), "encode_captions", counted)
    sample_images(
        foundation.generator, ["lung", "colon", "lung"], num_inference_steps=1, batch_size=1
    )
    assert sorted(encoded) == ["", "colon", "lung"]


def test_a_sampler_refuses_conditions_that_steer_nothing(foundation: Foundation) -> None:
    sampler = Sampler(foundation.generator, SamplerConfig(num_inference_steps=1))
    with pytest.raises(ValueError, match="expected 0 conditions, got 1"):
        sampler.draw([Drawing(prompt="tissue")], torch.zeros(1, 3, 32, 32))


def test_half_precision_draws_nearly_the_same(foundation: Foundation) -> None:
    half = Generator.from_directory(foundation.path, dtype=torch.bfloat16)
    one, other = (
        sample_images(generator, ["lung"], num_inference_steps=3, guidance_scale=1.5).astype(int)
        for generator in (foundation.generator, half)
    )
    assert half.dtype == torch.bfloat16
    assert np.abs(one - other).mean() < 6
    assert np.corrcoef(one.ravel(), other.ravel())[0, 1] > 0.98


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_batch_size_changes_nothing(foundation: Foundation, guidance_scale: float) -> None:
    images = [
        sample_images(
            foundation.generator,
            PROMPTS,
            num_inference_steps=3,
            guidance_scale=guidance_scale,
            batch_size=size,
        )
        for size in (1, 3, 4)
    ]
    assert close(images[0], images[1])
    assert close(images[0], images[2])


def test_seed_and_index_choose_the_image(foundation: Foundation) -> None:
    same = ["tissue"] * 2
    one, two = (
        sample_images(foundation.generator, same, num_inference_steps=2, seed=seed)
        for seed in (0, 1)
    )
    assert not close(one[0], one[1])
    assert not close(one[0], two[0])
    assert not close(one[1], two[0])


def test_more_prompts_leave_the_first_images_as_they_were(foundation: Foundation) -> None:
    few = sample_images(foundation.generator, PROMPTS[:2], num_inference_steps=2)
    many = sample_images(foundation.generator, PROMPTS, num_inference_steps=2)
    assert close(few, many[:2])


def test_guidance_of_one_is_the_caption_alone(foundation: Foundation) -> None:
    plain = sample_images(foundation.generator, PROMPTS, num_inference_steps=3, guidance_scale=1.0)
    nearly = sample_images(
        foundation.generator, PROMPTS, num_inference_steps=3, guidance_scale=1.0 + 1e-6
    )
    assert close(plain, nearly)


def test_global_randomness_is_not_touched(foundation: Foundation) -> None:
    before = torch.get_rng_state()
    sample_images(foundation.generator, ["tissue"], num_inference_steps=2)
    assert torch.equal(before, torch.get_rng_state())


def test_no_prompts_make_no_images(foundation: Foundation) -> None:
    assert sample_images(foundation.generator, []).shape == (0, 32, 32, 3)


def test_progress_reaches_the_end(foundation: Foundation) -> None:
    seen: list[tuple[int, int]] = []
    sample_images(
        foundation.generator,
        PROMPTS[:3],
        num_inference_steps=1,
        batch_size=2,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(2, 3), (3, 3)]


@pytest.mark.parametrize(
    "setting",
    [
        {"num_inference_steps": 0},
        {"batch_size": 0},
        {"guidance_scale": 0.5},
        {"guidance_scale": float("nan")},
        {"scheduler": "pndm"},
    ],
)
def test_impossible_setting_is_refused(foundation: Foundation, setting: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        sample_images(foundation.generator, ["tissue"], **setting)


def test_contact_sheet_holds_every_image() -> None:
    images = np.stack([np.full((8, 8, 3), value, np.uint8) for value in (10, 20, 30)])
    sheet = np.asarray(contact_sheet(images, columns=2))
    assert sheet.shape == (20, 20, 3)
    assert (sheet[0, 0, 0], sheet[0, 10, 0], sheet[10, 0, 0], sheet[19, 19, 0]) == (10, 20, 30, 255)
    assert contact_sheet(images, 2, ["a", "b", "c"]).height > 20


def test_contact_sheet_refuses_nothing_and_wrong_labels() -> None:
    with pytest.raises(ValueError, match="at least one image"):
        contact_sheet(np.zeros((0, 8, 8, 3), np.uint8), 2)
    with pytest.raises(ValueError, match="expected 1 labels"):
        contact_sheet(np.zeros((1, 8, 8, 3), np.uint8), 2, ["a", "b"])
