"""A generator's images come to have the colours that sites told, through stock files alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from crafts_core.evaluation.colour import colour_statistics
from crafts_core.foundation import Foundation
from crafts_core.generator_record import ToldColours
from crafts_core.sampling import sample_images
from crafts_core.stains import from_density
from crafts_core.told_colours import colours_between, find_colours, with_colours

TOLD_Q = np.array([0.5, 0.8, 0.4, -1.2, -0.9, -1.4])


def drawn(*, dense: float = 0.4, spread: float = 0.12) -> np.ndarray:
    """Images of one grey tissue in three colours of some density."""
    rng = np.random.default_rng(0)
    density = dense + spread * rng.standard_normal((6, 24, 24, 3)) * [1.0, 0.5, 1.5]
    return from_density(density.clip(0.02, 3.0))


def mapped(images: np.ndarray, colours) -> np.ndarray:
    """By hand, image by image and colour by colour."""
    out = images.astype(float)
    for colour in range(3):
        values = out[..., colour] / 127.5 - 1.0
        values = (values * colours.gain[colour] + colours.offset[colour]).clip(-1, 1)
        out[..., colour] = (values + 1.0) * 127.5
    return np.rint(out).astype(np.uint8)


def test_images_become_as_dense_and_as_varied_as_told() -> None:
    images = drawn()
    found = colour_statistics(mapped(images, colours_between(images, TOLD_Q))).mean(axis=0)
    assert found == pytest.approx(TOLD_Q, abs=0.02)
    assert np.abs(colour_statistics(images).mean(axis=0) - TOLD_Q).max() > 0.3


def test_colours_that_are_right_stay() -> None:
    images = drawn()
    same = colours_between(images, colour_statistics(images).mean(axis=0))
    assert same.gain == pytest.approx((1, 1, 1), abs=0.02)
    assert same.offset == pytest.approx((0, 0, 0), abs=0.02)


@pytest.mark.parametrize("value", [0, 255])
def test_what_has_no_spread_gets_a_finite_map(value: int) -> None:
    colours = colours_between(np.full((4, 8, 8, 3), value, np.uint8), TOLD_Q)
    assert np.isfinite([*colours.gain, *colours.offset]).all()


def test_the_decoder_gives_the_mapped_values_exactly(foundation: Foundation) -> None:
    vae, colours = foundation.generator.vae, colours_between(drawn(), TOLD_Q)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before, after = (each.decode(latents).sample for each in (vae, with_colours(vae, colours)))
    for colour in range(3):
        expected = before[:, colour] * colours.gain[colour] + colours.offset[colour]
        assert after[:, colour] == pytest.approx(expected.numpy(), abs=1e-5)


@pytest.mark.slow
def test_a_generator_draws_in_the_colours_told(foundation: Foundation) -> None:
    captions = ["tissue with glands", "tissue with sheets"]
    pale = ToldColours(gain=(0.3, 0.3, 0.3), offset=(0.2, 0.2, 0.2))  # random weights draw extremes
    generator = replace(foundation.generator, vae=with_colours(foundation.generator.vae, pale))
    settings = {"scheduler": "unipc", "num_inference_steps": 10, "guidance_scale": 3.0}
    start = sample_images(generator, captions * 8, **settings)
    moved_Q = np.array([0.1, -0.1, 0.05, -0.2, -0.3, -0.1])
    told_Q = colour_statistics(start).mean(axis=0) + moved_Q
    colours = find_colours(generator, told_Q, captions, seed=4)
    other = replace(generator, vae=with_colours(generator.vae, colours))
    found = colour_statistics(sample_images(other, captions * 8, **settings)).mean(axis=0)
    assert np.abs(found - told_Q).max() < 0.2 * np.abs(moved_Q).max()
    assert find_colours(generator, told_Q, captions, seed=4) == colours
