"""A new study: which images, how many readers, and in which order each of them reads."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from crafts_core.study.lookalikes import lookalikes, sentence_on
from crafts_core.study.pictures import Fit, Picture, blinded, choose_pictures, common_size, traces
from crafts_core.study.presentation import Showing, reading_order
from crafts_core.study.questions import Questions, StudyError
from crafts_core.study.records import StudyImage, StudyInfo
from crafts_core.study.study_file import StudyFile, new_token


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyConfig:
    """What a study consists of."""

    name: str
    per_kind: int
    """Real images that count, and as many synthetic ones."""
    calibration: int
    """Shown first, each with the truth after its answer; as even as can be between the kinds."""
    repeats: float
    """Share of the images that are shown a second time."""
    readers: int
    questions: Questions
    seed: int
    fit: Fit | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Chosen:
    picture: Picture
    is_synthetic: bool
    is_calibration: bool


def create_study(
    path: Path,
    synthetic: Path,
    real: Path,
    config: StudyConfig,
    *,
    progress: Callable[[int, int], None] | None = None,
    warn: Callable[[str], None] | None = None,
) -> StudyFile:
    """Write a study file.

    Which images and orders these are follows from the folders and the seed; codes, token and the
    ids that pages show come from entropy.

    Args:
        path: The file to be.
        synthetic: Folder of images that a generator drew.
        real: Folder of real ones.
        config: What is wanted of them.
        progress: Called with (images done, images in all).
        warn: Called with a sentence on what may unblind readers, or counts twice.

    Raises:
        StudyError: the folders do not hold what is wanted.
        FileExistsError: there is such a file.
    """
    first, second = synthetic.resolve(), real.resolve()
    if first.is_relative_to(second) or second.is_relative_to(first):
        raise StudyError(f"{synthetic} and {real} hold the same images; name two folders")
    rng = np.random.default_rng(config.seed)
    chosen = _choose(synthetic, real, config, rng)
    by_kind = [
        [each.picture for each in chosen if each.is_synthetic is kind] for kind in (False, True)
    ]
    size = common_size([each.picture for each in chosen], config.fit)
    for sentence in (*traces(*by_kind), *_alike([each.picture for each in chosen])):
        if warn is not None:
            warn(sentence)
    if config.questions.types and all(each.picture.type is None for each in chosen):
        raise StudyError(
            "no image has a type that is known: name folders by type, or leave out --types"
        )

    def images() -> Iterator[StudyImage]:
        for number, each in enumerate(chosen, start=1):
            yield StudyImage(
                png=blinded(each.picture, size, config.fit),
                is_synthetic=each.is_synthetic,
                is_calibration=each.is_calibration,
                type=each.picture.type,
                source=each.picture.source,
            )
            if progress is not None:
                progress(number, len(chosen))

    info = StudyInfo(
        name=config.name,
        token=new_token(),
        seed=config.seed,
        questions=config.questions,
        created_at=datetime.now(UTC).replace(tzinfo=None),
    )
    return StudyFile.create(path, info, images(), _orders(chosen, config, rng))


def _alike(pictures: list[Picture]) -> Iterator[str]:
    pairs = lookalikes(np.stack([each.thumbnail for each in pictures]))
    return sentence_on([(pictures[one].source, pictures[other].source) for one, other in pairs])


def _choose(
    synthetic: Path, real: Path, config: StudyConfig, rng: np.random.Generator
) -> list[_Chosen]:
    """Images in a random order, so that no number of an image says what it is."""
    seen: set[bytes] = set()
    chosen = []
    for kind, folder in ((False, real), (True, synthetic)):
        extra = (config.calibration + kind) // 2
        pictures = choose_pictures(
            folder, config.per_kind + extra, rng, is_synthetic=kind, seen=seen
        )
        chosen += [
            _Chosen(picture=picture, is_synthetic=kind, is_calibration=place < extra)
            for place, picture in enumerate(pictures)
        ]
    return [chosen[place] for place in rng.permutation(len(chosen))]


def _orders(
    chosen: list[_Chosen], config: StudyConfig, rng: np.random.Generator
) -> list[list[Showing]]:
    """For each reader: calibration, the same for all, and then an order of their own."""
    first = [Showing(place, False) for place, each in enumerate(chosen) if each.is_calibration]
    counting = [place for place, each in enumerate(chosen) if not each.is_calibration]
    kinds = [chosen[place].is_synthetic for place in counting]
    orders = []
    for _ in range(config.readers):
        order = reading_order(kinds, config.repeats, rng)
        orders.append(first + [Showing(counting[each.image], each.is_repeat) for each in order])
    return orders
