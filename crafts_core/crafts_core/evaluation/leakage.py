"""Does a finished generator tell who was in its training? Attacks, and a search for copies.

*Membership inference* scores patients by how well the generator knows their tiles, and asks how
well the score tells patients that were trained on (members) from others. Three scores, each a mean
over a patient's tiles:

* ``loss``: the denoising error (loss threshold, Matsumoto et al. 2023, arXiv 2302.03262);
* ``loss against the foundation``: how far it fell below the public foundation's, which takes out
  that some tissue is easy for everybody (difficulty calibration, Watson et al. 2022,
  arXiv 2111.08440);
* ``PIA``: the proximal initialization attack (Kong et al. 2024, arXiv 2305.18355).

A site that kept its updates has a fourth: ``crafts_client.update_attack``.

*Memorisation* (``memorisation``): are generated images nearer to tiles that were trained on than to
tiles of as many other patients?

Both sides must come from the same hospitals, or an attack finds the scanner. The result is computed
from patients without noise: it belongs to whoever holds both sides, and stays there.

Letters: N tiles, G patients, T timesteps, C H W latent.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict, Field
from scipy import stats
from torch import Tensor

from crafts_core.denoisers import predict
from crafts_core.evaluation.memorisation import (
    FEWEST_PATIENTS,
    Memorisation,
    MemorisationConfig,
    measure_memorisation,
    sides_of_one_size,
)
from crafts_core.evaluation.real_tiles import RealTiles
from crafts_core.evaluation.resampling import Interval, interval_of
from crafts_core.generator import Generator
from crafts_core.pixels import to_pixels
from crafts_core.progress import Progress
from crafts_core.stages.schedule import NoiseSchedule

Vector = npt.NDArray[np.float64]
_LOSS_TIMES = np.linspace(0.05, 0.75, 8)
"""Of the schedule: where a denoiser that saw the tile is better than one that did not."""
_PIA_TIME = 0.2


class LeakageConfig(MemorisationConfig):
    """How much is looked at."""

    patients: int = Field(default=64, ge=FEWEST_PATIENTS, le=100_000)
    """At most so many on each side."""
    tiles_per_patient: int = Field(default=4, ge=1, le=1000)
    false_positive_rate: float = Field(default=0.05, gt=0, lt=1)


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Attack(_Record):
    """One membership attack. Without leakage the area is 0.5 and the rate the false positives'."""

    name: str
    auc: float
    """How often a random member scores above a random other patient."""
    auc_interval: Interval
    p_value: float
    """Of no difference, one-sided (Mann-Whitney)."""
    true_positive_rate: float
    true_positive_rate_interval: Interval


class Leakage(_Record):
    """``leakage.json``."""

    patients: int
    """On each side."""
    tiles_per_patient: int
    num_images: int
    false_positive_rate: float
    attacks: tuple[Attack, ...]
    memorisation: Memorisation


def measure_leakage(
    generator: Generator,
    foundation: Generator,
    members: RealTiles,
    others: RealTiles,
    config: LeakageConfig,
    progress: Progress | None = None,
) -> Leakage:
    """Attack a generator with its own training patients and with others.

    Args:
        generator: What is published.
        foundation: The public generator that it was trained from.
        members: Tiles of patients that it was trained on.
        others: Tiles of patients of the same hospitals that it was not.
        config: How much is looked at.
        progress: Called with what, done and all.

    Raises:
        ValueError: fewer than 8 patients on a side.
    """
    members, others = members.in_order_of_content(), others.in_order_of_content()
    rng = np.random.default_rng(config.seed)
    sides = sides_of_one_size(
        members,
        others,
        patients=config.patients,
        tiles_per_patient=config.tiles_per_patient,
        rng=rng,
    )
    scores = [_scores(generator, foundation, side, config, progress) for side in sides]
    attacks = tuple(
        membership_attack(name, scores[0][name], scores[1][name], config) for name in scores[0]
    )
    return Leakage(
        patients=len(np.unique(sides[0].patients)),
        tiles_per_patient=config.tiles_per_patient,
        num_images=config.num_images,
        false_positive_rate=config.false_positive_rate,
        attacks=attacks,
        memorisation=measure_memorisation(generator, *sides, config, progress),
    )


@torch.no_grad()
def _scores(
    generator: Generator,
    foundation: Generator,
    tiles: RealTiles,
    config: LeakageConfig,
    progress: Progress | None,
) -> dict[str, Vector]:
    """Scores (G,) of each attack, larger for members; patients in order of their names."""
    loss, before, pia = [], [], []
    for start in range(0, len(tiles.patients), config.batch_size):
        rows = slice(start, start + config.batch_size)
        images = to_pixels(tiles.images_NHWC[rows])
        latents_BCHW = generator.encode_images(images)
        text_BLD = generator.encode_captions(list(tiles.captions[rows]))
        loss.append(denoising_error(generator, latents_BCHW, text_BLD, seed=config.seed + start))
        before.append(denoising_error(foundation, latents_BCHW, text_BLD, seed=config.seed + start))
        pia.append(proximal_error(generator, latents_BCHW, text_BLD))
        if progress is not None:
            progress("attacks", start + len(images), len(tiles.patients))
    error_N, before_N, pia_N = (
        torch.cat(parts).cpu().double().numpy() for parts in (loss, before, pia)
    )
    _, patient_N = np.unique(tiles.patients, return_inverse=True)
    tiles_G = np.bincount(patient_N)
    return {
        name: np.bincount(patient_N, weights=score_N) / tiles_G
        for name, score_N in (
            ("loss", -error_N),
            ("loss against the foundation", before_N - error_N),
            ("PIA", -pia_N),
        )
    }


def denoising_error(
    generator: Generator, latents_BCHW: Tensor, text_BLD: Tensor, *, seed: int
) -> Tensor:
    """Mean squared error (B,) of the prediction over fixed timesteps and noises."""
    schedule = NoiseSchedule.of(generator)
    source = torch.Generator().manual_seed(seed)
    errors = []
    for share in _LOSS_TIMES:
        times_B = _times(float(share), schedule, latents_BCHW)
        noise_BCHW = torch.randn(latents_BCHW.shape, generator=source).to(latents_BCHW)
        noisy_BCHW = schedule.noisy(latents_BCHW, noise_BCHW, times_B)
        output_BCHW = predict(generator.denoiser, noisy_BCHW, times_B, text_BLD)
        target_BCHW = schedule.target(latents_BCHW, noise_BCHW, times_B)
        errors.append((output_BCHW - target_BCHW).square().mean((1, 2, 3)))
    return torch.stack(errors).mean(0)


def proximal_error(generator: Generator, latents_BCHW: Tensor, text_BLD: Tensor) -> Tensor:
    """PIA's R (B,): how far the noise predicted at t is from the noise predicted at 0, 4-norm."""
    schedule = NoiseSchedule.of(generator)

    def noise_at(noisy_BCHW: Tensor, times_B: Tensor) -> Tensor:
        output_BCHW = predict(generator.denoiser, noisy_BCHW, times_B, text_BLD)
        return schedule.noise_in(noisy_BCHW, output_BCHW, times_B)

    start_BCHW = noise_at(latents_BCHW, _times(0.0, schedule, latents_BCHW))
    times_B = _times(_PIA_TIME, schedule, latents_BCHW)
    later_BCHW = noise_at(schedule.noisy(latents_BCHW, start_BCHW, times_B), times_B)
    error_B: Tensor = torch.linalg.vector_norm((later_BCHW - start_BCHW).flatten(1), ord=4, dim=1)
    return error_B


def _times(share: float, schedule: NoiseSchedule, latents_BCHW: Tensor) -> Tensor:
    time = round(share * (schedule.num_timesteps - 1))
    return torch.full((len(latents_BCHW),), time, device=latents_BCHW.device)


def membership_attack(
    name: str, members_G: Vector, others_G: Vector, config: LeakageConfig
) -> Attack:
    """How well a score tells members, who should have more of it, from others."""
    rng = np.random.default_rng(config.seed)

    def resampled(measure: Callable[[Vector, Vector], float]) -> Interval:
        return interval_of(
            [
                measure(rng.choice(members_G, len(members_G)), rng.choice(others_G, len(others_G)))
                for _ in range(config.num_resamples)
            ]
        )

    def rate(members: Vector, others: Vector) -> float:
        return true_positive_rate(members, others, config.false_positive_rate)

    test = stats.mannwhitneyu(members_G, others_G, alternative="greater")
    return Attack(
        name=name,
        auc=area_under_curve(members_G, others_G),
        auc_interval=resampled(area_under_curve),
        p_value=float(test.pvalue),
        true_positive_rate=rate(members_G, others_G),
        true_positive_rate_interval=resampled(rate),
    )


def area_under_curve(members_G: Vector, others_G: Vector) -> float:
    """Share of pairs in which the member scores higher; ties count half."""
    rank_G = stats.rankdata(np.concatenate([members_G, others_G]))[: len(members_G)]
    pairs = len(members_G) * len(others_G)
    return float((rank_G.sum() - len(members_G) * (len(members_G) + 1) / 2) / pairs)


def true_positive_rate(members_G: Vector, others_G: Vector, false_positive_rate: float) -> float:
    """Share of members above a threshold that at most so many others pass."""
    allowed = int(false_positive_rate * len(others_G))
    threshold = np.sort(others_G)[::-1][allowed]
    return float((members_G > threshold).mean())
