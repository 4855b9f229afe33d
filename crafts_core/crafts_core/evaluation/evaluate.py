"""One evaluation: the foundation and the shared generator against held-out real tiles."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from crafts_core.evaluation.alignment import PromptAgreement, prompt_agreement
from crafts_core.evaluation.encoder import Encoder, Features, Images
from crafts_core.evaluation.fidelity import (
    Interval,
    Reference,
    frechet_distance,
    mmd_to_reference,
    real_floor,
)
from crafts_core.foundation import Foundation
from crafts_core.generator import Generator
from crafts_core.sampling import sample_images
from crafts_core.tiles.store import Rows, TileStore

Progress = Callable[[str, int, int], None]


class EvaluationConfig(BaseModel):
    """How many images are drawn, and how, and what looks at them."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    encoder: str = Field(default="embedded", min_length=1)
    """A name or a local path, as ``load_encoder`` takes it."""

    num_images: int = Field(default=192, ge=16, le=100_000)
    num_inference_steps: int = Field(default=20, ge=1, le=1000)
    guidance_scale: float = Field(default=1.5, ge=1, le=20)
    num_bootstrap: int = Field(default=200, ge=20, le=100_000)
    batch_size: int = Field(default=64, ge=1, le=4096)
    seed: int = Field(default=0, ge=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class RealTiles:
    """Real tiles with their patients and captions. Rows belong together."""

    images_NHWC: Images
    patients: npt.NDArray[np.str_]
    captions: Sequence[str]

    @classmethod
    def read(cls, store: TileStore, rows: Rows) -> Self:
        """Those rows of a store."""
        return cls(
            images_NHWC=store.read_images(rows),
            patients=np.asarray(store.patients)[store.patient_indices(rows)],
            captions=[store.captions[place] for place in store.caption_ids(rows)],
        )

    @classmethod
    def cat(cls, parts: Sequence[Self]) -> Self:
        """All tiles in order."""
        return cls(
            images_NHWC=np.concatenate([part.images_NHWC for part in parts]),
            patients=np.concatenate([part.patients for part in parts]),
            captions=[caption for part in parts for caption in part.captions],
        )


class Fidelity(BaseModel):
    """Distances of one generator's images to the held-out tiles."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    encoder: str
    encoder_hash: str
    mmd2: float
    mmd2_interval: Interval
    frechet: float


class Evaluation(BaseModel):
    """The result. ``metric`` is squared MMD in the features of ``encoder``; smaller is closer."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    encoder: str
    encoder_hash: str
    metric: str
    n: int
    """Images drawn from each generator."""
    n_heldout: int
    heldout_patients: int
    floor: float
    """Real against real: other patients of the same hospitals."""
    floor_interval: Interval
    distance_foundation: float
    distance_foundation_interval: Interval
    distance_generator: float
    distance_generator_interval: Interval
    frechet_foundation: float
    frechet_generator: float
    drift_foundation: float
    drift_generator: float
    rank_foundation: float
    rank_generator: float
    top5_foundation: float
    top5_generator: float


class Evaluator:
    """Held-out tiles, prompts and features, computed once for any number of generators."""

    def __init__(
        self,
        foundation: Foundation,
        held_out: RealTiles,
        config: EvaluationConfig,
        encoder: Encoder,
    ) -> None:
        """Fix the reference and the prompts.

        Raises:
            ValueError: too few held-out patients.
        """
        self.config = config
        self._foundation = foundation
        self._encoder = encoder
        self.reference = Reference.fit(self.embed(held_out.images_NHWC), held_out.patients)
        rng = np.random.default_rng(config.seed)
        rows = rng.choice(len(held_out.captions), config.num_images)
        self.prompts = [held_out.captions[row] for row in rows]
        """Captions of random held-out tiles, so that the mix of tissues is the held-out one."""

    def embed(self, images_NHWC: Images) -> Features:
        """Features of images at the foundation's scale."""
        return self._encoder.embed(images_NHWC, mpp=self._foundation.manifest.mpp)

    def fidelity(self, generator: Generator, progress: Progress | None = None) -> Fidelity:
        """Distance of one generator."""
        features = self.embed(self._sample(generator, self.prompts, "fidelity", progress))
        return self.fidelity_of(features)

    def fidelity_of(self, features_ND: Features) -> Fidelity:
        """Distance of images whose features are known already."""
        mmd2, interval = mmd_to_reference(
            features_ND,
            self.reference,
            num_bootstrap=self.config.num_bootstrap,
            seed=self.config.seed,
        )
        return Fidelity(
            encoder=self._encoder.name,
            encoder_hash=self._encoder.hash,
            mmd2=mmd2,
            mmd2_interval=interval,
            frechet=frechet_distance(self.reference.scale(features_ND), self.reference.features_MD),
        )

    def agreement(self, generator: Generator, progress: Progress | None = None) -> PromptAgreement:
        """Drift and ranks of one generator on the prompt bank."""
        bank = self._foundation.prompt_bank
        images = self._sample(generator, [prompt.text for prompt in bank], "drift", progress)
        return prompt_agreement(self._foundation, images, bank)

    def compare(
        self, before: Generator, after: Generator, progress: Progress | None = None
    ) -> Evaluation:
        """The whole evaluation of a study: its foundation and its generator."""
        first, second = self.fidelity(before, progress), self.fidelity(after, progress)
        told_first, told_second = (
            self.agreement(before, progress),
            self.agreement(after, progress),
        )
        floor, floor_interval = real_floor(
            self.reference, num_splits=self.config.num_bootstrap, seed=self.config.seed
        )
        return Evaluation(
            encoder=self._encoder.name,
            encoder_hash=self._encoder.hash,
            metric="mmd2",
            n=self.config.num_images,
            n_heldout=len(self.reference.features_MD),
            heldout_patients=self.reference.num_patients,
            floor=floor,
            floor_interval=floor_interval,
            distance_foundation=first.mmd2,
            distance_foundation_interval=first.mmd2_interval,
            distance_generator=second.mmd2,
            distance_generator_interval=second.mmd2_interval,
            frechet_foundation=first.frechet,
            frechet_generator=second.frechet,
            drift_foundation=told_first.drift,
            drift_generator=told_second.drift,
            rank_foundation=told_first.mean_rank,
            rank_generator=told_second.mean_rank,
            top5_foundation=told_first.top5,
            top5_generator=told_second.top5,
        )

    def _sample(
        self, generator: Generator, prompts: Sequence[str], what: str, progress: Progress | None
    ) -> Images:
        return sample_images(
            generator,
            prompts,
            num_inference_steps=self.config.num_inference_steps,
            guidance_scale=self.config.guidance_scale,
            seed=self.config.seed,
            batch_size=self.config.batch_size,
            progress=None if progress is None else lambda done, all_: progress(what, done, all_),
        )
