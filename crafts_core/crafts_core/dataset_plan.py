"""Which images a data set consists of: types, captions, masks and splits, before any is drawn.

An image, its split and its mask follow from seed, type and number alone: more types or images leave
the others as they were. Images that one mask steers are alike, so all of a mask's are in one split.
"""

import hashlib
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from crafts_core.errors import CraftsError
from crafts_core.image_requests import ImageRequest
from crafts_core.tissue_types import caption_of_type
from crafts_core.vocabulary import TissueAttributes

DEFAULT_SPLITS: Mapping[str, float] = {"train": 0.8, "validation": 0.1, "test": 0.1}
SPLITS = tuple(DEFAULT_SPLITS)
PackedLayout = Literal["webdataset", "parquet"]
PACKED: tuple[PackedLayout, ...] = get_args(PackedLayout)
"""Layouts beside the image folder, which is always there."""
MASK_SUFFIXES = (".png", ".tif", ".tiff")


class DatasetError(CraftsError):
    """A data set that cannot be made, or is not what its manifest says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetConfig:
    """What is in a data set."""

    labels: tuple[str, ...]
    """As ``read_types`` gives them. Class numbers follow the names of their folders."""
    per_type: int
    splits: tuple[tuple[str, float], ...] = tuple(DEFAULT_SPLITS.items())
    with_attributes: bool = True
    """Captions say growth pattern, grade, stroma and features, drawn per image."""
    seed: int = 0

    def __post_init__(self) -> None:
        shares_are_good = all(0 < share < math.inf for _, share in self.splits)
        if self.per_type < 1 or not self.labels or not self.splits or not shares_are_good:
            raise ValueError("expected a label, a split with a share, and per_type of at least 1")
        if not {name for name, _ in self.splits} <= set(SPLITS):
            raise ValueError(f"expected splits of {', '.join(SPLITS)}, got {self.splits}")


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetImage:
    """One image to be: where it goes, what it shows, and how it is asked for."""

    key: str
    split: str
    label: str
    attributes: TissueAttributes | None
    request: ImageRequest

    @property
    def file_name(self) -> str:
        """Relative to its split."""
        return f"{folder_name(self.label)}/{self.key}.png"


def plan_images(config: DatasetConfig, masks: Sequence[Path] = ()) -> list[DatasetImage]:
    """All images, type after type.

    Args:
        config: What is asked for.
        masks: Images of numbered nuclei; each steers about as many images as any other.

    Raises:
        DatasetError: there are fewer masks than splits.
    """
    splits = splits_in_turn(config.per_type, dict(config.splits))
    by_split = _masks_of_splits(masks, [name for name, _ in config.splits], config)
    images = []
    for label in config.labels:
        digest = hashlib.sha256(f"{config.seed}/{label}".encode()).digest()
        first = int.from_bytes(digest[:6], "big")  # each type begins with another mask
        turns = {split: itertools.count(first) for split in by_split}
        for number, split in enumerate(splits):
            own = by_split.get(split)
            mask = own[next(turns[split]) % len(own)] if own else None
            images.append(_image(config, label, number, split, mask))
    return images


def splits_in_turn(count: int, parts: Mapping[str, float]) -> list[str]:
    """A split for each image of a type: at every number as near to the shares as can be.

    So more images leave those before them where they were.
    """
    whole, given = sum(parts.values()), dict.fromkeys(parts, 0)
    turns = []
    for number in range(1, count + 1):
        # The split that has fallen furthest behind; of several the first.
        behind = {name: number * part / whole - given[name] for name, part in parts.items()}
        name = max(behind, key=lambda each: behind[each])
        given[name] += 1
        turns.append(name)
    return turns


def shares(total: int, parts: Mapping[str, float]) -> dict[str, int]:
    """Whole numbers that add up to ``total``, as near to the parts as can be."""
    whole = sum(parts.values())
    exact = {name: total * part / whole for name, part in parts.items()}
    counts = {name: math.floor(value) for name, value in exact.items()}
    by_rest = sorted(exact, key=lambda name: counts[name] - exact[name])
    for name in by_rest[: total - sum(counts.values())]:
        counts[name] += 1
    return counts


def read_splits(text: str) -> tuple[tuple[str, float], ...]:
    """Parse ``train=0.8,validation=0.1,test=0.1``.

    Raises:
        DatasetError: a name is unknown or twice there, or a share is no positive number.
    """
    splits: dict[str, float] = {}
    for part in text.split(","):
        name, _, share = (word.strip() for word in part.partition("="))
        try:
            value = float(share)
        except ValueError:
            value = math.nan
        if name not in SPLITS or name in splits or not 0 < value < math.inf:
            raise DatasetError(
                f"splits must be of {', '.join(SPLITS)} with a share each, such as "
                f"train=0.8,test=0.2; got {part.strip()!r}"
            )
        splits[name] = value
    return tuple(splits.items())


def list_masks(directory: Path) -> list[Path]:
    """The images of a folder, by name.

    Raises:
        DatasetError: it holds none.
    """
    masks = sorted(
        path
        for path in directory.iterdir()
        if path.suffix.lower() in MASK_SUFFIXES and path.is_file() and not path.name.startswith(".")
    )
    if not masks:
        raise DatasetError(f"{directory} holds no mask ({', '.join(MASK_SUFFIXES)})")
    return masks


def folder_name(label: str) -> str:
    """A label as the name of its folder."""
    return label.replace(" ", "-")


def _image(
    config: DatasetConfig, label: str, number: int, split: str, mask: Path | None
) -> DatasetImage:
    digest = hashlib.sha256(f"{config.seed}/{label}/{number}".encode()).digest()
    seed = int.from_bytes(digest[:6], "big")
    caption, attributes = caption_of_type(
        label, np.random.default_rng(list(digest)), with_attributes=config.with_attributes
    )
    return DatasetImage(
        key=f"{folder_name(label)}-{number:06d}",
        split=split,
        label=label,
        attributes=attributes,
        request=ImageRequest(
            prompt=caption, seed=seed, control=None if mask is None else "nuclei", mask=mask
        ),
    )


def _masks_of_splits(
    masks: Sequence[Path], splits: Sequence[str], config: DatasetConfig
) -> dict[str, list[Path]]:
    """Each mask in one split, and at least one mask in each."""
    if not masks:
        return {}
    if len(masks) < len(splits):
        raise DatasetError(
            f"expected at least {len(splits)} masks, one a split, got {len(masks)}; a mask in two "
            "splits would be in training and test"
        )
    order = [masks[place] for place in np.random.default_rng(config.seed).permutation(len(masks))]
    parts = {name: share for name, share in config.splits if name in splits}
    counts = shares(len(masks) - len(splits), parts)
    rest = iter(order)
    return {name: list(itertools.islice(rest, counts[name] + 1)) for name in splits}
