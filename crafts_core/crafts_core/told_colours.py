"""A generator in the colours that sites told: an affine map of what its decoder gives.

Training with few noised steps does not find the sites' stain. It is known, though, from one release
(``releases``), so the generator's own is carried onto it: a gain and an offset for each of red,
green and blue, found on images that it draws from public captions, and folded into the decoder's
last layer. All that is looked at was released, so it costs no privacy.

Shape letters: N images, P pixels of one image, C colours, Q numbers of colour.
"""

import copy
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from diffusers import AutoencoderKL
from scipy.optimize import least_squares
from torch import nn

from crafts_core.evaluation.encoder import Images
from crafts_core.generator import Generator
from crafts_core.generator_record import ToldColours
from crafts_core.sampler_config import SamplerConfig
from crafts_core.sampling import sample_images

NUM_DRAWN = 32
_BATCH = 16
_LEAST_GAIN, _MOST_GAIN, _MOST_OFFSET = 0.2, 5.0, 2.0
_LEAST_SPREAD = 1e-3

Numbers = npt.NDArray[np.float64]


def find_colours(
    generator: Generator, told_Q: Numbers, captions: Sequence[str], *, seed: int
) -> ToldColours:
    """Draw with a generator and see what its colours lack of those told.

    Args:
        generator: As trained.
        told_Q: Mean and log standard deviation of each colour's optical density, of a patient on
            average.
        captions: Public; by turns.
        seed: Of the noise.
    """
    config = SamplerConfig()
    images_NHWC = sample_images(
        generator,
        [captions[place % len(captions)] for place in range(NUM_DRAWN)],
        scheduler=config.scheduler,
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        seed=seed,
        batch_size=_BATCH,
    )
    return colours_between(images_NHWC, told_Q)


def colours_between(images_NHWC: Images, told_Q: Numbers) -> ToldColours:
    """The map after which images are, on average, as dense and as varied as told.

    Where no map can be (what is white stays white), the nearest one.
    """
    values_NPC = images_NHWC.reshape(len(images_NHWC), -1, 3).astype(np.float64) / 127.5 - 1.0
    gain, offset = zip(
        *(
            _fitted(values_NPC[..., colour], told_Q[colour], told_Q[colour + 3])
            for colour in range(3)
        ),
        strict=True,
    )
    return ToldColours(gain=gain, offset=offset)


def _fitted(values_NP: Numbers, mean: float, log_spread: float) -> tuple[float, float]:
    def missed(map_2: Numbers) -> Numbers:
        pixels_NP = np.clip(values_NP * map_2[0] + map_2[1], -1.0, 1.0) * 127.5 + 127.5
        density_NP = -np.log((pixels_NP + 1.0) / 256.0)
        spread_N = np.maximum(density_NP.std(axis=1), _LEAST_SPREAD)
        return np.array([density_NP.mean() - mean, np.log(spread_N).mean() - log_spread])

    found = least_squares(
        missed,
        [1.0, 0.0],
        bounds=([_LEAST_GAIN, -_MOST_OFFSET], [_MOST_GAIN, _MOST_OFFSET]),
        diff_step=1e-3,
    )
    return float(found.x[0]), float(found.x[1])


def with_colours(vae: AutoencoderKL, colours: ToldColours) -> AutoencoderKL:
    """The same autoencoder, whose decoder's last layer gives the mapped colours; exact."""
    mapped = copy.deepcopy(vae)
    last = mapped.decoder.conv_out
    assert isinstance(last, nn.Conv2d)
    assert last.bias is not None
    with torch.no_grad():
        gain_C = torch.tensor(colours.gain).to(last.weight)
        last.weight.mul_(gain_C[:, None, None, None])
        last.bias.mul_(gain_C).add_(torch.tensor(colours.offset).to(last.bias))
    return mapped
