"""Reading a tile store: any patient's tiles, directly.

The primary access is by patient, because Poisson sampling draws patients; a shuffled stream of
tiles is not that and is not offered. A store object holds no open file, so it can be used in any
process or thread.

Shape letters: N tiles, H and W pixels, C channels.
"""

import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from crafts_core.fields import describe_first_error
from crafts_core.plan_sections import MODALITIES, Modality
from crafts_core.tiles.conditions import STORED_CHANNELS, ConditionError, decode_condition
from crafts_core.tiles.records import INDEX_SCHEMA, ROW_SCHEMA, TileStoreError, decode_tile
from crafts_core.tiles.writer import (
    MANIFEST_NAME,
    StoredFile,
    StoreManifest,
    describe_file,
    shard_path,
)

_MEND = "crafts-client tiles check --repair takes out what is damaged"
Rows = Sequence[int] | npt.NDArray[np.int64]


class TileStore:
    """A finished store. ``TileStore.open`` is the only way in."""

    def __init__(
        self, path: Path, manifest: StoreManifest, index: pa.Table, captions: Sequence[str]
    ) -> None:
        self.path = path
        self.manifest = manifest
        self.index = index
        """Every column of the index, one row per tile."""
        self.captions = tuple(captions)
        """The distinct captions; a row's ``caption_id`` points here."""
        patients = index.column("patient").combine_chunks().dictionary_encode()
        self.patients: tuple[str, ...] = tuple(patients.dictionary.to_pylist())
        """Pseudonyms, in the order of their rows."""
        self._patient_N = _numpy(patients.indices, np.int64)
        if np.any(np.diff(self._patient_N) < 0):
            raise TileStoreError(f"{path}: rows of a patient do not follow each other; build anew")
        self._starts = np.searchsorted(self._patient_N, np.arange(len(self.patients) + 1))
        shards = index.column("shard").combine_chunks().dictionary_encode()
        self._shards: tuple[str, ...] = tuple(shards.dictionary.to_pylist())
        self._shard_N = _numpy(shards.indices, np.int64)
        self._offset_N = _numpy(index.column("offset"), np.int64)
        self._length_N = _numpy(index.column("length"), np.int64)
        self._caption_N = _numpy(index.column("caption_id"), np.int64)
        self._conditions = {
            modality: tuple(
                _numpy(index.column(f"{modality}_{what}"), np.int64)
                for what in ("offset", "length")
            )
            for modality in MODALITIES
        }

    @classmethod
    def open(cls, path: Path, *, without: Collection[str] = (), check_shards: bool = True) -> Self:
        """Open a finished store after checking its manifest, index and file sizes.

        Args:
            path: Its folder.
            without: Files that are known to be damaged, as ``damaged_files`` names them: their
                size is no reason to refuse the others.
            check_shards: False leaves damage of pixels to whoever reads them (``readable``).

        Raises:
            TileStoreError: there is no store, it is unfinished, or a file is not what it was.
        """
        manifest = _read_manifest(path)
        for name, expected in manifest.files.items():
            is_asked = name not in without and (check_shards or "/" not in name)
            if is_asked and not _has_size(path / name, expected):
                raise TileStoreError(f"{path}: {name} is missing or torn; {_MEND}")
        for name in (manifest.index, manifest.captions):
            if describe_file(path / name) != manifest.files.get(name):
                raise TileStoreError(f"{path}: {name} was changed; {_MEND}")
        index = pq.read_table(path / manifest.index)
        captions = pq.read_table(path / manifest.captions).column("caption").to_pylist()
        if not index.schema.equals(INDEX_SCHEMA) or index.num_rows != manifest.num_tiles:
            raise TileStoreError(f"{path}: the index is of another format; build the store again")
        return cls(path, manifest, index, captions)

    def verify(self) -> None:
        """Read every file and compare its hash, pixels included.

        Raises:
            TileStoreError: names the first file that changed.
        """
        for name, expected in self.manifest.files.items():
            if describe_file(self.path / name) != expected:
                raise TileStoreError(f"{self.path}: {name} was changed; {_MEND}")

    @property
    def num_tiles(self) -> int:
        return self.manifest.num_tiles

    @property
    def num_patients(self) -> int:
        return len(self.patients)

    @property
    def tile_px(self) -> int:
        return self.manifest.tile_px

    @property
    def mpp(self) -> float | None:
        return self.manifest.mpp

    @property
    def cohort(self) -> str:
        return self.manifest.cohort

    @property
    def index_hash(self) -> str:
        """SHA-256 of the index: what caches of this store are keyed by."""
        return self.manifest.files[self.manifest.index].sha256

    @property
    def shards(self) -> dict[str, StoredFile]:
        """What each shard is, by its name."""
        return {name: self.manifest.files[shard_path(name)] for name in self._shards}

    def rows(self) -> pa.Table:
        """Every tile with its caption, as ``commit_store`` takes them (``ROW_SCHEMA``)."""
        captions = pa.array(self.captions, pa.string()).take(self.index.column("caption_id"))
        place = self.index.schema.get_field_index("caption_id")
        return self.index.set_column(place, "caption", captions).cast(ROW_SCHEMA)

    @property
    def labels(self) -> npt.NDArray[np.object_]:
        """The label of every row, as the site's table had it (may be empty)."""
        return np.asarray(self.index.column("label").to_pylist(), dtype=object)

    def tile_rows_of(self, patient_index: int) -> npt.NDArray[np.int64]:
        """Rows of one patient, by the patient's place in ``patients``."""
        if not 0 <= patient_index < self.num_patients:
            raise IndexError(f"patient {patient_index} of {self.num_patients}")
        start, stop = self._starts[patient_index : patient_index + 2]
        return np.arange(start, stop, dtype=np.int64)

    def patient_indices(self, rows: Rows) -> npt.NDArray[np.int64]:
        """For each row the place of its patient in ``patients``."""
        return self._patient_N[np.asarray(rows, dtype=np.int64)]

    def caption_ids(self, rows: Rows) -> npt.NDArray[np.int64]:
        """For each row the place of its caption in ``captions``."""
        return self._caption_N[np.asarray(rows, dtype=np.int64)]

    def read_images(self, rows: Rows) -> npt.NDArray[np.uint8]:
        """Pixels of the given rows in their order, shape (N, tile_px, tile_px, 3).

        Raises:
            TileStoreError: a stored tile cannot be read; build the store again.
        """
        image_NHWC = np.empty((len(rows), self.tile_px, self.tile_px, 3), dtype=np.uint8)
        for place, jpeg in self._members(rows, self._offset_N, self._length_N):
            image_NHWC[place] = decode_tile(jpeg, self.tile_px)
        return image_NHWC

    def digests(self) -> list[bytes]:
        """SHA-256 of every row's stored pixels: the same at every site that holds the tile."""
        digests = [b""] * self.num_tiles
        rows = np.arange(self.num_tiles)
        for place, jpeg in self._members(rows, self._offset_N, self._length_N):
            digests[place] = hashlib.sha256(jpeg).digest()
        return digests

    def has_condition(self, rows: Rows, modality: Modality) -> npt.NDArray[np.bool_]:
        """For each row whether something of this kind lies over its tile."""
        return self._conditions[modality][1][np.asarray(rows, dtype=np.int64)] > 0

    def read_conditions(self, rows: Rows, modality: Modality) -> npt.NDArray[np.uint8]:
        """Stored channels (``conditions.to_floats``) of rows that have them, (N, C, px, px).

        Raises:
            TileStoreError: one cannot be read; build the store again.
            ValueError: a row has none.
        """
        if not self.has_condition(rows, modality).all():
            raise ValueError(f"a row has no {modality} image")
        shape = (len(rows), STORED_CHANNELS[modality], self.tile_px, self.tile_px)
        stored_NCHW = np.empty(shape, dtype=np.uint8)
        for place, png in self._members(rows, *self._conditions[modality]):
            try:
                stored_NCHW[place] = decode_condition(png, modality, self.tile_px)
            except ConditionError as error:
                raise TileStoreError(str(error)) from error
        return stored_NCHW

    def _members(
        self, rows: Rows, offset_N: npt.NDArray[np.int64], length_N: npt.NDArray[np.int64]
    ) -> Iterator[tuple[int, bytes]]:
        """Bytes of one member for each row, with the row's place in ``rows``; by shard."""
        row_N = np.asarray(rows, dtype=np.int64)
        shard_N = self._shard_N[row_N]
        order_N = np.argsort(shard_N, kind="stable")
        for places in np.split(order_N, np.flatnonzero(np.diff(shard_N[order_N])) + 1):
            if not len(places):
                return
            shard = self._shards[shard_N[places[0]]]
            with (self.path / shard_path(shard)).open("rb", buffering=0) as file:
                for place in places.tolist():
                    file.seek(offset_N[row_N[place]])
                    yield place, file.read(length_N[row_N[place]])


def readable(
    read: Callable[[Rows], npt.NDArray[np.uint8]], rows: Rows
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]:
    """What ``read_images`` or ``read_conditions`` gives of some rows, as far as it can.

    Returns:
        The values, zero where a row cannot be read, and which rows could.
    """
    with suppress(TileStoreError, OSError):
        return read(rows), np.ones(len(rows), dtype=np.bool_)
    values = np.zeros((len(rows), *read(rows[:0]).shape[1:]), dtype=np.uint8)
    is_readable_N = np.zeros(len(rows), dtype=np.bool_)
    for place, row in enumerate(rows):
        with suppress(TileStoreError, OSError):
            values[place] = read([row])[0]
            is_readable_N[place] = True
    return values, is_readable_N


def damaged_files(path: Path) -> tuple[str, ...]:
    """Names of the files of a store that are missing or not what was written, pixels included.

    Raises:
        TileStoreError: there is no store, or its manifest cannot be read.
    """
    return tuple(
        name
        for name, expected in _read_manifest(path).files.items()
        if not _has_size(path / name, expected) or describe_file(path / name) != expected
    )


def _has_size(file: Path, expected: StoredFile) -> bool:
    return file.is_file() and file.stat().st_size == expected.num_bytes


def _read_manifest(path: Path) -> StoreManifest:
    try:
        values = json.loads((path / MANIFEST_NAME).read_text(encoding="utf-8"))
        if isinstance(values, dict) and values.get("format_version") not in (None, 3):
            raise TileStoreError(
                f"{path} was made by another version; move it away and ingest again"
            )
        return StoreManifest.model_validate(values)
    except FileNotFoundError as error:
        state = "an unfinished store" if path.is_dir() else "not a folder"
        if (path / "tiles" / MANIFEST_NAME).is_file():
            state = f"did you mean {path / 'tiles'}?"
        raise TileStoreError(
            f"no tile store at {path} ({state}); make one with crafts-client ingest"
        ) from error
    except ValidationError as error:
        raise TileStoreError(f"{path}/{MANIFEST_NAME}: {describe_first_error(error)}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise TileStoreError(
            f"cannot read {path}/{MANIFEST_NAME}: {error}; move {path} away and ingest again"
        ) from error


def _numpy(column: Any, dtype: type[np.int64]) -> npt.NDArray[np.int64]:
    """An arrow column as a numpy array of ``dtype``."""
    return np.asarray(column.to_numpy(zero_copy_only=False), dtype=dtype)
