"""Does a generator follow its condition? Measured on real tiles that nobody trained on.

Three questions. *Loss*: is a tile easier to denoise with its own condition than with another
tile's, under the same noise? *Drawing* (nuclei): where does an image that is drawn from a mask have
its hematoxylin, the stain of nuclei? ``r`` is Pearson's correlation, over one image's pixels, of
its hematoxylin density with a mask's foreground. *Nuclei*: does who learnt from real tiles to find
them (``nuclei_finder``) find the mask's in what is drawn from it? Beside that stand the real tiles,
the same noise without a mask, and what is drawn from another tile's.

Shape letters: N tiles, C H W, P pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
import torch
from diffusers import ControlNetModel
from PIL import Image
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from crafts_core.control_net import steering
from crafts_core.denoisers import predict
from crafts_core.evaluation.baselines import reconstruct
from crafts_core.evaluation.encoder import Images
from crafts_core.evaluation.nuclei_finder import Found, Mask, NucleiFinder, compared
from crafts_core.evaluation.real_tiles import rows_in_order_of_content
from crafts_core.generator import Generator
from crafts_core.pixels import to_pixels
from crafts_core.plan_sections import Modality
from crafts_core.sampling import Control, contact_sheet, sample_images
from crafts_core.stages.batch import TileBatch, draw
from crafts_core.stages.pretraining import pretraining_loss
from crafts_core.stages.schedule import NoiseSchedule
from crafts_core.stains import stain_amounts
from crafts_core.tiles.conditions import to_floats
from crafts_core.tiles.store import TileStore

_MIN_SNR_GAMMA = 5.0
_CHUNK = 32
_FEWEST_TAUGHT, _MOST_TAUGHT = 16, 500
"""Tiles with masks, for somebody to learn what a nucleus looks like."""


Looked = Literal["mask", "real", "reconstruction", "drawn", "without", "drawn_other"]
LOOKED: dict[Looked, str] = {
    "mask": "the mask, its nuclei not told apart",
    "real": "the real tile",
    "reconstruction": "the real tile through the VAE",
    "drawn": "drawn from its mask",
    "without": "the same noise without a mask",
    "drawn_other": "drawn from another tile's mask",
}
"""What a finder looked at, always against the tile's own mask."""


class FoundIn(Found):
    """A row of what a finder finds."""

    where: Looked


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
    found: tuple[FoundIn, ...] = ()
    """Nucleus by nucleus; empty for fluorescence, or where nobody learnt to find nuclei."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SteeringConfig:
    """How much is measured."""

    max_tiles: int = 64
    draws_per_tile: int = 8
    num_inference_steps: int = 20
    guidance_scale: float = 1.5
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SteeredTiles:
    """Tiles that have a condition."""

    images_NHWC: Images
    condition_NCHW: npt.NDArray[np.float32]
    captions: Sequence[str]
    patient_N: npt.NDArray[np.int64]

    @classmethod
    def read(
        cls, store: TileStore, modality: Modality, *, max_tiles: int | None = None, seed: int = 0
    ) -> Self:
        """All of a store, or so many, the same ones whatever its salt."""
        rows_N = rows_in_order_of_content(store, seed=seed)
        rows_N = rows_N[store.has_condition(rows_N, modality)][:max_tiles]
        return cls(
            images_NHWC=store.read_images(rows_N),
            condition_NCHW=to_floats(store.read_conditions(rows_N, modality), modality),
            captions=[store.captions[place] for place in store.caption_ids(rows_N)],
            patient_N=store.patient_indices(rows_N),
        )


def teach_finder(stores: Sequence[TileStore], *, seed: int = 0) -> NucleiFinder | None:
    """A finder of nuclei, taught by tiles that have masks; None where these teach nothing.

    Raises:
        NotMeasurableError: scikit-learn is not installed.
    """
    most = -(-_MOST_TAUGHT // max(1, len(stores)))
    taught = [SteeredTiles.read(store, "nuclei", max_tiles=most, seed=seed) for store in stores]
    images_NHWC = np.concatenate([tiles.images_NHWC for tiles in taught])
    inside_NHW = np.concatenate([tiles.condition_NCHW[:, 0] for tiles in taught]) > 0.5
    if len(images_NHWC) < _FEWEST_TAUGHT:
        return None
    try:
        return NucleiFinder.teach(images_NHWC, inside_NHW, seed=seed)
    except ValueError:  # no pixel, or every pixel, is of a nucleus
        return None


def measure_steering(
    generator: Generator,
    network: ControlNetModel,
    store: TileStore,
    modality: Modality,
    config: SteeringConfig | None = None,
    *,
    finder: NucleiFinder | None = None,
) -> Steering:
    """Measure one ControlNet on the tiles of a store that have its condition.

    Args:
        generator: What it steers.
        network: The ControlNet.
        store: Tiles of patients that nobody trained on.
        modality: Of the condition.
        config: How much.
        finder: Who looks for nuclei, taught by other patients' tiles.

    Raises:
        ValueError: fewer than two tiles have one.
    """
    config = config or SteeringConfig()
    tiles = SteeredTiles.read(store, modality, max_tiles=config.max_tiles, seed=config.seed)
    count = len(tiles.captions)
    if count < 2:
        raise ValueError(f"expected at least two held-out tiles with {modality}, got {count}")
    other_N = others_of(tiles.patient_N)
    own_NCHW = tiles.condition_NCHW
    own = torch.from_numpy(own_NCHW)
    batch = _batch(generator, tiles.images_NHWC, list(tiles.captions), own)
    loss_own_N = _losses(generator, network, batch, config)
    swapped = replace(batch, condition_BCHW=own[other_N].to(generator.device))
    loss_other_N = _losses(generator, network, swapped, config)
    drawing: dict[str, Any] = {}
    if modality == "nuclei":
        drawn_NHWC = _drawn(generator, network, tiles.captions, own, config)
        foreground_NHW = own_NCHW[:, 0]
        drawing = {
            "drawn_own": _mean_r(drawn_NHWC, foreground_NHW),
            "drawn_other": _mean_r(drawn_NHWC, foreground_NHW[other_N]),
            "real_own": _mean_r(tiles.images_NHWC, foreground_NHW),
        }
        if finder is not None and foreground_NHW.any():
            looked: dict[Looked, Images] = {
                "real": tiles.images_NHWC,
                "reconstruction": reconstruct(generator, tiles.images_NHWC),
                "drawn": drawn_NHWC,
                "without": _drawn(generator, None, tiles.captions, own, config),
                "drawn_other": _drawn(generator, network, tiles.captions, own[other_N], config),
            }
            seen: dict[Looked, Mask] = {"mask": foreground_NHW > 0.5}
            seen |= {where: finder.see(images_NHWC) for where, images_NHWC in looked.items()}
            drawing["found"] = tuple(
                FoundIn(
                    where=where,
                    **dict(compared(seen_NHW, own_NCHW, tiles.patient_N)),
                )
                for where, seen_NHW in seen.items()
            )
    return Steering(
        modality=modality,
        tiles=count,
        loss_own=float(loss_own_N.mean()),
        loss_other=float(loss_other_N.mean()),
        share_easier_with_own=_share(loss_own_N, loss_other_N),
        **drawing,
    )


def steered_sheet(
    generator: Generator,
    network: ControlNetModel,
    store: TileStore,
    modality: Modality,
    config: SteeringConfig,
) -> Image.Image:
    """Real tiles, their conditions, drawn from these, and the same noise without: four rows."""
    tiles = SteeredTiles.read(store, modality, max_tiles=config.max_tiles, seed=config.seed)
    own = torch.from_numpy(tiles.condition_NCHW)
    seen_NHWC = (own[:, :3].permute(0, 2, 3, 1).numpy() * 255).astype(np.uint8)
    drawn = [_drawn(generator, each, tiles.captions, own, config) for each in (network, None)]
    return contact_sheet(
        np.concatenate([tiles.images_NHWC, seen_NHWC, *drawn]), columns=len(tiles.captions)
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
    pixels = to_pixels(images_NHWC)
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
        predicted = predict(
            generator.denoiser, noisy, draws.timesteps_B, tiles.text_BLD, steering=added
        )
        loss_B = pretraining_loss(
            predicted, tiles, draws, schedule=schedule, min_snr_gamma=_MIN_SNR_GAMMA
        )
        losses.append(loss_B.unflatten(0, (len(rows), config.draws_per_tile)).mean(1).cpu())
    return torch.cat(losses)


def _drawn(
    generator: Generator,
    network: ControlNetModel | None,
    captions: Sequence[str],
    condition_NCHW: Tensor,
    config: SteeringConfig,
) -> Images:
    """One image from each condition under its tile's caption; without one if None steers it."""
    return sample_images(
        generator,
        captions,
        control=None if network is None else Control(network, condition_NCHW),
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
