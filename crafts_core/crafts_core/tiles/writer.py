"""Writing a tile store: tar shards, a Parquet index and a manifest, all or nothing.

The same tiles in the same order give the same bytes, so a store can be compared by hash.
"""

import contextlib
import hashlib
import json
import shutil
import tarfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Annotated, BinaryIO, Literal, Self

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field

from crafts_core.durable import sync
from crafts_core.tiles.records import INDEX_SCHEMA, TileRecord, TileStoreError

MANIFEST_NAME = "store.json"
INDEX_NAME = "index.parquet"
CAPTIONS_NAME = "captions.parquet"
SHARD_BYTES = 256 * 2**20
_TAR_BLOCK = 512


class StoredFile(BaseModel):
    """What a finished file must be."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_bytes: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class StoreManifest(BaseModel):
    """``store.json``: written last, so a directory without it is an unfinished store."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    format_version: Literal[1] = 1
    cohort: Annotated[str, Field(min_length=1)]
    tile_px: Annotated[int, Field(ge=8, le=4096)]
    mpp: Annotated[float, Field(gt=0)] | None
    """Microns per pixel of every tile; None where ready tiles came without a scale."""
    num_tiles: Annotated[int, Field(ge=1)]
    num_patients: Annotated[int, Field(ge=1)]
    files: Mapping[str, StoredFile]
    versions: Mapping[str, str]


class TileStoreWriter:
    """Takes tiles patient by patient and commits a whole store, or leaves nothing.

    Used as a context manager: leaving it without an error finishes the store, leaving it with
    one removes what was written.
    """

    def __init__(
        self,
        path: Path,
        *,
        cohort: str,
        tile_px: int,
        mpp: float | None,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        if path.exists():
            raise TileStoreError(f"{path} exists; choose another folder or remove it first")
        self._path = path
        self._partial = path.with_name(f".{path.name}.partial")
        self._cohort = cohort
        self._tile_px = tile_px
        self._mpp = mpp
        self._shard_bytes = shard_bytes
        self._files: dict[str, StoredFile] = {}
        self._columns: dict[str, list[object]] = {name: [] for name in INDEX_SCHEMA.names}
        self._caption_ids: dict[str, int] = {}
        self._patients: dict[str, None] = {}
        self._patient: str | None = None
        self._tile_ids: set[str] = set()
        self._shard: _ShardWriter | None = None
        self._num_shards = 0

    def __enter__(self) -> Self:
        shutil.rmtree(self._partial, ignore_errors=True)
        (self._partial / "shards").mkdir(parents=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._close_shard()
                self._commit()
        finally:
            if self._shard is not None:
                self._shard.abandon()
            shutil.rmtree(self._partial, ignore_errors=True)

    def add(self, record: TileRecord, jpeg: bytes) -> None:
        """Append one tile.

        Raises:
            ValueError: the patient was left before and comes back, or the tile id is not new.
        """
        if record.patient != self._patient and record.patient in self._patients:
            raise ValueError("tiles of one patient must follow each other")
        if record.tile_id in self._tile_ids:
            raise ValueError("tile_id is not unique")
        self._patient = record.patient
        self._patients[record.patient] = None
        self._tile_ids.add(record.tile_id)
        shard = self._open_shard()
        offset = shard.append(f"{record.tile_id}.jpg", jpeg)
        caption_id = self._caption_ids.setdefault(record.caption, len(self._caption_ids))
        placed = {
            "shard": self._num_shards - 1,
            "offset": offset,
            "length": len(jpeg),
            "caption_id": caption_id,
        }
        for name, values in self._columns.items():
            values.append(placed[name] if name in placed else getattr(record, name))
        if shard.num_bytes >= self._shard_bytes:
            self._close_shard()

    def _open_shard(self) -> "_ShardWriter":
        if self._shard is None:
            self._shard = _ShardWriter(self._partial / shard_name(self._num_shards))
            self._num_shards += 1
        return self._shard

    def _close_shard(self) -> None:
        if self._shard is not None:
            self._files[shard_name(self._num_shards - 1)] = self._shard.close()
            self._shard = None

    def _commit(self) -> None:
        if not self._patients:
            raise TileStoreError("no tile was added; a store needs at least one")
        index = pa.table(self._columns, schema=INDEX_SCHEMA)
        captions = pa.table(
            {
                "caption_id": pa.array(range(len(self._caption_ids)), pa.int32()),
                "caption": pa.array(list(self._caption_ids), pa.string()),
            }
        )
        for name, table in ((INDEX_NAME, index), (CAPTIONS_NAME, captions)):
            pq.write_table(table, self._partial / name, compression="zstd")
            self._files[name] = describe_file(self._partial / name)
        manifest = StoreManifest(
            cohort=self._cohort,
            tile_px=self._tile_px,
            mpp=self._mpp,
            num_tiles=index.num_rows,
            num_patients=len(self._patients),
            files=dict(sorted(self._files.items())),
            versions={"pyarrow": pa.__version__},
        )
        text = json.dumps(manifest.model_dump(mode="json"), indent=2, sort_keys=True)
        (self._partial / MANIFEST_NAME).write_text(text + "\n", encoding="utf-8")
        for name in (*self._files, MANIFEST_NAME, "shards", "."):
            sync(self._partial / name)
        self._partial.rename(self._path)
        sync(self._path.parent)


class _ShardWriter:
    """A plain tar whose headers hold nothing but name and size."""

    def __init__(self, path: Path) -> None:
        self.num_bytes = 0
        self._file: BinaryIO = path.open("xb")
        self._digest = hashlib.sha256()

    def append(self, name: str, data: bytes) -> int:
        """Add a member and return the byte offset of its data."""
        info = tarfile.TarInfo(name)
        info.size = len(data)
        self._write(info.tobuf(tarfile.USTAR_FORMAT))
        offset = self.num_bytes
        self._write(data)
        self._write(bytes(-len(data) % _TAR_BLOCK))
        return offset

    def close(self) -> StoredFile:
        self._write(bytes(2 * _TAR_BLOCK))
        self._file.close()
        return StoredFile(num_bytes=self.num_bytes, sha256=self._digest.hexdigest())

    def abandon(self) -> None:
        """Close whatever the disk says: the file is about to be removed."""
        with contextlib.suppress(OSError):
            self._file.close()

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self.num_bytes += len(data)


def shard_name(number: int) -> str:
    """Path of a shard below the store."""
    return f"shards/{number:06d}.tar"


def describe_file(path: Path) -> StoredFile:
    """Size and SHA-256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    return StoredFile(num_bytes=path.stat().st_size, sha256=digest.hexdigest())
