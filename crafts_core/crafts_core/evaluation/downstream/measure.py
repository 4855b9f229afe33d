"""Downstream use from end to end: read, draw, look, split, learn, ask, compare."""

import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from crafts_core.devices import open_device
from crafts_core.evaluation.alignment import Matcher
from crafts_core.evaluation.bench import Reader
from crafts_core.evaluation.downstream.drawing import (
    Subject,
    draw_part,
    requests_of,
    with_captions,
)
from crafts_core.evaluation.downstream.figures import Downstream, Images, Score, verdict_of
from crafts_core.evaluation.downstream.paired import Marks, Resamples, estimate
from crafts_core.evaluation.downstream.pool import (
    REAL,
    Arm,
    Kind,
    Part,
    Pool,
    Split,
    draw_split,
    usable,
)
from crafts_core.evaluation.downstream.questions import answers, caption_of, in_words, phrases_of
from crafts_core.evaluation.downstream.tasks import (
    Classification,
    Pretraining,
    Questions,
    Retrieval,
    Shots,
    Task,
)
from crafts_core.evaluation.encoder import load_encoder
from crafts_core.evaluation.extras import scikit_learn
from crafts_core.evaluation.real_tiles import RealTiles
from crafts_core.foundation import Foundation, embedded_path, load
from crafts_core.generator_record import parts_hash
from crafts_core.progress import Progress
from crafts_core.studio import Studio
from crafts_core.tiles.augment import view_of

FOUNDATION = "public foundation"
_SHOTS = (1, 5, 20)
_VARIANTS = 3
"""Of each real tile, turned and stained otherwise."""


class DownstreamConfig(BaseModel):
    """How much is drawn, learnt and asked."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    encoder: str = Field(default="embedded", min_length=1)
    num_images: int = Field(default=64, ge=4, le=100_000)
    """Drawn of each class."""
    splits: int = Field(default=5, ge=2, le=1000)
    seed: int = Field(default=0, ge=0)
    num_bootstrap: int = Field(default=1000, ge=20, le=100_000)
    pretraining_steps: int = Field(default=200, ge=1, le=1_000_000)


@dataclass(frozen=True, slots=True, kw_only=True)
class DownstreamSettings:
    """What is measured with."""

    config: DownstreamConfig
    foundation: Path | None = None
    """The embedded one if None."""
    max_tiles: int = 2000
    mpp: float | None = None
    """Microns per pixel of images that do not say theirs."""
    device: str = "cpu"
    images: Path | None = None
    """Where images are kept, so that another run need not draw them; nowhere if None."""


def measure_downstream(
    generators: Sequence[Path],
    real: Path,
    settings: DownstreamSettings,
    progress: Progress | None = None,
) -> Downstream:
    """What images of generators add to work on real tiles.

    Args:
        generators: Their directories.
        real: Store, folder or table of images of patients that none of them trained on.
        settings: What is measured with.
        progress: Called with what, done and all.

    Raises:
        CraftsError: something cannot be read, or there are too few patients or classes.
    """
    config = settings.config
    scikit_learn("downstream use")
    encoder = load_encoder(config.encoder)
    foundation = load(settings.foundation or embedded_path(), device=open_device(settings.device))
    reader = Reader(foundation, seed=config.seed, mpp=settings.mpp, progress=progress)
    read = with_captions(reader.read(real, settings.max_tiles)).in_order_of_content()
    tiles, told = usable(read, real)
    drawn, parts = [], _real_parts(tiles)
    _splits(Pool.of(parts), config)  # what cannot be split is told before images are drawn
    for subject in _subjects(generators, foundation, settings, told):
        with _folder(settings.images, subject) as folder:
            part = draw_part(
                subject,
                requests_of(tiles, num=config.num_images, seed=config.seed),
                folder,
                side_px=tiles.side_px,
                seed=config.seed,
                progress=_told_as(progress, f"images of {subject.name}"),
            )
        parts.append(part)
        drawn.append(_drawn(subject, part))
    pool = Pool.of(parts)
    features_RD = encoder.embed(pool.images_RHWC, mpp=foundation.manifest.mpp)
    phrases = phrases_of(tiles.captions, pool.patient_R[pool.real_rows])
    tasks: list[Task] = [
        Classification(pool=pool, features_RD=features_RD),
        *aligned_tasks(pool, Matcher.of(foundation), phrases),
        Pretraining(pool=pool, steps=config.pretraining_steps, seed=config.seed),
    ]
    scores = examine(pool, tasks, [each.generator for each in drawn], config, progress)
    missing = {task.name for task in tasks} - {score.task for score in scores}
    return Downstream(
        classes=pool.classes,
        tiles=len(tiles),
        patients=pool.num_patients,
        splits=config.splits,
        encoder=encoder.name,
        encoder_hash=encoder.hash,
        foundation_hash=foundation.manifest.hash,
        tile_px=tiles.side_px,
        mpp=foundation.manifest.mpp,
        pretraining_steps=config.pretraining_steps,
        questions=tuple(in_words(phrase) for phrase in phrases),
        generators=tuple(drawn),
        scores=tuple(scores),
        not_measured=(*told, *(f"{name}: captions differ too little" for name in sorted(missing))),
    )


def aligned_tasks(pool: Pool, matcher: Matcher, phrases: Sequence[str]) -> list[Task]:
    """Tasks on the embeddings of a foundation's aligner."""
    captions, place_R = np.unique(pool.caption_R, return_inverse=True)
    texts = [*captions.tolist(), *map(caption_of, phrases)]
    image_RE, text_UE = matcher.embed(pool.images_RHWC, texts)
    return [
        Retrieval(pool=pool, image_RE=image_RE, text_RE=text_UE[place_R]),
        Questions(
            pool=pool,
            image_RE=image_RE,
            question_QE=text_UE[len(captions) :],
            answer_RQ=answers(pool.caption_R.tolist(), phrases),
        ),
    ]


def examine(
    pool: Pool,
    tasks: Sequence[Task],
    generators: Sequence[str],
    config: DownstreamConfig,
    progress: Progress | None = None,
) -> list[Score]:
    """Every arm of every task in the same splits, and how it differs from real tiles only."""
    splits = _splits(pool, config)
    shots = _shots(splits)
    resamples = Resamples.draw(
        pool.num_patients, config.splits, num_bootstrap=config.num_bootstrap, seed=config.seed
    )
    scores: list[Score] = []
    for task in tasks:
        arms = _arms(task.kinds, generators)
        marks: dict[tuple[int | None, str], dict[Arm, list[Marks]]] = defaultdict(
            lambda: defaultdict(list)
        )
        for done, (split, arm) in enumerate((split, arm) for split in splits for arm in arms):
            if progress is not None:
                progress(task.name, done + 1, len(splits) * len(arms))
            for exam in task.sit(split, arm, shots):
                marks[exam.shot, exam.measure][arm].append(exam.marks)
        for (shot, measure), of_arm in marks.items():
            if len(of_arm[REAL]) == len(splits):  # some splits have fewer captions than others
                scores += _scores(task, shot, measure, of_arm, resamples)
    return scores


def _scores(
    task: Task,
    shot: int | None,
    measure: str,
    of_arm: dict[Arm, list[Marks]],
    resamples: Resamples,
) -> Iterator[Score]:
    real_B = resamples.scores(of_arm[REAL])
    for arm, marks in of_arm.items():
        score_B = resamples.scores(marks)
        value, interval = estimate(score_B.clip(0.0, 1.0))  # stretched weights can leave it
        difference, within = (None, None) if arm == REAL else estimate(score_B - real_B)
        yield Score(
            task=task.name,
            measure=measure,
            patients=shot,
            arm=arm.kind,
            generator=arm.generator,
            value=value,
            interval=interval,
            chance=float(np.mean([each.chance for each in marks])),
            difference=difference,
            difference_interval=within,
            verdict=verdict_of(arm.kind, within),
        )


def _arms(kinds: Sequence[Kind], generators: Sequence[str]) -> list[Arm]:
    is_drawn = ("synthetic", "both")
    return [Arm(kind) for kind in kinds if kind not in is_drawn] + [
        Arm(kind, name) for kind in kinds if kind in is_drawn for name in generators
    ]


def _splits(pool: Pool, config: DownstreamConfig) -> list[Split]:
    return [draw_split(pool, seed=config.seed, number=n) for n in range(config.splits)]


def _shots(splits: Sequence[Split]) -> Shots:
    """Numbers of patients that some class has more than, and all."""
    most = min(max(len(patients) for patients in split.taught.values()) for split in splits)
    return [*(shot for shot in _SHOTS if shot < most), None]


def _real_parts(tiles: RealTiles) -> list[Part]:
    """The tiles, and variants of them."""
    patients = np.unique(tiles.patients, return_inverse=True)[1]
    whole = Part(
        source="real",
        images_NHWC=tiles.images_NHWC,
        classes=tiles.classes,
        captions=tiles.captions,
        patients=patients,
    )
    varied = [
        np.stack([view_of(tile, view, key=b"%d" % n) for n, tile in enumerate(tiles.images_NHWC)])
        for view in range(1, _VARIANTS + 1)
    ]
    return [whole, *(replace(whole, source="augmented", images_NHWC=each) for each in varied)]


def _subjects(
    generators: Sequence[Path],
    foundation: Foundation,
    settings: DownstreamSettings,
    told: list[str],
) -> Iterator[Subject]:
    """Each generator, opened when its turn comes; and the foundation, if one came from it."""
    paths = list(dict.fromkeys(path.resolve() for path in generators))
    names = [path.name for path in paths]
    origins = []
    for path, name in zip(paths, names, strict=True):
        is_only = names.count(name) == 1 and name != FOUNDATION
        studio = Studio.open(path, device=settings.device)
        origins.append(studio.origin)
        yield Subject(name if is_only else str(path), studio)
    if parts_hash(foundation.path) in {origin.generator_hash for origin in origins}:
        return
    if foundation.manifest.hash in {origin.foundation_hash for origin in origins}:
        yield Subject(FOUNDATION, Studio.open(foundation.path, device=settings.device))
    else:
        told.append(f"{FOUNDATION}: nothing was trained from {foundation.path}; give --foundation")


@contextmanager
def _folder(images: Path | None, subject: Subject) -> Iterator[Path]:
    """Where a generator's images are kept, by its hash; readable by its owner: captions are."""
    if images is None:
        with tempfile.TemporaryDirectory() as passing:
            yield Path(passing)
        return
    folder = images / subject.studio.origin.generator_hash[:16]
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    yield folder


def _drawn(subject: Subject, part: Part) -> Images:
    origin = subject.studio.origin
    return Images(
        generator=subject.name,
        generator_hash=origin.generator_hash,
        foundation_hash=origin.foundation_hash,
        privacy=origin.privacy,
        images=len(part.images_NHWC),
    )


def _told_as(progress: Progress | None, what: str) -> Callable[[int, int], None] | None:
    return None if progress is None else lambda done, all_: progress(what, done, all_)
