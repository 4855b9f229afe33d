"""Does a generator follow its condition? Measured on real tiles that nobody trained on.

Two questions. *Loss*: is a tile easier to denoise with its own condition than with another tile's,
under the same noise? *Drawing* (nuclei): where does an image that is drawn from a mask have its
hematoxylin, the stain of nuclei? ``r`` is Pearson's correlation, over one image's pixels, of its
hematoxylin density with a mask's foreground.

Shape letters: N tiles, C H W, P pixels.
"""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from diffusers import ControlNetModel
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from crafts_core.control_net import steering
from crafts_core.evaluation.encoder import Images
from crafts_core.evaluation.real_tiles import rows_in_order_of_content
from crafts_core.generator import Generator
from crafts_core.plan import Modality
from crafts_core.sampling import Control, sample_images
from crafts_core.stages.batch import TileBatch, draw
from crafts_core.stages.pretraining import pretraining_loss
from crafts_core.stages.schedule import NoiseSchedule
from crafts_core.stains import stain_amounts
from crafts_core.tiles.conditions import to_floats
from crafts_core.tiles.store import TileStore

_MIN_SNR_GAMMA = 5.0
_CHUNK = 32


class Steering(BaseModel):
    """How far conditions are followed. "Other" is another patient's tile where there is one."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    modality: Modality
    tiles: int
    loss_own: float
    loss_other: float
    share_easier_with_own: float
    """Of the tiles; 0.5 says that the condition does nothing."""
    drawn_own: float | None = None
    """Mean r of drawn images with the masks they were drawn from; None for fluorescence."""
    drawn_other: float | None = None
    """The same with other tiles' masks."""
    real_own: float | None = None
    """Mean r of the real tiles with their own masks: what a perfect generator would have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SteeringConfig:
    """How much is measured."""

    max_tiles: int = 64
    draws_per_tile: int = 8
    num_inference_steps: int = 20
    guidance_scale: float = 1.5
    seed: int = 0


def measure_steering(
    generator: Generator,
    network: ControlNetModel,
    store: TileStore,
    modality: Modality,
    config: SteeringConfig | None = None,
) -> Steering:
    """Measure one ControlNet on the tiles of a store that have its condition.

    Raises:
        ValueError: fewer than two tiles have one.
    """
    config = config or SteeringConfig()
    rows_N = rows_in_order_of_content(store, seed=config.seed)
    rows_N = rows_N[store.has_condition(rows_N, modality)]
    if len(rows_N) < 2:
        raise ValueError(f"expected at least two held-out tiles with {modality}, got {len(rows_N)}")
    rows_N = rows_N[: config.max_tiles]
    other_N = others_of(store.patient_indices(rows_N))
    own_NCHW = to_floats(store.read_conditions(rows_N, modality), modality)
    images_NHWC = store.read_images(rows_N)
    captions = [store.captions[place] for place in store.caption_ids(rows_N)]
    own = torch.from_numpy(own_NCHW)
    batch = _batch(generator, images_NHWC, captions, own)
    loss_own_N = _losses(generator, network, batch, config)
    swapped = replace(batch, condition_BCHW=own[other_N].to(generator.device))
    loss_other_N = _losses(generator, network, swapped, config)
    drawing = {}
    if modality == "nuclei":
        drawn_NHWC = _drawn(generator, network, captions, own, config)
        foreground_NHW = own_NCHW[:, 0]
        drawing = {
            "drawn_own": _mean_r(drawn_NHWC, foreground_NHW),
            "drawn_other": _mean_r(drawn_NHWC, foreground_NHW[other_N]),
            "real_own": _mean_r(images_NHWC, foreground_NHW),
        }
    return Steering(
        modality=modality,
        tiles=len(rows_N),
        loss_own=float(loss_own_N.mean()),
        loss_other=float(loss_other_N.mean()),
        share_easier_with_own=_share(loss_own_N, loss_other_N),
        **drawing,
    )


def others_of(patient_N: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """For each tile the next one in turn of another patient, or the next where there is none."""
    num = len(patient_N)
    following = [(np.arange(1, num) + place) % num for place in range(num)]
    found = [
        next((o for o in turn if patient_N[o] != patient_N[p]), turn[0])
        for p, turn in enumerate(following)
    ]
    return np.asarray(found, dtype=np.int64)


def _share(loss_own_N: Tensor, loss_other_N: Tensor) -> float:
    """Ties count half, so that a condition that does nothing gives 0.5."""
    easier_N = (loss_own_N < loss_other_N).double() + 0.5 * (loss_own_N == loss_other_N).double()
    return float(easier_N.mean())


def _batch(
    generator: Generator, images_NHWC: Images, captions: list[str], condition_NCHW: Tensor
) -> TileBatch:
    pixels = torch.from_numpy(images_NHWC).permute(0, 3, 1, 2).float() / 127.5 - 1.0
    return TileBatch(
        latents_BCHW=torch.cat([generator.encode_images(part) for part in pixels.split(_CHUNK)]),
        text_BLD=generator.encode_captions(captions),
        null_text_LD=generator.encode_captions([""])[0],
        weight_B=torch.ones(len(captions), device=generator.device),
        condition_BCHW=condition_NCHW.to(generator.device),
    )


@torch.no_grad()
def _losses(
    generator: Generator, network: ControlNetModel, batch: TileBatch, config: SteeringConfig
) -> Tensor:
    """Mean denoising loss of each tile over its draws, the same for every condition; (N,)."""
    schedule = NoiseSchedule.of(generator)
    source = torch.Generator().manual_seed(config.seed)
    losses = []
    for rows in torch.arange(len(batch)).split(_CHUNK):
        tiles = batch.select(rows).repeat(config.draws_per_tile)
        draws = draw(
            tiles, num_timesteps=schedule.num_timesteps, caption_dropout=0.0, generator=source
        )
        noisy = schedule.noisy(tiles.latents_BCHW, draws.noise_BCHW, draws.timesteps_B)
        assert tiles.condition_BCHW is not None
        added = steering(network, noisy, draws.timesteps_B, tiles.text_BLD, tiles.condition_BCHW)
        predicted = generator.unet(noisy, draws.timesteps_B, tiles.text_BLD, **added).sample
        loss_B = pretraining_loss(
            predicted, tiles, draws, schedule=schedule, min_snr_gamma=_MIN_SNR_GAMMA
        )
        losses.append(loss_B.unflatten(0, (len(rows), config.draws_per_tile)).mean(1).cpu())
    return torch.cat(losses)


def _drawn(
    generator: Generator,
    network: ControlNetModel,
    captions: list[str],
    condition_NCHW: Tensor,
    config: SteeringConfig,
) -> Images:
    """One image from each condition under its tile's caption."""
    return sample_images(
        generator,
        captions,
        control=Control(network, condition_NCHW),
        num_inference_steps=config.num_inference_steps,
        guidance_scale=config.guidance_scale,
        seed=config.seed,
    )


def _mean_r(images_NHWC: Images, foreground_NHW: npt.NDArray[np.float32]) -> float:
    """Over the images whose mask has both nuclei and something else."""
    stain_NHWS = stain_amounts(images_NHWC.astype(np.float64))
    hematoxylin_NP = stain_NHWS[..., 0].reshape(len(images_NHWC), -1)
    inside_NP = foreground_NHW.reshape(len(foreground_NHW), -1)
    r = [
        np.corrcoef(stain_P, inside_P)[0, 1]
        for stain_P, inside_P in zip(hematoxylin_NP, inside_NP, strict=True)
        if stain_P.std() > 0 and inside_P.std() > 0
    ]
    return float(np.mean(r)) if r else 0.0
