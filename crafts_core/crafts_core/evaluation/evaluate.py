"""One evaluation: a generator, and what it has to be compared with, against held-out real tiles.

Distance is told in two: *colour* (squared MMD between statistics of optical density) and
*structure* (squared MMD in the encoder's features after every set has been mapped, as one, onto the
held-out colours). The plain distance mixes both. What else is measured is in ``yardstick`` and
``panel``, and beside what in ``baselines``.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from crafts_core.evaluation.alignment import Matcher
from crafts_core.evaluation.baselines import (
    ArmImages,
    PublicPart,
    comparison,
    foundation_arms,
)
from crafts_core.evaluation.encoder import Encoder, Features, Images
from crafts_core.evaluation.fidelity import Reference
from crafts_core.evaluation.figures import Arm, Comparison, Distances, Evaluation, Fidelity
from crafts_core.evaluation.memorisation import (
    SAMPLING,
    Memorisation,
    MemorisationConfig,
    measure_memorisation,
    sides_of_one_size,
)
from crafts_core.evaluation.network_encoder import is_clip
from crafts_core.evaluation.panel import Panel
from crafts_core.evaluation.real_tiles import OverlapError, RealTiles, middle, pixel_digests
from crafts_core.evaluation.yardstick import Yardstick
from crafts_core.foundation import Foundation
from crafts_core.generator import Generator
from crafts_core.progress import Progress
from crafts_core.sampler_config import SchedulerName
from crafts_core.sampling import sample_images

FEWEST_IMAGES = 16
_MEMORISED_PATIENTS, _MEMORISED_TILES = 64, 4
_NO_CAPTIONS = (
    "foundation, colour maps: need captions of the real images to draw from (a column caption)"
)


class EvaluationConfig(BaseModel):
    """How many images are drawn, and how, and what looks at them."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    encoder: str = Field(default="embedded", min_length=1)
    """A name or a local path, as ``load_encoder`` takes it."""

    num_images: int = Field(default=192, ge=16, le=100_000)
    scheduler: SchedulerName = "ddim"
    """As earlier figures were drawn; ``crafts evaluate`` draws as ``crafts sample`` does."""
    num_inference_steps: int = Field(default=20, ge=1, le=1000)
    guidance_scale: float = Field(default=1.5, ge=1, le=20)
    num_bootstrap: int = Field(default=200, ge=20, le=100_000)
    num_training_tiles: int = Field(default=1500, ge=16, le=100_000)
    """At most so many real tiles of training patients teach judges and colour map."""
    batch_size: int = Field(default=64, ge=1, le=4096)
    seed: int = Field(default=0, ge=0)

    @property
    def drawn_by(self) -> str:
        """The sampler, for people."""
        return (
            f"{self.scheduler}, {self.num_inference_steps} steps, guidance {self.guidance_scale:g}"
        )


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
        self.yardstick = Yardstick.fit(
            self._held_out,
            self.embed,
            is_clip=is_clip(encoder),
            num_bootstrap=config.num_bootstrap,
            seed=config.seed,
        )
        rng = np.random.default_rng(config.seed)
        self._prompt_rows = rng.choice(len(self._held_out), config.num_images)
        self._prompts = self._held_out.take(self._prompt_rows)
        if len(np.unique(self._prompts.patients)) < 2:
            raise ValueError("nearly all held-out tiles are of one patient")
        self.prompts = list(self._prompts.captions)
        """Captions of random held-out tiles, so that the mix of tissues is the held-out one."""

    @property
    def reference(self) -> Reference:
        return self.yardstick.reference

    @property
    def has_training(self) -> bool:
        return self._training is not None

    def embed(self, images_NHWC: Images) -> Features:
        """Features of images at the foundation's scale."""
        return self._encoder.embed(images_NHWC, mpp=self._foundation.manifest.mpp)

    def fidelity(self, generator: Generator, progress: Progress | None = None) -> Fidelity:
        """Distances of one generator.

        Raises:
            ValueError: the held-out tiles have no captions.
        """
        images = self._sample(generator, "fidelity", progress)
        return self._told(self.distances(images, self.embed(images), self._prompts.patients))

    def fidelity_of(self, images: RealTiles) -> Fidelity:
        """Distances of anybody's images.

        Raises:
            ValueError: too few images or patients.
            OverlapError: an image is a held-out tile.
        """
        row = self._row_of(images)
        features_ND = self.embed(row.images_NHWC)
        return self._told(
            self.yardstick.distances(row.images_NHWC, features_ND, row.patients, are_others=True)
        )

    def distances(
        self, images_NHWC: Images, features_ND: Features, patients: npt.NDArray[np.str_]
    ) -> Distances:
        """Distances of images of held-out patients, whose features are known already."""
        return self.yardstick.distances(images_NHWC, features_ND, patients)

    def compare(
        self,
        before: Generator,
        after: Generator,
        progress: Progress | None = None,
        *,
        public: PublicPart | None = None,
    ) -> Evaluation:
        """The whole evaluation of a study: its foundation, its generator, and their baselines.

        Args:
            before: Where training started.
            after: Where it ended.
            progress: Called with what, done and all.
            public: What the study did with a public pool, if it had one.

        Raises:
            ValueError: the held-out tiles have no captions.
        """
        panel = self.panel()
        rows = comparison(
            foundation=before,
            generator=after,
            draw=lambda generator, what: self._sample(generator, what, progress),
            prompts=self._prompts,
            held_out=self._held_out,
            mirrored=self._held_out.take(np.unique(self._prompt_rows)),
            training=self._training,
            public=public,
        )
        arms = self.arms(rows, panel, progress)
        foundation, generator = (
            next(arm for arm in arms if arm.name == name) for name in ("foundation", "generator")
        )
        assert foundation.frechet is not None
        assert generator.frechet is not None
        return Evaluation(
            **self._common(arms, panel, n=self.config.num_images),
            distance_foundation=foundation.mmd2,
            distance_foundation_interval=foundation.mmd2_interval,
            distance_generator=generator.mmd2,
            distance_generator_interval=generator.mmd2_interval,
            frechet_foundation=foundation.frechet,
            frechet_generator=generator.frechet,
            drift_foundation=foundation.drift,
            drift_generator=generator.drift,
        )

    def compare_images(self, images: RealTiles, progress: Progress | None = None) -> Comparison:
        """Anybody's images beside real tiles, and beside the foundation where there are captions.

        Args:
            images: With what each was drawn from, where that is known, and a patient of its own
                unless somebody says which belong together.
            progress: Called with what, done and all.

        Raises:
            ValueError: too few images or patients.
            OverlapError: an image is a held-out tile.
        """
        row = self._row_of(images)
        panel = self.panel()
        rows = [ArmImages.of("real", self._held_out, self._held_out.images_NHWC)]
        if self._held_out.has_captions:
            drawn = self._sample(self._foundation.generator, "foundation", progress)
            rows += foundation_arms(drawn, self._prompts, self._training)
        else:
            panel.leave_out(_NO_CAPTIONS)
        arms = self.arms([*rows, row], panel, progress)
        return Comparison(
            **self._common(arms, panel, n=len(images)), repeated_images=images.num_repeated
        )

    def memorisation(self, generator: Generator, progress: Progress | None = None) -> Memorisation:
        """Whether a generator draws what it was trained on.

        Raises:
            ValueError: there are no tiles that were trained on, or fewer than 8 patients on a side.
        """
        if self._training is None:
            raise ValueError("expected tiles that were trained on")
        members, others = sides_of_one_size(
            self._training,
            self._held_out,
            patients=_MEMORISED_PATIENTS,
            tiles_per_patient=_MEMORISED_TILES,
            rng=np.random.default_rng(self.config.seed),
        )
        config = self.config.model_dump(include={"num_images", *SAMPLING})
        return measure_memorisation(
            generator, members, others, MemorisationConfig.model_validate(config), progress
        )

    def _row_of(self, images: RealTiles) -> ArmImages:
        if len(images) < FEWEST_IMAGES or len(set(images.patients.tolist())) < 2:
            raise ValueError(
                f"expected at least {FEWEST_IMAGES} images of at least 2 patients, got "
                f"{len(images)} of {len(set(images.patients.tolist()))}"
            )
        both = pixel_digests(images.images_NHWC) & pixel_digests(self._held_out.images_NHWC)
        if both:
            raise OverlapError(
                f"{len(both)} images are also among the real ones; measure against others"
            )
        patients = np.asarray([f"of images: {name}" for name in images.patients.tolist()])
        return replace(
            ArmImages.of("images", images, images.images_NHWC), patients=patients, are_others=True
        )

    def panel(self) -> Panel:
        """Whoever else looks at rows, taught by these tiles."""
        return Panel(
            self._held_out,
            self._training,
            self.reference,
            self.embed,
            Matcher.of(self._foundation),
            num_images=self.config.num_images,
            num_bootstrap=self.config.num_bootstrap,
            seed=self.config.seed,
        )

    def arms(
        self, rows: Sequence[ArmImages], panel: Panel, progress: Progress | None = None
    ) -> tuple[Arm, ...]:
        """Every row measured: real tiles against each other, all others against them."""
        arms: list[Arm] = []
        for row in rows:
            if progress is not None:
                progress("images", len(arms), len(rows))
            arms.append(self._arm(row, panel))
        return tuple(arms)

    def _arm(self, row: ArmImages, panel: Panel) -> Arm:
        features_ND = self.embed(row.images_NHWC)
        if row.name == "real":
            distances = self.yardstick.floors()
        else:
            distances = self.yardstick.distances(
                row.images_NHWC, features_ND, row.patients, are_others=row.are_others
            )
        said = panel.figures(row, features_ND)
        return Arm(name=row.name, n=len(row.images_NHWC), **dict(distances), **said)

    def _common(self, arms: tuple[Arm, ...], panel: Panel, *, n: int) -> dict[str, Any]:
        """What every comparison says, by the names of ``figures.Comparison``."""
        real = next(arm for arm in arms if arm.name == "real")
        return {
            "encoder": self._encoder.name,
            "encoder_hash": self._encoder.hash,
            "metric": "mmd2",
            "n": n,
            "drawn_by": self.config.drawn_by,
            "n_heldout": len(self._held_out),
            "heldout_patients": self.reference.num_patients,
            "resampled": "patient" if self._held_out.says_patients else "image",
            "repeated_tiles": self._held_out.num_repeated,
            "foundation_hash": self._foundation.manifest.hash,
            "tile_px": self._held_out.side_px,
            "mpp": self._foundation.manifest.mpp,
            "floor": real.mmd2,
            "floor_interval": real.mmd2_interval,
            "arms": arms,
            "judged_classes": panel.classes,
            "training_tiles": None if self._training is None else len(self._training),
            "gate": panel.gate,
            "not_measured": panel.reasons,
        }

    def _told(self, distances: Distances) -> Fidelity:
        return Fidelity(
            encoder=self._encoder.name, encoder_hash=self._encoder.hash, **dict(distances)
        )

    def _some_of(self, training: RealTiles) -> RealTiles:
        ordered = training.in_order_of_content()
        count = min(self.config.num_training_tiles, len(ordered))
        rng = np.random.default_rng(self.config.seed)
        return ordered.take(np.sort(rng.choice(len(ordered), count, replace=False)))

    def _sample(self, generator: Generator, what: str, progress: Progress | None) -> Images:
        if not self._held_out.has_captions:
            raise ValueError(
                "no captions to draw from; add a column caption, or draw with crafts sample and "
                "measure that folder"
            )
        drawn_NHWC = sample_images(
            generator,
            self.prompts,
            **self.config.model_dump(include=SAMPLING),
            progress=None if progress is None else lambda done, all_: progress(what, done, all_),
        )
        return middle(drawn_NHWC, self._held_out.side_px)
