"""The latent cache: what a foundation makes of each tile and caption, computed once.

Raw float16 rows on disk, below the store in a folder named by the foundation's hash. Building
appends, so it resumes where it stopped and a full disk is an ordinary error; reading maps files.
When tiles came or went, rows of the others are copied from the former cache, not computed again.

A tile may have several *views*: itself, and variants that are mirrored and stained otherwise
(``augment.py``). Row ``tile * views + view`` is one view of one tile.

Shape letters: N tiles or captions, V views, C latent channels, h and w latent pixels, L tokens,
D features.
"""

import contextlib
import hashlib
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
from crafts_core.tiles.augment import view_of
from crafts_core.tiles.records import TileStoreError
from crafts_core.tiles.store import Rows, TileStore
from crafts_core.tiles.writer import Sha256, describe_file

Progress = Callable[[int, int], None]
Shape = tuple[Annotated[int, Field(ge=0)], ...]
Model = TypeVar("Model", bound=BaseModel)

LATENTS = "latents.f16"
TILE_EMBEDDINGS = "tile_embeddings.f16"
TEXT = "captions.f16"
NULL_TEXT = "null_text.f16"
CAPTION_EMBEDDINGS = "caption_embeddings.f16"
ARRAY_NAMES = (LATENTS, TILE_EMBEDDINGS, TEXT, NULL_TEXT, CAPTION_EMBEDDINGS)
META_NAME = "meta.json"
_PROGRESS_NAME = "progress.json"
_KEYS_NAME = "keys.bin"
_KEY_BYTES = 16
_BATCHES_PER_COMMIT = 16
Keys = list[bytes]
"""What each tile's rows were made from, in the order of the store's rows."""


class CacheMeta(BaseModel):
    """``meta.json``: what the cache was made from. Written last."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[2] = 2
    foundation: Sha256
    index: Sha256
    views: Annotated[int, Field(ge=1)]
    shapes: Mapping[str, Shape]
    sha256: Mapping[str, Sha256]


class BuildProgress(BaseModel):
    """``progress.json``: the tile rows that are safely on disk."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    index: Sha256
    views: Annotated[int, Field(ge=1)]
    shapes: Mapping[str, Shape]


class LatentCache:
    """Latents, text states and aligner embeddings of one store under one foundation."""

    def __init__(self, arrays: Mapping[str, npt.NDArray[np.float16]], views: int) -> None:
        self._arrays = arrays
        self.views = views
        """How many variants of each tile there are; view 0 is the tile itself."""

    @classmethod
    def build(
        cls,
        store: TileStore,
        foundation: Foundation,
        *,
        views: int = 1,
        batch_size: int = 64,
        progress: Progress | None = None,
    ) -> Self:
        """Compute what is missing and open the cache.

        A finished cache is opened as it is; an interrupted one goes on after its last committed
        batch; one that was made from another index gives the rows of the tiles that both have.

        Args:
            store: Whose tiles.
            foundation: What encodes them, on its own device.
            views: Variants of each tile, the tile itself among them.
            batch_size: Tiles in one pass.
            progress: Called with tiles done and tiles in all.

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
        former = folder.with_name(f"{folder.name}.former")
        meta = _read_model(folder / META_NAME, CacheMeta)
        is_whole = meta is not None and _is_whole(folder, meta, store, foundation_hash)
        if meta is None or not is_whole or meta.views != views:
            begun = _begin(folder, former, store, views)
            keys = tile_keys(store)
            shapes = _build_captions(folder, store, foundation, batch_size)
            old = _Former.open(former, views)
            shapes |= _build_tiles(
                folder, store, foundation, begun, keys, old, batch_size, progress
            )
            write_file(folder / _KEYS_NAME, b"".join(keys))
            meta = CacheMeta(
                foundation=foundation_hash,
                index=store.index_hash,
                views=views,
                shapes=shapes,
                sha256={
                    name: describe_file(folder / name).sha256 for name in (*shapes, _KEYS_NAME)
                },
            )
            write_file(folder / META_NAME, _json(meta))
        shutil.rmtree(former, ignore_errors=True)
        return cls.open(store, foundation_hash)

    @classmethod
    def open(cls, store: TileStore, foundation_hash: str) -> Self:
        """Open a finished cache.

        Raises:
            TileStoreError: it is missing or unfinished, was made from another store or
                foundation, or a file has another size than it should.
        """
        meta = _finished(store, foundation_hash)
        folder = cache_folder(store, foundation_hash)
        arrays = {
            name: np.memmap(folder / name, dtype=np.float16, mode="r", shape=shape)
            for name, shape in meta.shapes.items()
        }
        return cls(arrays, meta.views)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(C, h, w) of one tile."""
        return self._arrays[LATENTS].shape[1:]

    def latents(self, rows: Rows, view_N: Rows | None = None) -> Tensor:
        """Scaled clean latents of store rows, float32 (N, C, h, w); of view 0 unless said."""
        return self._rows(LATENTS, self._view_rows(rows, view_N))

    def tile_embeddings(self, rows: Rows, view_N: Rows | None = None) -> Tensor:
        """Aligner embeddings of the tiles, float32 (N, D), unit norm to fp16 rounding."""
        return self._rows(TILE_EMBEDDINGS, self._view_rows(rows, view_N))

    def text(self, caption_ids: Rows) -> Tensor:
        """Text encoder states of captions, float32 (N, L, D)."""
        return self._rows(TEXT, caption_ids)

    def null_text(self) -> Tensor:
        """Text encoder states of the empty caption, float32 (L, D)."""
        return self._rows(NULL_TEXT, [0])[0]

    def caption_embeddings(self, caption_ids: Rows) -> Tensor:
        """Aligner embeddings of captions, float32 (N, D)."""
        return self._rows(CAPTION_EMBEDDINGS, caption_ids)

    def _view_rows(self, rows: Rows, view_N: Rows | None) -> Rows:
        return np.asarray(rows, dtype=np.int64) * self.views + (
            0 if view_N is None else np.asarray(view_N, dtype=np.int64)
        )

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
    keys: Keys,
    old: "_Former",
    batch_size: int,
    progress: Progress | None,
) -> dict[str, tuple[int, ...]]:
    """Rows in store order, committing every few batches. Returns the files' shapes."""
    num_done = begun.shapes[LATENTS][0] // begun.views if LATENTS in begun.shapes else 0
    with _RowFiles(folder, (LATENTS, TILE_EMBEDDINGS), begun.shapes) as files:
        for number, chunk in enumerate(_chunks(num_done, store.num_tiles, batch_size), start=1):
            new = np.array([place for place in chunk if keys[place] not in old.places], np.int64)
            made = _encode(store, foundation, new, keys, begun.views) if len(new) else {}
            for name, values in old.merged(made, [keys[place] for place in chunk]).items():
                files.append(name, values)
            if number % _BATCHES_PER_COMMIT == 0:
                state = begun.model_copy(update={"shapes": files.commit()})
                write_file(folder / _PROGRESS_NAME, _json(state))
            if progress is not None:
                progress(int(chunk[-1]) + 1, store.num_tiles)
        return files.commit()


def _encode(
    store: TileStore, foundation: Foundation, chunk: npt.NDArray[np.int64], keys: Keys, views: int
) -> dict[str, Tensor]:
    """Both kinds of rows of some tiles, the views of a tile side by side."""
    image_NHWC = store.read_images(chunk)
    image_MHWC = np.stack(
        [
            view_of(image, view, key=keys[place])
            for image, place in zip(image_NHWC, chunk, strict=True)
            for view in range(views)
        ]
    )
    image_MCHW = torch.from_numpy(image_MHWC).permute(0, 3, 1, 2).to(torch.float32) / 127.5 - 1
    return {
        LATENTS: foundation.generator.encode_images(image_MCHW),
        TILE_EMBEDDINGS: foundation.aligner.embed_images(image_MCHW),
    }


class _Former:
    """Rows of a cache that was made for other tiles, by what they were made from."""

    def __init__(
        self, arrays: Mapping[str, npt.NDArray[np.float16]], keys: Keys, views: int
    ) -> None:
        self._arrays, self._views = arrays, views
        self.places = {key: place for place, key in enumerate(keys)}

    @classmethod
    def open(cls, folder: Path, views: int) -> Self:
        """The former cache if it is finished, whole and of as many views; else an empty one."""
        meta = _read_model(folder / META_NAME, CacheMeta)
        # Damage must not be carried on under a new hash.
        if meta is None or meta.views != views or _first_changed(folder, meta) is not None:
            return cls({}, [], views)
        data = (folder / _KEYS_NAME).read_bytes()
        keys = [data[at : at + _KEY_BYTES] for at in range(0, len(data), _KEY_BYTES)]
        arrays = {
            name: np.memmap(folder / name, dtype=np.float16, mode="r", shape=meta.shapes[name])
            for name in (LATENTS, TILE_EMBEDDINGS)
        }
        return cls(arrays, keys, views)

    def merged(self, made: Mapping[str, Tensor], keys: Keys) -> dict[str, Tensor]:
        """Rows of all ``keys`` in their order: ours, and between them those that were made."""
        place_N = np.array([self.places.get(key, -1) for key in keys])
        row_M = (place_N[:, None] * self._views + np.arange(self._views)).ravel()
        is_new_M = torch.from_numpy(np.repeat(place_N < 0, self._views))
        if is_new_M.all():
            return dict(made)
        merged = {}
        for name, array in self._arrays.items():
            # Row 0 stands where the new ones come in.
            rows = torch.from_numpy(array[np.maximum(row_M, 0)])
            if name in made:
                rows[is_new_M] = made[name].to("cpu", torch.float16)
            merged[name] = rows
        return merged


def tile_keys(store: TileStore) -> Keys:
    """For each row a hash of its id and of the file and place that its pixels come from."""
    shards = {name: stored.sha256 for name, stored in store.shards.items()}
    columns = (store.index.column(name).to_pylist() for name in ("tile_id", "shard", "offset"))
    return [
        hashlib.sha256(f"{tile_id} {shards[shard]} {offset}".encode()).digest()[:_KEY_BYTES]
        for tile_id, shard, offset in zip(*columns, strict=True)
    ]


def check_cache(store: TileStore, foundation_hash: str) -> None:
    """Compare every file of the cache with its hash.

    Raises:
        TileStoreError: names the first file that changed.
    """
    meta = _finished(store, foundation_hash)
    folder = cache_folder(store, foundation_hash)
    changed = _first_changed(folder, meta)
    if changed is not None:
        raise TileStoreError(f"{changed} was changed; remove {folder} and run ingest again")


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


def _begin(folder: Path, former: Path, store: TileStore, views: int) -> BuildProgress:
    """Go on with an interrupted build, or start; a finished cache is kept as the former one."""
    begun = _read_model(folder / _PROGRESS_NAME, BuildProgress)
    is_finished = (folder / META_NAME).exists()
    wanted = (store.index_hash, views)
    if begun is not None and not is_finished and (begun.index, begun.views) == wanted:
        return begun
    if is_finished:
        shutil.rmtree(former, ignore_errors=True)
        folder.rename(former)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    begun = BuildProgress(index=store.index_hash, views=views, shapes={})
    write_file(folder / _PROGRESS_NAME, _json(begun))
    return begun


def _finished(store: TileStore, foundation_hash: str) -> CacheMeta:
    folder = cache_folder(store, foundation_hash)
    meta = _read_model(folder / META_NAME, CacheMeta)
    if meta is None:
        raise TileStoreError(
            f"{store.path} has no finished latent cache for foundation {foundation_hash[:16]}; "
            "build it first"
        )
    if not _is_whole(folder, meta, store, foundation_hash):
        raise TileStoreError(
            f"{folder} is torn, or was made from other tiles or another foundation; build it again"
        )
    return meta


def _is_whole(folder: Path, meta: CacheMeta, store: TileStore, foundation_hash: str) -> bool:
    made_from = (meta.foundation, meta.index)
    return made_from == (foundation_hash, store.index_hash) and _has_sizes(folder, meta)


def _first_changed(folder: Path, meta: CacheMeta) -> Path | None:
    """A file that is not what was written, if there is one."""
    for name in (*ARRAY_NAMES, _KEYS_NAME):
        path = folder / name
        if not path.is_file() or describe_file(path).sha256 != meta.sha256.get(name):
            return path
    return None


def _has_sizes(folder: Path, meta: CacheMeta) -> bool:
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
