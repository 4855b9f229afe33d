"""Annotated data sets on demand: drawn, laid out, described, and verified.

A data set is whole when its ``manifest.json`` says so; until then the same call goes on, and a call
with other settings starts over, once its first images are drawn. Its folders ``masks``,
``annotations``, ``webdataset`` and ``parquet`` are made anew each time; what else lies beside them
is left alone.
"""

import json
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from crafts_core.dataset_card import dataset_card
from crafts_core.dataset_layouts import (
    ANNOTATIONS,
    IMAGES,
    MASKS,
    METADATA,
    DatasetFiles,
    write_metadata,
    write_parquet,
    write_webdataset,
)
from crafts_core.dataset_plan import (
    PACKED,
    DatasetConfig,
    DatasetError,
    PackedLayout,
    folder_name,
    plan_images,
)
from crafts_core.foundation_manifest import sha256_of
from crafts_core.image_folder import WRITING, ImagePlan, draw_into, write_whole
from crafts_core.provenance import Provenance
from crafts_core.sampler_config import SamplerConfig
from crafts_core.studio import Studio

MANIFEST_NAME, CARD_NAME = "manifest.json", "README.md"
_MADE_ANEW = (MASKS, ANNOTATIONS, *PACKED)


class DatasetManifest(BaseModel):
    """What a data set holds, and the SHA-256 of every file of it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[1] = 1
    is_complete: bool
    labels: tuple[str, ...]
    num_images: dict[str, int]
    """Of each split."""
    seed: int
    drawn: Provenance
    """What all images have in common."""
    files: dict[str, str]


@dataclass(frozen=True, slots=True)
class Dataset:
    """A drawn data set on disk."""

    path: Path
    manifest: DatasetManifest

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Read a data set's manifest.

        Raises:
            DatasetError: there is none, or it is not complete.
        """
        manifest = _read_manifest(Path(path))
        if manifest is None:
            raise DatasetError(f"{path} is no data set ({MANIFEST_NAME} is missing)")
        if not manifest.is_complete:
            raise DatasetError(f"{path} is not complete; the same `crafts dataset` goes on with it")
        return cls(Path(path), manifest)

    def __len__(self) -> int:
        return sum(self.manifest.num_images.values())

    def rows(self, split: str) -> Iterator[dict[str, Any]]:
        """What is known of each image of a split; ``file`` is its path.

        Raises:
            DatasetError: it has no such split.
        """
        if split not in self.manifest.num_images:
            has = ", ".join(self.manifest.num_images)
            raise DatasetError(f"data set {self.path} has no split {split!r}; it has {has}")
        folder = self.path / IMAGES / split
        with (folder / METADATA).open(encoding="utf-8") as lines:
            for line in lines:
                row = json.loads(line)
                yield {"file": folder / row.pop("file_name"), **row}

    def verify(self) -> None:
        """Hash every file again.

        Raises:
            DatasetError: names the first file that is missing, altered, or not in the manifest.
                Hidden files, as file managers leave them, do not count.
        """
        present = _hashes(self.path)
        for name in sorted(present.keys() | self.manifest.files.keys()):
            if present.get(name) != self.manifest.files.get(name):
                kind = "missing" if name not in present else "altered"
                told = kind if name in self.manifest.files else f"not in {MANIFEST_NAME}"
                raise DatasetError(f"data set {self.path}: {name} is {told}; draw it again")


def draw_dataset(
    studio: Studio,
    root: Path,
    config: DatasetConfig,
    sampler: SamplerConfig,
    *,
    layouts: Sequence[PackedLayout] = (),
    masks: Sequence[Path] = (),
    batch_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    warn: Callable[[str], None] = warnings.warn,
) -> Dataset:
    """Draw a data set, or go on with one.

    Args:
        studio: Who draws.
        root: Folder of the data set; new, empty, or an earlier one.
        config: What is in it.
        sampler: How it is drawn.
        layouts: What is packed from the image folder, beside it.
        masks: Numbered nuclei that steer the images, and annotate them.
        batch_size: Images at a time; chosen by the device if None.
        progress: Called with (images done, images in all).
        warn: Called with a line for what will not be drawn as asked.

    Raises:
        DatasetError: the folder holds something else, or masks are too few or inside it.
        CraftsError: what drawing raises.
    """
    # As image folders number classes: by the names of their folders.
    config = replace(config, labels=tuple(sorted(config.labels, key=folder_name)))
    images = plan_images(config, masks)
    _check_place(root, masks)
    for line in studio.warnings([image.request.prompt for image in images], masks):
        warn(line)
    by_name = [f"{image.split}/{image.file_name}" for image in images]
    plan = ImagePlan(
        [image.request for image in images],
        studio.provenance(sampler),
        seed=config.seed,
        name=by_name.__getitem__,
        pattern="*/*/*.png",
    )
    files = DatasetFiles(
        root=root,
        images=images,
        labels=config.labels,
        tile_px=studio.generator.tile_px,
        mpp=studio.origin.mpp,
    )
    manifest = DatasetManifest(
        is_complete=False,
        labels=config.labels,
        num_images={split: len(own) for split, own in files.of_split()},
        seed=config.seed,
        drawn=plan.common,
        files={},
    )
    draw_into(
        root / IMAGES,
        plan,
        studio,
        sampler,
        batch_size=batch_size,
        progress=progress,
        before_change=lambda: write_whole(root / MANIFEST_NAME, _text(manifest)),
    )
    _lay_out(files, layouts)
    card = dataset_card(
        root.resolve().name,
        config,
        plan.common,
        num_images=manifest.num_images,
        tile_px=files.tile_px,
        has_masks=bool(masks),
    )
    write_whole(root / CARD_NAME, card.encode())
    whole = manifest.model_copy(update={"is_complete": True, "files": _hashes(root)})
    write_whole(root / MANIFEST_NAME, _text(whole))
    return Dataset(root, whole)


def _check_place(root: Path, masks: Sequence[Path]) -> None:
    """Only an earlier data set is written into, and only its own folders are made anew."""
    unfinished = {f".{MANIFEST_NAME}{WRITING}"}
    there = {path.name for path in root.iterdir()} if root.is_dir() else set()
    if there - unfinished and _read_manifest(root) is None:
        raise DatasetError(f"{root} holds other files; name a new folder")
    if any(root.resolve() in mask.resolve().parents for mask in masks):
        raise DatasetError(f"the masks are inside {root}, which is written anew; move them out")


def _lay_out(files: DatasetFiles, layouts: Sequence[PackedLayout]) -> None:
    for name in _MADE_ANEW:
        shutil.rmtree(files.root / name, ignore_errors=True)
    for old in (files.root / IMAGES).glob(f"*/{METADATA}"):
        old.unlink()
    write_metadata(files)
    if "webdataset" in layouts:
        write_webdataset(files)
    if "parquet" in layouts:
        write_parquet(files)
    for folder in sorted((files.root / IMAGES).glob("*/*"), reverse=True):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()  # a class of an earlier run; image folders would count it


def _hashes(root: Path) -> dict[str, str]:
    paths = sorted(
        path for path in root.rglob("*") if path.is_file() and not path.name.startswith(".")
    )
    names = {path.relative_to(root).as_posix(): path for path in paths}
    return {name: sha256_of(path) for name, path in names.items() if name != MANIFEST_NAME}


def _read_manifest(root: Path) -> DatasetManifest | None:
    path = root / MANIFEST_NAME
    if not path.is_file():
        return None
    try:
        return DatasetManifest.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValidationError) as error:
        raise DatasetError(f"{path} is no manifest of a data set; name another folder") from error


def _text(manifest: DatasetManifest) -> bytes:
    return (manifest.model_dump_json(indent=1) + "\n").encode()
