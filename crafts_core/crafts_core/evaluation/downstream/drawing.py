"""Images of every class, drawn as ``crafts sample`` draws, into a folder that keeps them.

Each class is drawn from captions of its real tiles, as often as they are frequent. Which of the
images an arm may learn from is decided later, split by split (``pool``).
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from crafts_core.errors import CraftsError
from crafts_core.evaluation.bench import require_size
from crafts_core.evaluation.downstream.pool import Part
from crafts_core.evaluation.real_tiles import RealTiles, middle
from crafts_core.image_folder import ImagePlan, draw_into
from crafts_core.image_requests import ImageRequest
from crafts_core.sampler_config import SamplerConfig
from crafts_core.studio import Studio
from crafts_core.vocabulary import VocabularyError, label_caption


@dataclass(frozen=True, slots=True)
class Subject:
    """A generator, and what it is called."""

    name: str
    studio: Studio


def with_captions(tiles: RealTiles) -> RealTiles:
    """The same tiles; where nobody wrote captions, with those of their labels.

    Raises:
        CraftsError: a label is no tissue that we know.
    """
    if tiles.has_captions:
        return tiles
    try:
        return replace(tiles, captions=[label_caption(label) for label in tiles.labels])
    except VocabularyError as error:
        raise CraftsError(f"no captions to draw from: {error}; add a column caption") from error


def requests_of(tiles: RealTiles, *, num: int, seed: int) -> list[tuple[str, ImageRequest]]:
    """Class and request of ``num`` images of each class, from captions of random tiles of it."""
    rng = np.random.default_rng(seed)
    class_N, caption_N = np.asarray(tiles.classes), np.asarray(tiles.captions)
    found = []
    for name in np.unique(class_N).tolist():
        counts = Counter(rng.choice(caption_N[class_N == name], num).tolist())
        found += [
            (name, ImageRequest(prompt=caption, count=count))
            for caption, count in sorted(counts.items())
        ]
    return found


def draw_part(
    subject: Subject,
    asked: Sequence[tuple[str, ImageRequest]],
    folder: Path,
    *,
    side_px: int,
    seed: int,
    progress: Callable[[int, int], None] | None,
) -> Part:
    """Draw what is missing in a folder of images.

    Raises:
        CraftsError: the generator draws too small, or an image is not finite.
    """
    studio, config = subject.studio, SamplerConfig()
    require_size(studio.directory, studio.generator, side_px)
    requests = [request for _, request in asked]
    plan = ImagePlan(requests, studio.provenance(config), seed=seed)
    files = draw_into(folder, plan, studio, config, progress=progress)
    images = []
    for path in files:
        with Image.open(path) as image:
            images.append(np.asarray(image.convert("RGB")))
    counts = [request.count for request in requests]
    return Part(
        source="synthetic",
        generator=subject.name,
        images_NHWC=middle(np.stack(images), side_px),
        classes=np.repeat([name for name, _ in asked], counts).tolist(),
        captions=np.repeat([request.prompt for request in requests], counts).tolist(),
    )
