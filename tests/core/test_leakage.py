"""Attacks find what is there (a generator that was overfitted, images that are copies) and nothing
where nothing is."""

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from crafts_core.evaluation.leakage import (
    Leakage,
    LeakageConfig,
    area_under_curve,
    denoising_error,
    measure_leakage,
    proximal_error,
    true_positive_rate,
)
from crafts_core.evaluation.memorisation import nearer_members
from crafts_core.evaluation.real_tiles import RealTiles
from crafts_core.foundation import Foundation
from crafts_core.generator import Generator
from crafts_core.stages.schedule import NoiseSchedule
from support.foundations import tiny_foundation

SMALL = LeakageConfig(
    patients=16, tiles_per_patient=2, num_images=16, num_inference_steps=2, num_resamples=200
)


@pytest.fixture(scope="module")
def foundation(tmp_path_factory: pytest.TempPathFactory) -> Foundation:
    foundation = tiny_foundation(tmp_path_factory.mktemp("f") / "tiny")
    vae = foundation.generator.vae
    # Latents as large as those of a trained VAE; otherwise the loss is all noise.
    vae.register_to_config(scaling_factor=15 * vae.config.scaling_factor)
    return foundation


def tissue(seed: int, side: int, *, patients: int = 16) -> RealTiles:
    """Two tiles each, all of one distribution: a colour, and noise."""
    rng = np.random.default_rng(seed)
    colour = rng.integers(60, 200, size=(patients, 1, 1, 3)).repeat(2, axis=0)
    noise = rng.integers(-50, 50, size=(2 * patients, side, side, 3))
    return RealTiles(
        images_NHWC=(colour + noise).clip(0, 255).astype(np.uint8),
        patients=np.repeat([f"{seed}-{index}" for index in range(patients)], 2),
        captions=["tissue with glands"] * (2 * patients),
    )


def overfitted(generator: Generator, tiles: RealTiles, *, steps: int) -> Generator:
    """Plain training of all weights, on the same few tiles again and again."""
    unet = copy.deepcopy(generator.denoiser).requires_grad_(True)
    schedule = NoiseSchedule.of(generator)
    images = torch.from_numpy(tiles.images_NHWC).permute(0, 3, 1, 2) / 127.5 - 1.0
    latents = generator.encode_images(images)
    text = generator.encode_captions(list(tiles.captions))
    optimizer = torch.optim.Adam(unet.parameters(), lr=3e-3)
    source = torch.Generator().manual_seed(5)
    for _ in range(steps):
        times = torch.randint(50, 800, (len(latents),), generator=source)
        noise = torch.randn(latents.shape, generator=source)
        output = unet(schedule.noisy(latents, noise, times), times, text).sample
        loss = (output - schedule.target(latents, noise, times)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return replace(generator, denoiser=unet.requires_grad_(False))


def smallest_p_value(found: Leakage) -> float:
    """Bonferroni over all tests."""
    tests = [attack.p_value for attack in found.attacks] + [found.memorisation.p_value]
    return min(1.0, len(tests) * min(tests))


@pytest.mark.slow
def test_an_untrained_generator_leaks_nothing(foundation: Foundation) -> None:
    side = foundation.manifest.tile_px
    found = measure_leakage(
        foundation.generator, foundation.generator, tissue(1, side), tissue(2, side), SMALL
    )
    assert smallest_p_value(found) > 0.01
    assert {attack.name: attack.auc for attack in found.attacks}[
        "loss against the foundation"
    ] == 0.5


@pytest.mark.slow
def test_an_overfitted_generator_is_found_out(foundation: Foundation) -> None:
    members, others = (tissue(seed, foundation.manifest.tile_px) for seed in (1, 2))
    leaky = overfitted(foundation.generator, members, steps=150)
    found = measure_leakage(leaky, foundation.generator, members, others, SMALL)
    attacks = {attack.name: attack for attack in found.attacks}
    assert attacks["loss against the foundation"].auc > 0.9
    assert attacks["loss against the foundation"].true_positive_rate > 0.5
    assert smallest_p_value(found) < 0.01


def test_scores_are_their_definitions(foundation: Foundation) -> None:
    """One tile, one slow loop."""
    generator = foundation.generator
    schedule, alphas = NoiseSchedule.of(generator), generator.alphas_cumprod
    latents = torch.randn(1, *generator.latent_shape, generator=torch.Generator().manual_seed(0))
    text = generator.encode_captions(["tissue with glands"])

    source, errors = torch.Generator().manual_seed(9), []
    for share in np.linspace(0.05, 0.75, 8):
        time = round(float(share) * 999)
        noise = torch.randn(latents.shape, generator=source)
        signal, level = alphas[time].sqrt(), (1 - alphas[time]).sqrt()
        output = generator.denoiser(signal * latents + level * noise, time, text).sample
        errors.append((output - (signal * noise - level * latents)).square().mean())
    found = denoising_error(generator, latents, text, seed=9)
    assert float(found) == pytest.approx(float(torch.stack(errors).mean()), rel=1e-4)

    def epsilon(noisy: torch.Tensor, time: int) -> torch.Tensor:
        output = generator.denoiser(noisy, time, text).sample
        return (1 - alphas[time]).sqrt() * noisy + alphas[time].sqrt() * output

    start, time = epsilon(latents, 0), round(0.2 * 999)
    later = epsilon(alphas[time].sqrt() * latents + (1 - alphas[time]).sqrt() * start, time)
    slow = float((later - start).abs().pow(4).sum() ** 0.25)
    assert float(proximal_error(generator, latents, text)) == pytest.approx(slow, rel=1e-4)
    assert schedule.num_timesteps == 1000


def test_area_and_rate_by_counting() -> None:
    rng = np.random.default_rng(0)
    members, others = rng.normal(0.5, 1, 37), rng.normal(0, 1, 40)
    pairs = [(m > o) + 0.5 * (m == o) for m in members for o in others]
    assert area_under_curve(members, others) == pytest.approx(np.mean(pairs))
    rate = true_positive_rate(members, others, 0.05)
    best = max(
        (members > t).mean() for t in np.concatenate([members, others]) if (others > t).sum() <= 2
    )
    assert rate == pytest.approx(best, abs=1 / 37)
    assert true_positive_rate(members, members, 0.05) <= 0.05


@pytest.mark.parametrize("copies", [True, False])
def test_copies_of_members_are_found_and_new_images_are_not(copies: bool) -> None:
    rng = np.random.default_rng(3)
    sides = [[rng.normal(size=(3, 10)) for _ in range(20)] for _ in range(2)]
    near = np.concatenate(sides[0])[:40] + 0.1 * rng.normal(size=(40, 10))
    images = near if copies else rng.normal(size=(40, 10))
    share, interval, p_value = nearer_members(images, sides, num_resamples=300, rng=rng)
    assert interval.low <= share <= interval.high or copies
    assert (share > 0.95 and p_value < 0.01) if copies else p_value > 0.01


def test_few_patients_are_refused(foundation: Foundation, tmp_path: Path) -> None:
    few = tissue(1, foundation.manifest.tile_px, patients=4)
    with pytest.raises(ValueError, match="at least 8 patients on each side, got 4"):
        measure_leakage(foundation.generator, foundation.generator, few, few, SMALL)
