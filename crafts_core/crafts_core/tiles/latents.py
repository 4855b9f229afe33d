"""The latent cache: what a foundation makes of each tile and caption, computed once.

Raw float16 rows on disk, one per tile or caption, below the store in a folder named by the
foundation's hash. Building appends, so it resumes where it stopped and a full disk is an ordinary
error; reading maps the files.

Shape letters: N tiles or captions, C latent channels, h and w latent pixels, L tokens, D features.
"""

import contextlib
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, BinaryIO, Literal, Self, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from crafts_core.durable import write_file
from crafts_core.foundation import Foundation
from crafts_core.tiles.records import TileStoreError
from crafts_core.tiles.store import Rows, TileStore

Progress = Callable[[int, int], None]
Shape = tuple[Annotated[int, Field(ge=0)], ...]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Model = TypeVar("Model", bound=BaseModel)

LATENTS = "latents.f16"
TILE_EMBEDDINGS = "tile_embeddings.f16"
TEXT = "captions.f16"
NULL_TEXT = "null_text.f16"
CAPTION_EMBEDDINGS = "caption_embeddings.f16"
ARRAY_NAMES = (LATENTS, TILE_EMBEDDINGS, TEXT, NULL_TEXT, CAPTION_EMBEDDINGS)
META_NAME = "meta.json"
_PROGRESS_NAME = "progress.json"
_BATCHES_PER_COMMIT = 16


class CacheMeta(BaseModel):
    """``meta.json``: what the cache was made from. Written last."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[1] = 1
    foundation: Sha256
    index: Sha256
    shapes: Mapping[str, Shape]


class BuildProgress(BaseModel):
    """``progress.json``: the tile rows that are safely on disk."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    index: Sha256
    shapes: Mapping[str, Shape]


class LatentCache:
    """Latents, text states and aligner embeddings of one store under one foundation."""

    def __init__(self, arrays: Mapping[str, npt.NDArray[np.float16]]) -> None:
        self._arrays = arrays

    @classmethod
    def build(
        cls,
        store: TileStore,
        foundation: Foundation,
        *,
        batch_size: int = 64,
        progress: Progress | None = None,
    ) -> Self:
        """Compute what is missing and open the cache.

        A finished cache is opened as it is; an interrupted one goes on after its last committed
        batch; one that was made from another index is removed and made again.

        Raises:
            TileStoreError: tiles have another size than the foundation's, a tile cannot be
                read, or the foundation gives NaN or infinity.
        """
        if store.tile_px != foundation.manifest.tile_px:
            raise TileStoreError(
                f"{store.path} has tiles of {store.tile_px} px, the foundation takes "
                f"{foundation.manifest.tile_px}; ingest again with that size"
            )
        foundation_hash = foundation.manifest.hash
        folder = cache_folder(store, foundation_hash)
        meta = _read_model(folder / META_NAME, CacheMeta)
        if meta is not None and _is_whole(folder, meta, store, foundation_hash):
            return cls.open(store, foundation_hash)
        begun = _read_model(folder / _PROGRESS_NAME, BuildProgress)
        if meta is not None or begun is None or begun.index != store.index_hash:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            begun = BuildProgress(index=store.index_hash, shapes={})
            write_file(folder / _PROGRESS_NAME, _json(begun))
        shapes = _build_captions(folder, store, foundation, batch_size)
        shapes |= _build_tiles(folder, store, foundation, begun, batch_size, progress)
        meta = CacheMeta(foundation=foundation_hash, index=store.index_hash, shapes=shapes)
        write_file(folder / META_NAME, _json(meta))
        return cls.open(store, foundation_hash)

    @classmethod
    def open(cls, store: TileStore, foundation_hash: str) -> Self:
        """Open a finished cache.

        Raises:
            TileStoreError: it is missing or unfinished, was made from another store or
                foundation, or a file has another size than it should.
        """
        folder = cache_folder(store, foundation_hash)
        meta = _read_model(folder / META_NAME, CacheMeta)
        if meta is None:
            raise TileStoreError(
                f"{store.path} has no finished latent cache for foundation {foundation_hash[:16]}; "
                "build it first"
            )
        if not _is_whole(folder, meta, store, foundation_hash):
            raise TileStoreError(
                f"{folder} is torn, or was made from other tiles or another foundation; "
                "build it again"
            )
        arrays = {
            name: np.memmap(folder / name, dtype=np.float16, mode="r", shape=shape)
            for name, shape in meta.shapes.items()
        }
        return cls(arrays)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(C, h, w) of one tile."""
        return self._arrays[LATENTS].shape[1:]

    def latents(self, rows: Rows) -> Tensor:
        """Scaled clean latents of store rows, float32 (N, C, h, w)."""
        return self._rows(LATENTS, rows)

    def tile_embeddings(self, rows: Rows) -> Tensor:
        """Aligner embeddings of the real tiles, float32 (N, D), unit norm to fp16 rounding."""
        return self._rows(TILE_EMBEDDINGS, rows)

    def text(self, caption_ids: Rows) -> Tensor:
        """Text encoder states of captions, float32 (N, L, D)."""
        return self._rows(TEXT, caption_ids)

    def null_text(self) -> Tensor:
        """Text encoder states of the empty caption, float32 (L, D)."""
        return self._rows(NULL_TEXT, [0])[0]

    def caption_embeddings(self, caption_ids: Rows) -> Tensor:
        """Aligner embeddings of captions, float32 (N, D)."""
        return self._rows(CAPTION_EMBEDDINGS, caption_ids)

    def _rows(self, name: str, rows: Rows) -> Tensor:
        values = self._arrays[name][np.asarray(rows, dtype=np.int64)]
        return torch.from_numpy(values.astype(np.float32))


def cache_folder(store: TileStore, foundation_hash: str) -> Path:
    """Where the cache of one foundation lies."""
    return store.path / "latents" / foundation_hash[:16]


@torch.no_grad()
def _build_captions(
    folder: Path, store: TileStore, foundation: Foundation, batch_size: int
) -> dict[str, tuple[int, ...]]:
    """Captions are few: made in one go, again after an interruption. Returns the files' shapes."""
    with _RowFiles(folder, (TEXT, CAPTION_EMBEDDINGS, NULL_TEXT)) as files:
        files.append(NULL_TEXT, foundation.generator.encode_captions([""]))
        for chunk in _chunks(0, len(store.captions), batch_size):
            captions = [store.captions[place] for place in chunk]
            files.append(TEXT, foundation.generator.encode_captions(captions))
            files.append(CAPTION_EMBEDDINGS, foundation.aligner.embed_captions(captions))
        return files.commit()


@torch.no_grad()
def _build_tiles(
    folder: Path,
    store: TileStore,
    foundation: Foundation,
    begun: BuildProgress,
    batch_size: int,
    progress: Progress | None,
) -> dict[str, tuple[int, ...]]:
    """Encode tiles in store order, committing every few batches. Returns the files' shapes."""
    num_done = begun.shapes[LATENTS][0] if LATENTS in begun.shapes else 0
    with _RowFiles(folder, (LATENTS, TILE_EMBEDDINGS), begun.shapes) as files:
        for number, chunk in enumerate(_chunks(num_done, store.num_tiles, batch_size), start=1):
            image_NCHW = torch.from_numpy(store.read_images(chunk)).permute(0, 3, 1, 2)
            image_NCHW = image_NCHW.to(torch.float32) / 127.5 - 1
            files.append(LATENTS, foundation.generator.encode_images(image_NCHW))
            files.append(TILE_EMBEDDINGS, foundation.aligner.embed_images(image_NCHW))
            if number % _BATCHES_PER_COMMIT == 0:
                state = BuildProgress(index=store.index_hash, shapes=files.commit())
                write_file(folder / _PROGRESS_NAME, _json(state))
            if progress is not None:
                progress(int(chunk[-1]) + 1, store.num_tiles)
        return files.commit()


class _RowFiles:
    """Float16 files that grow by rows, first cut back to the rows that were committed."""

    def __init__(
        self,
        folder: Path,
        names: Sequence[str],
        shapes: Mapping[str, tuple[int, ...]] | None = None,
    ) -> None:
        self._folder = folder
        self._names = names
        self._shapes = dict(shapes or {})
        self._files: dict[str, BinaryIO] = {}

    def __enter__(self) -> Self:
        for name in self._names:
            path = self._folder / name
            path.touch()
            os.truncate(path, _num_bytes(self._shapes.get(name, (0,))))
            self._files[name] = path.open("ab")
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            # A full disk fails again here, on bytes that are not committed anyway.
            with contextlib.suppress(OSError):
                file.close()

    def append(self, name: str, values: Tensor) -> None:
        """Append rows; NaN, infinity and overflow of float16 are refused."""
        half = values.detach().to("cpu", torch.float16)
        if not half.isfinite().all():
            raise TileStoreError(f"the foundation gave NaN or infinity for {name}; check its files")
        num_rows, *row = self._shapes.get(name, (0, *half.shape[1:]))
        if list(half.shape[1:]) != row:
            raise TileStoreError(f"{name}: rows of {row} go on as {list(half.shape[1:])}")
        self._files[name].write(half.contiguous().numpy().tobytes())
        self._shapes[name] = (num_rows + len(half), *row)

    def commit(self) -> dict[str, tuple[int, ...]]:
        """Force everything to the disk; returns the shapes that are safe now."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        return dict(self._shapes)


def _chunks(start: int, stop: int, size: int) -> Iterator[npt.NDArray[np.int64]]:
    for first in range(start, stop, size):
        yield np.arange(first, min(first + size, stop), dtype=np.int64)


def _num_bytes(shape: Sequence[int]) -> int:
    return math.prod(shape) * np.dtype(np.float16).itemsize


def _is_whole(folder: Path, meta: CacheMeta, store: TileStore, foundation_hash: str) -> bool:
    if meta.foundation != foundation_hash or meta.index != store.index_hash:
        return False
    return meta.shapes.keys() == set(ARRAY_NAMES) and all(
        (folder / name).is_file() and (folder / name).stat().st_size == _num_bytes(shape)
        for name, shape in meta.shapes.items()
    )


def _read_model(path: Path, model: type[Model]) -> Model | None:
    """The file's content, or None where it is absent or is not what we write."""
    try:
        return model.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


def _json(value: BaseModel) -> str:
    return value.model_dump_json(indent=2) + "\n"
