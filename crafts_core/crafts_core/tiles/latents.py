"""The latent cache: what a foundation makes of each tile and caption, computed once.

Raw float16 rows on disk, below the store in a folder named by the foundation's hash. Building
appends, so it resumes where it stopped and a full disk is an ordinary error; reading maps files.
When tiles came or went, rows of the others are copied from the former cache, not computed again.

A tile may have several *views*: itself, and variants that are mirrored and stained otherwise
(``augment.py``). Row ``tile * views + view`` is one view of one tile.

A row that cannot be made, or cannot be read again, is NaN (``encoding.py``) and no error: whoever
reads rows leaves such tiles out. The next build tries them again.

Shape letters: N tiles or captions, V views, C latent channels, h and w latent pixels, L tokens,
D features.
"""

import contextlib
import hashlib
import os
import shutil
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, BinaryIO, Self

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from crafts_core.durable import write_file
from crafts_core.fields import Sha256
from crafts_core.foundation import Foundation
from crafts_core.tiles.cache_files import (
    CAPTION_EMBEDDINGS,
    KEYS_NAME,
    LATENTS,
    META_NAME,
    TEXT,
    TILE_EMBEDDINGS,
    CacheMeta,
    Shape,
    cache_folder,
    finished_cache,
    first_changed,
    is_whole,
    num_bytes,
    read_model,
)
from crafts_core.tiles.encoding import (
    check_public_rows,
    encode_captions,
    encode_tiles,
    unusable_rows,
)
from crafts_core.tiles.records import TileStoreError
from crafts_core.tiles.store import Rows, TileStore
from crafts_core.tiles.writer import describe_file

CountProgress = Callable[[int, int], None]
_PROGRESS_NAME = "progress.json"
_KEY_BYTES = 16
_BATCHES_PER_COMMIT = 64
Keys = list[bytes]
"""What each tile's rows were made from, in the order of the store's rows."""


class BuildProgress(BaseModel):
    """``progress.json``: the tile rows that are safely on disk."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    index: Sha256
    views: Annotated[int, Field(ge=1)]
    shapes: Mapping[str, Shape]
    unusable: tuple[int, ...] = ()
    """Those of the tiles that could not be encoded."""


class LatentCache:
    """Latents, text states and aligner embeddings of one store under one foundation."""

    def __init__(self, folder: Path, meta: CacheMeta) -> None:
        self._files = {name: _StoredRows(folder / name, meta.shapes[name]) for name in meta.shapes}
        self.views = meta.views
        """How many variants of each tile there are; view 0 is the tile itself."""
        self.unusable = meta.unusable
        """Tiles, by their row in the store, that no training can use."""

    @classmethod
    def build(
        cls,
        store: TileStore,
        foundation: Foundation,
        *,
        views: int = 1,
        batch_size: int = 16,
        progress: CountProgress | None = None,
    ) -> Self:
        """Compute what is missing and open the cache.

        A finished cache is opened as it is, if every row of it could be made; an interrupted one
        goes on after its last committed batch; one that was made from another index gives the rows
        of the tiles that both have.

        Args:
            store: Whose tiles.
            foundation: What encodes them, on its own device.
            views: Variants of each tile, the tile itself among them.
            batch_size: Tiles, or captions, in every pass.
            progress: Called with tiles done and tiles in all.

        Raises:
            TileStoreError: tiles have another size than the foundation's.
            FoundationError: the foundation gives NaN or infinity for public tiles or captions.
        """
        if store.tile_px != foundation.manifest.tile_px:
            raise TileStoreError(
                f"{store.path} has tiles of {store.tile_px} px, the foundation takes "
                f"{foundation.manifest.tile_px}; ingest again with that size"
            )
        foundation_hash = foundation.manifest.hash
        folder = cache_folder(store, foundation_hash)
        former = folder.with_name(f"{folder.name}.former")
        meta = read_model(folder / META_NAME, CacheMeta)
        is_usable = meta is not None and is_whole(folder, meta, store, foundation_hash)
        if meta is None or not is_usable or meta.views != views or meta.unusable:
            check_public_rows(foundation)
            begun = _begin(folder, former, store, views)
            keys = tile_keys(store)
            shapes, lost_captions = _build_captions(folder, store, foundation, batch_size)
            old = _Former.open(former, views)
            made = _build_tiles(folder, store, foundation, begun, keys, old, batch_size, progress)
            shapes |= made.shapes
            is_lost_N = np.isin(store.caption_ids(range(store.num_tiles)), lost_captions)
            write_file(folder / KEYS_NAME, b"".join(keys))
            meta = CacheMeta(
                foundation=foundation_hash,
                index=store.index_hash,
                views=views,
                shapes=shapes,
                sha256={name: describe_file(folder / name).sha256 for name in (*shapes, KEYS_NAME)},
                unusable=tuple(sorted({*made.unusable, *np.flatnonzero(is_lost_N).tolist()})),
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
        return cls(cache_folder(store, foundation_hash), finished_cache(store, foundation_hash))

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(C, h, w) of one tile."""
        return self._files[LATENTS].row_shape

    def latents(self, rows: Rows, view_N: Rows | None = None) -> Tensor:
        """Scaled clean latents of store rows, float32 (N, C, h, w); of view 0 unless said."""
        return self._rows(LATENTS, self._view_rows(rows, view_N))

    def tile_embeddings(self, rows: Rows, view_N: Rows | None = None) -> Tensor:
        """Aligner embeddings of the tiles, float32 (N, D), unit norm to fp16 rounding."""
        return self._rows(TILE_EMBEDDINGS, self._view_rows(rows, view_N))

    def text(self, caption_ids: Rows) -> Tensor:
        """Text encoder states of captions, float32 (N, L, D)."""
        return self._rows(TEXT, caption_ids)

    def caption_embeddings(self, caption_ids: Rows) -> Tensor:
        """Aligner embeddings of captions, float32 (N, D)."""
        return self._rows(CAPTION_EMBEDDINGS, caption_ids)

    def _view_rows(self, rows: Rows, view_N: Rows | None) -> Rows:
        return np.asarray(rows, dtype=np.int64) * self.views + (
            0 if view_N is None else np.asarray(view_N, dtype=np.int64)
        )

    def _rows(self, name: str, rows: Rows) -> Tensor:
        values = self._files[name].read(np.asarray(rows, dtype=np.int64))
        return torch.from_numpy(values.astype(np.float32))


class _StoredRows:
    """A file of rows, held open: a cache that is built anew does not change what a site reads.

    Read and not mapped: a page of a map that cannot be read ends the process, whose death would
    tell that a certain patient was drawn.
    """

    def __init__(self, path: Path, shape: Sequence[int]) -> None:
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._file)
        self.row_shape = tuple(shape[1:])

    def read(self, row_N: npt.NDArray[np.int64]) -> npt.NDArray[np.float16]:
        """Values (N, *row_shape); NaN where a row cannot be read."""
        values = np.full((len(row_N), *self.row_shape), np.nan, dtype=np.float16)
        row_bytes = num_bytes(self.row_shape)
        for place, row in enumerate(row_N.tolist()):
            with contextlib.suppress(OSError):
                data = os.pread(self._file, row_bytes, row * row_bytes)
                if len(data) == row_bytes:
                    values[place] = np.frombuffer(data, np.float16).reshape(self.row_shape)
        return values


@torch.no_grad()
def _build_captions(
    folder: Path, store: TileStore, foundation: Foundation, batch_size: int
) -> tuple[dict[str, tuple[int, ...]], list[int]]:
    """Captions are few: made in one go, again after an interruption.

    Returns:
        The files' shapes, and the captions that could not be encoded.
    """
    lost: list[int] = []
    with _RowFiles(folder, (TEXT, CAPTION_EMBEDDINGS)) as files:
        for chunk in _chunks(0, len(store.captions), batch_size):
            captions = [store.captions[place] for place in chunk]
            text, embedded = encode_captions(foundation, captions, batch_size=batch_size)
            files.append(TEXT, text)
            files.append(CAPTION_EMBEDDINGS, embedded)
            lost += chunk[(unusable_rows(text) | unusable_rows(embedded)).numpy()].tolist()
        return files.commit(), lost


@torch.no_grad()
def _build_tiles(
    folder: Path,
    store: TileStore,
    foundation: Foundation,
    begun: BuildProgress,
    keys: Keys,
    old: "_Former",
    batch_size: int,
    progress: CountProgress | None,
) -> BuildProgress:
    """Rows in store order, committing every few batches. Returns what was reached."""
    unusable = list(begun.unusable)
    num_done = begun.shapes[LATENTS][0] // begun.views if LATENTS in begun.shapes else 0
    with _RowFiles(folder, (LATENTS, TILE_EMBEDDINGS), begun.shapes) as files:
        for number, chunk in enumerate(_chunks(num_done, store.num_tiles, batch_size), start=1):
            new = np.array([place for place in chunk if keys[place] not in old.places], np.int64)
            made: dict[str, Tensor] = {}
            if len(new):
                rows = encode_tiles(
                    store, foundation, new, keys, views=begun.views, batch_size=batch_size
                )
                made = dict(zip((LATENTS, TILE_EMBEDDINGS), rows, strict=True))
                lost_M = unusable_rows(rows[0]) | unusable_rows(rows[1])
                unusable += new[lost_M.unflatten(0, (len(new), -1)).any(dim=1).numpy()].tolist()
            for name, values in old.merged(made, [keys[place] for place in chunk]).items():
                files.append(name, values)
            if number % _BATCHES_PER_COMMIT == 0:
                write_file(folder / _PROGRESS_NAME, _json(_reached(begun, files, unusable)))
            if progress is not None:
                progress(int(chunk[-1]) + 1, store.num_tiles)
        return _reached(begun, files, unusable)


def _reached(begun: BuildProgress, files: "_RowFiles", unusable: Sequence[int]) -> BuildProgress:
    """Everything so far, forced to the disk."""
    return begun.model_copy(update={"shapes": files.commit(), "unusable": tuple(unusable)})


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
        meta = read_model(folder / META_NAME, CacheMeta)
        # Damage must not be carried on under a new hash.
        if meta is None or meta.views != views or first_changed(folder, meta) is not None:
            return cls({}, [], views)
        data = (folder / KEYS_NAME).read_bytes()
        keys = [data[at : at + _KEY_BYTES] for at in range(0, len(data), _KEY_BYTES)]
        for tile in meta.unusable:  # tried again
            keys[tile] = b""
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
                rows[is_new_M] = made[name]
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
            os.truncate(path, num_bytes(self._shapes.get(name, (0,))))
            self._files[name] = path.open("ab")
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            # A full disk fails again here, on bytes that are not committed anyway.
            with contextlib.suppress(OSError):
                file.close()

    def append(self, name: str, half: Tensor) -> None:
        """Append float16 rows."""
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


def _begin(folder: Path, former: Path, store: TileStore, views: int) -> BuildProgress:
    """Go on with an interrupted build, or start; a finished cache is kept as the former one."""
    begun = read_model(folder / _PROGRESS_NAME, BuildProgress)
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


def _json(value: BaseModel) -> str:
    return value.model_dump_json(indent=2) + "\n"
