"""One evaluation: a generator, and what it has to be compared with, against held-out real tiles.

Distance is told in two: *colour* (squared MMD between statistics of optical density) and
*structure* (squared MMD in the encoder's features after every set has been mapped, as one, onto the
held-out colours). The plain distance mixes both. What else is measured is in ``panel``, and beside
what in ``baselines``.
"""

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from crafts_core.evaluation.baselines import ArmImages, comparison
from crafts_core.evaluation.colour import ColourMoments, colour_statistics, in_colours_of
from crafts_core.evaluation.encoder import Encoder, Features, Images
from crafts_core.evaluation.fidelity import (
    Interval,
    Reference,
    Rows,
    frechet_distance,
    matched_floor,
    mmd_to_reference,
    real_floor,
)
from crafts_core.evaluation.figures import Arm, Distances, Evaluation, Fidelity
from crafts_core.evaluation.memorisation import Progress
from crafts_core.evaluation.panel import Panel
from crafts_core.evaluation.real_tiles import RealTiles
from crafts_core.foundation import Foundation
from crafts_core.generator import Generator
from crafts_core.sampling import sample_images

_MATCHED_SPLITS = 20
"""Of the structure floor: each embeds half of the tiles anew."""


class EvaluationConfig(BaseModel):
    """How many images are drawn, and how, and what looks at them."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    encoder: str = Field(default="embedded", min_length=1)
    """A name or a local path, as ``load_encoder`` takes it."""

    num_images: int = Field(default=192, ge=16, le=100_000)
    num_inference_steps: int = Field(default=20, ge=1, le=1000)
    guidance_scale: float = Field(default=1.5, ge=1, le=20)
    num_bootstrap: int = Field(default=200, ge=20, le=100_000)
    num_training_tiles: int = Field(default=1500, ge=16, le=100_000)
    """At most so many real tiles of training patients teach judges and colour map."""
    batch_size: int = Field(default=64, ge=1, le=4096)
    seed: int = Field(default=0, ge=0)


class Evaluator:
    """Held-out tiles, prompts and features, computed once for any number of generators."""

    def __init__(
        self,
        foundation: Foundation,
        held_out: RealTiles,
        config: EvaluationConfig,
        encoder: Encoder,
        *,
        training: RealTiles | None = None,
    ) -> None:
        """Fix the reference and the prompts.

        Args:
            foundation: Where training started.
            held_out: Real tiles of patients that nobody trained on.
            config: How much is measured.
            encoder: What looks at tiles.
            training: Real tiles of patients that were trained on, for judges and colour map.

        Raises:
            ValueError: too few held-out patients.
        """
        self.config = config
        self._foundation = foundation
        self._encoder = encoder
        self._held_out = held_out.in_order_of_content()
        self._training = None if training is None else self._some_of(training)
        tiles, patients = self._held_out.images_NHWC, self._held_out.patients
        self.reference = Reference.fit(self.embed(tiles), patients)
        self._colour_reference = Reference.fit(colour_statistics(tiles), patients)
        self._colours = ColourMoments.of(tiles)
        rng = np.random.default_rng(config.seed)
        self._prompt_rows = rng.choice(len(self._held_out), config.num_images)
        self._prompts = self._held_out.take(self._prompt_rows)
        if len(np.unique(self._prompts.patients)) < 2:
            raise ValueError("nearly all held-out tiles are of one patient")
        self.prompts = list(self._prompts.captions)
        """Captions of random held-out tiles, so that the mix of tissues is the held-out one."""

    def embed(self, images_NHWC: Images) -> Features:
        """Features of images at the foundation's scale."""
        return self._encoder.embed(images_NHWC, mpp=self._foundation.manifest.mpp)

    def fidelity(self, generator: Generator, progress: Progress | None = None) -> Fidelity:
        """Distances of one generator."""
        images = self._sample(generator, "fidelity", progress)
        distances = self.distances(images, self.embed(images), self._prompts.patients)
        return Fidelity(
            encoder=self._encoder.name, encoder_hash=self._encoder.hash, **dict(distances)
        )

    def distances(
        self,
        images_NHWC: Images,
        features_ND: Features,
        patients: npt.NDArray[np.str_],
    ) -> Distances:
        """Distances of images whose features are known already.

        Args:
            images_NHWC: One set.
            features_ND: Its features.
            patients: Whose tile each is, or whose caption it was drawn from.
        """

        def mmd(of_ND: Features, reference: Reference) -> tuple[float, Interval]:
            return mmd_to_reference(
                of_ND,
                patients,
                reference,
                num_bootstrap=self.config.num_bootstrap,
                seed=self.config.seed,
            )

        mmd2, mmd2_interval = mmd(features_ND, self.reference)
        colour, colour_interval = mmd(colour_statistics(images_NHWC), self._colour_reference)
        matched_ND = self.embed(in_colours_of(images_NHWC, self._colours))
        structure, structure_interval = mmd(matched_ND, self.reference)
        return Distances(
            mmd2=mmd2,
            mmd2_interval=mmd2_interval,
            colour=colour,
            colour_interval=colour_interval,
            structure=structure,
            structure_interval=structure_interval,
            frechet=frechet_distance(self.reference.scale(features_ND), self.reference.features_MD),
        )

    def compare(
        self, before: Generator, after: Generator, progress: Progress | None = None
    ) -> Evaluation:
        """The whole evaluation of a study: its foundation, its generator, and their baselines."""
        panel = Panel(
            self._held_out,
            self._training,
            self.reference,
            self.embed,
            num_bootstrap=self.config.num_bootstrap,
            seed=self.config.seed,
        )
        rows = comparison(
            foundation=before,
            generator=after,
            draw=lambda generator, what: self._sample(generator, what, progress),
            prompts=self._prompts,
            held_out=self._held_out,
            mirrored=self._held_out.take(np.unique(self._prompt_rows)),
            training=self._training,
        )
        arms: list[Arm] = []
        for row in rows:
            if progress is not None:
                progress("images", len(arms), len(rows))
            arms.append(self._arm(row, panel))
        return self._evaluation(tuple(arms), panel)

    def _arm(self, row: ArmImages, panel: Panel) -> Arm:
        features_ND = self.embed(row.images_NHWC)
        if row.name == "real":
            distances = self._floors()
        else:
            distances = self.distances(row.images_NHWC, features_ND, row.patients)
        said = panel.figures(row, features_ND)
        return Arm(name=row.name, n=len(row.images_NHWC), **dict(distances), **said)

    def _floors(self) -> Distances:
        """What real tiles of other patients score, in each way that images are measured."""

        def floor(reference: Reference) -> tuple[float, Interval]:
            return real_floor(
                reference, num_splits=self.config.num_bootstrap, seed=self.config.seed
            )

        def matched(first: Rows, second: Rows) -> Features:
            tiles = self._held_out.images_NHWC
            return self.embed(in_colours_of(tiles[first], ColourMoments.of(tiles[second])))

        mmd2, mmd2_interval = floor(self.reference)
        colour, colour_interval = floor(self._colour_reference)
        structure, structure_interval = matched_floor(
            self.reference, matched, num_splits=_MATCHED_SPLITS, seed=self.config.seed
        )
        return Distances(
            mmd2=mmd2,
            mmd2_interval=mmd2_interval,
            colour=colour,
            colour_interval=colour_interval,
            structure=structure,
            structure_interval=structure_interval,
            frechet=None,
        )

    def _evaluation(self, arms: tuple[Arm, ...], panel: Panel) -> Evaluation:
        real, foundation, generator = (
            next(arm for arm in arms if arm.name == name)
            for name in ("real", "foundation", "generator")
        )
        assert foundation.frechet is not None
        assert generator.frechet is not None
        return Evaluation(
            encoder=self._encoder.name,
            encoder_hash=self._encoder.hash,
            metric="mmd2",
            n=self.config.num_images,
            n_heldout=len(self._held_out),
            heldout_patients=self.reference.num_patients,
            floor=real.mmd2,
            floor_interval=real.mmd2_interval,
            distance_foundation=foundation.mmd2,
            distance_foundation_interval=foundation.mmd2_interval,
            distance_generator=generator.mmd2,
            distance_generator_interval=generator.mmd2_interval,
            frechet_foundation=foundation.frechet,
            frechet_generator=generator.frechet,
            drift_foundation=foundation.drift,
            drift_generator=generator.drift,
            arms=arms,
            judged_classes=panel.classes,
            training_tiles=None if self._training is None else len(self._training),
            gate=panel.gate,
            not_measured=panel.reasons,
        )

    def _some_of(self, training: RealTiles) -> RealTiles:
        ordered = training.in_order_of_content()
        count = min(self.config.num_training_tiles, len(ordered))
        rng = np.random.default_rng(self.config.seed)
        return ordered.take(np.sort(rng.choice(len(ordered), count, replace=False)))

    def _sample(self, generator: Generator, what: str, progress: Progress | None) -> Images:
        return sample_images(
            generator,
            self.prompts,
            num_inference_steps=self.config.num_inference_steps,
            guidance_scale=self.config.guidance_scale,
            seed=self.config.seed,
            batch_size=self.config.batch_size,
            progress=None if progress is None else lambda done, all_: progress(what, done, all_),
        )
