"""The files of a latent cache: which there are, what they were made from, whether they are whole.

Nothing here reads a row, so to ask whether a cache can be used takes no torch.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from crafts_core.fields import Sha256
from crafts_core.tiles.records import TileStoreError
from crafts_core.tiles.store import TileStore
from crafts_core.tiles.writer import describe_file

Shape = tuple[Annotated[int, Field(ge=0)], ...]
Model = TypeVar("Model", bound=BaseModel)

LATENTS = "latents.f16"
TILE_EMBEDDINGS = "tile_embeddings.f16"
TEXT = "captions.f16"
CAPTION_EMBEDDINGS = "caption_embeddings.f16"
ARRAY_NAMES = (LATENTS, TILE_EMBEDDINGS, TEXT, CAPTION_EMBEDDINGS)
META_NAME = "meta.json"
KEYS_NAME = "keys.bin"


class CacheMeta(BaseModel):
    """``meta.json``: what the cache was made from. Written last."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[4] = 4
    foundation: Sha256
    index: Sha256
    views: Annotated[int, Field(ge=1)]
    shapes: Mapping[str, Shape]
    sha256: Mapping[str, Sha256]
    unusable: tuple[int, ...] = ()
    """Tiles, by their row in the store, of which something is NaN."""


def cache_folder(store: TileStore, foundation_hash: str) -> Path:
    """Where the cache of one foundation lies."""
    return store.path / "latents" / foundation_hash[:16]


def finished_cache(store: TileStore, foundation_hash: str) -> CacheMeta:
    """What a cache that can be used is.

    Raises:
        TileStoreError: it is missing or unfinished, was made from another store or foundation, or a
            file has another size than it should.
    """
    folder = cache_folder(store, foundation_hash)
    meta = read_model(folder / META_NAME, CacheMeta)
    if meta is None:
        raise TileStoreError(
            f"{store.path} has no finished latent cache for foundation {foundation_hash[:16]}; "
            "build it first"
        )
    if not is_whole(folder, meta, store, foundation_hash):
        raise TileStoreError(
            f"{folder} is torn, or was made from other tiles or another foundation; build it "
            "again, or wait for an ingest or removal that is at work"
        )
    return meta


def check_cache(store: TileStore, foundation_hash: str) -> None:
    """Compare every file of the cache with its hash.

    Raises:
        TileStoreError: names the first file that changed.
    """
    meta = finished_cache(store, foundation_hash)
    folder = cache_folder(store, foundation_hash)
    changed = first_changed(folder, meta)
    if changed is not None:
        raise TileStoreError(
            f"{changed} was changed; run crafts-client tiles check --repair, then ingest"
        )


def is_whole(folder: Path, meta: CacheMeta, store: TileStore, foundation_hash: str) -> bool:
    """Whether it is of these tiles and this foundation, and its files have their sizes."""
    made_from = (meta.foundation, meta.index)
    return made_from == (foundation_hash, store.index_hash) and _has_sizes(folder, meta)


def first_changed(folder: Path, meta: CacheMeta) -> Path | None:
    """A file that is not what was written, if there is one."""
    for name in (*ARRAY_NAMES, KEYS_NAME):
        path = folder / name
        if not path.is_file() or describe_file(path).sha256 != meta.sha256.get(name):
            return path
    return None


def _has_sizes(folder: Path, meta: CacheMeta) -> bool:
    return meta.shapes.keys() == set(ARRAY_NAMES) and all(
        (folder / name).is_file() and (folder / name).stat().st_size == num_bytes(shape)
        for name, shape in meta.shapes.items()
    )


def read_model(path: Path, model: type[Model]) -> Model | None:
    """The file's content, or None where it is absent or is not what we write."""
    try:
        return model.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


def num_bytes(shape: Sequence[int]) -> int:
    """Of float16 rows."""
    return math.prod(shape) * np.dtype(np.float16).itemsize
