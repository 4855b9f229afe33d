"""Writing a tile store: tar shards, a Parquet index, and a manifest that makes them count.

``store.json`` is the commit point: it names the index, the captions and every shard with their
hashes, and is replaced in one rename. Whatever else lies in the folder is unfinished or left over,
so a store can grow and shrink in place and is whole at every instant. The same tiles in the same
order give the same bytes, so stores can be compared by hash.
"""

import contextlib
import hashlib
import io
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

from crafts_core.durable import sync, write_file
from crafts_core.fields import Sha256
from crafts_core.plan_sections import MODALITIES, Modality
from crafts_core.tiles.records import INDEX_SCHEMA, ROW_SCHEMA, TileRecord, TileStoreError

MANIFEST_NAME = "store.json"
SHARDS = "shards"
SHARD_BYTES = 256 * 2**20
_TAR_BLOCK = 512
_BUFFER_BYTES = 2**20


class StoredFile(BaseModel):
    """What a finished file must be."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_bytes: Annotated[int, Field(ge=0)]
    sha256: Sha256


class StoredSource(BaseModel):
    """What is known of a slide whose tiles are in a store: hashes that only the site can make."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: Sha256
    """Of the file's state and of how it was cut: what is the same is not cut again."""
    content: Sha256
    """Of the file's content alone: a slide is there once, and belongs to one patient."""


class StoreManifest(BaseModel):
    """``store.json``: written last, so a directory without it is an unfinished store."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    format_version: Literal[3] = 3
    cohort: Annotated[str, Field(min_length=1)]
    tile_px: Annotated[int, Field(ge=8, le=4096)]
    mpp: Annotated[float, Field(gt=0)] | None
    """Microns per pixel of every tile; None where ready tiles came without a scale."""
    num_tiles: Annotated[int, Field(ge=1)]
    num_patients: Annotated[int, Field(ge=1)]
    index: Annotated[str, Field(pattern=r"^index-[0-9a-f]{16}\.parquet$")]
    captions: Annotated[str, Field(pattern=r"^captions-[0-9a-f]{16}\.parquet$")]
    files: Mapping[str, StoredFile]
    """By path below the store."""
    sources: Mapping[str, StoredSource]
    """By the pseudonym of the slide."""
    versions: Mapping[str, str]


class ShardWriter:
    """A plain tar whose headers hold nothing but name and size, and that can go on growing."""

    def __init__(self, path: Path, *, keep_bytes: int = 0, digest: str | None = None) -> None:
        """Open a shard to append to; what lies behind ``keep_bytes`` is cut off.

        Args:
            path: Made if it is missing.
            keep_bytes: A length that ``num_bytes`` had before.
            digest: ``sha256`` at that length.

        Raises:
            TileStoreError: the first ``keep_bytes`` are not what was written.
        """
        mode = "r+b" if path.exists() else "x+b"
        self._file: BinaryIO = path.open(mode, buffering=_BUFFER_BYTES)  # type: ignore[assignment]
        self._digest = hashlib.sha256()
        self.num_bytes = keep_bytes
        left = keep_bytes
        while left and (piece := self._file.read(min(left, 2**20))):
            self._digest.update(piece)
            left -= len(piece)
        if left or (digest is not None and self.sha256 != digest):
            self._file.close()
            raise TileStoreError(f"{path} is not what was written to it")
        self._file.truncate(keep_bytes)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        # A full disk fails again here, on bytes that do not count anyway.
        with contextlib.suppress(OSError):
            self._file.close()

    @property
    def sha256(self) -> str:
        """Of all that was appended so far."""
        return self._digest.copy().hexdigest()

    def append(self, name: str, data: bytes) -> int:
        """Add a member and return the byte offset of its data."""
        offset = self.num_bytes + _TAR_BLOCK
        for piece in (_tar_header(name, len(data)), data, bytes(-len(data) % _TAR_BLOCK)):
            self._write(piece)
        return offset

    def append_tile(
        self, tile_id: str, jpeg: bytes, conditions: Mapping[Modality, bytes]
    ) -> dict[str, int]:
        """Add a tile and the PNGs of its conditions; where each lies, by column of the index."""
        placed = {"offset": self.append(f"{tile_id}.jpg", jpeg), "length": len(jpeg)}
        for modality in MODALITIES:
            png = conditions.get(modality, b"")
            placed[f"{modality}_length"] = len(png)
            placed[f"{modality}_offset"] = (
                self.append(f"{tile_id}.{modality}.png", png) if png else 0
            )
        return placed

    def flush(self) -> None:
        """Hand everything to the kernel: it outlives this process."""
        self._file.flush()

    def finish(self) -> StoredFile:
        """Write the end of the archive."""
        self._write(bytes(2 * _TAR_BLOCK))
        self._file.flush()
        return StoredFile(num_bytes=self.num_bytes, sha256=self.sha256)

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self.num_bytes += len(data)


def commit_store(
    path: Path,
    rows: pa.Table,
    *,
    cohort: str,
    tile_px: int,
    mpp: float | None,
    shards: Mapping[str, StoredFile],
    sources: Mapping[str, StoredSource],
) -> StoreManifest:
    """Make ``rows`` the content of the store at ``path``, at once, and remove what is left over.

    Args:
        path: A folder whose ``shards/`` holds every shard that the rows name.
        rows: ``ROW_SCHEMA``; the rows of a patient follow each other.
        cohort: Under which name these patients are accounted for.
        tile_px: Side of every tile.
        mpp: Its scale, where it is known.
        shards: What each shard that the rows name must be, by its name.
        sources: See ``StoreManifest``.

    Raises:
        TileStoreError: there is no row.
        OSError: the disk refuses; the store is what it was.
    """
    if rows.num_rows == 0:
        raise TileStoreError("no tile was added; a store needs at least one")
    captions = rows.column("caption").combine_chunks().dictionary_encode()
    index = rows.set_column(
        rows.schema.get_field_index("caption"), "caption_id", captions.indices.cast(pa.int32())
    ).cast(INDEX_SCHEMA)
    texts = pa.table({"caption": captions.dictionary})
    files = {shard_path(name): stored for name, stored in shards.items()}
    names = []
    for kind, table in (("index", index), ("captions", texts)):
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd")
        stored = describe_bytes(buffer.getvalue())
        names.append(f"{kind}-{stored.sha256[:16]}.parquet")
        files[names[-1]] = stored
        write_file(path / names[-1], buffer.getvalue())
    for name in shards:
        sync(path / shard_path(name))
    sync(path / SHARDS)
    manifest = StoreManifest(
        cohort=cohort,
        tile_px=tile_px,
        mpp=mpp,
        num_tiles=index.num_rows,
        num_patients=len(index.column("patient").unique()),
        index=names[0],
        captions=names[1],
        files=dict(sorted(files.items())),
        sources=dict(sorted(sources.items())),
        versions={"pyarrow": pa.__version__},
    )
    text = json.dumps(manifest.model_dump(mode="json"), indent=1, sort_keys=True)
    write_file(path / MANIFEST_NAME, text + "\n")
    _remove_left_over(path, manifest)
    return manifest


def copy_members(
    path: Path, shard: str, stored: StoredFile, rows: pa.Table
) -> tuple[pa.Table, str, StoredFile]:
    """Copy some tiles of a shard into a new one beside it, which counts with the next commit.

    Args:
        path: The store.
        shard: Which shard of it.
        stored: What that must be.
        rows: ``ROW_SCHEMA``; the tiles of it that are wanted.

    Returns:
        The rows with their new places, and the new shard: its name, which follows from the old one
        and from the tiles, and what it is.

    Raises:
        TileStoreError: the old shard is not what was written.
    """
    source = path / shard_path(shard)
    if describe_file(source) != stored:  # damage must not be carried on under a new hash
        raise TileStoreError(
            f"{path}: {shard_path(shard)} was changed; crafts-client tiles check --repair takes "
            "out what is damaged"
        )
    records = rows.to_pylist()
    told = "\n".join((shard, *(record["tile_id"] for record in records)))
    name = hashlib.sha256(told.encode()).hexdigest()[:32]
    with source.open("rb") as file, ShardWriter(path / shard_path(name)) as copy:

        def member(record: Mapping[str, int], prefix: str = "") -> bytes:
            file.seek(record[f"{prefix}offset"])
            return file.read(record[f"{prefix}length"])

        for record in records:
            conditions = {modality: member(record, f"{modality}_") for modality in MODALITIES}
            record |= copy.append_tile(record["tile_id"], member(record), conditions)
            record["shard"] = name
        return pa.Table.from_pylist(records, schema=ROW_SCHEMA), name, copy.finish()


def _remove_left_over(path: Path, manifest: StoreManifest) -> None:
    """Files of ours that the manifest does not name: former indexes, shards of who left.

    Half-written ones, too: what a kill or a full disk left may be captions of who left.
    """
    written = ("index-*.parquet", "captions-*.parquet")
    half_written = (f".{pattern}.writing" for pattern in written)
    for pattern in (*written, *half_written, f"{SHARDS}/*.tar"):
        for file in path.glob(pattern):
            if str(file.relative_to(path)) not in manifest.files:
                file.unlink()


class TileStoreWriter:
    """A new store from tiles in memory, patient by patient; a context manager.

    The store appears at ``path`` when the context is left without an error; leaving it with one
    removes what was written.
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
        self._about = {"cohort": cohort, "tile_px": tile_px, "mpp": mpp}
        self._shard_bytes = shard_bytes
        self._shards: dict[str, StoredFile] = {}
        self._columns: dict[str, list[object]] = {name: [] for name in ROW_SCHEMA.names}
        self._patients: dict[str, None] = {}
        self._patient: str | None = None
        self._tile_ids: set[str] = set()
        self._shard: ShardWriter | None = None

    def __enter__(self) -> Self:
        shutil.rmtree(self._partial, ignore_errors=True)
        (self._partial / SHARDS).mkdir(parents=True)
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
                rows = pa.table(self._columns, schema=ROW_SCHEMA)
                commit_store(self._partial, rows, shards=self._shards, sources={}, **self._about)  # type: ignore[arg-type]
                self._partial.rename(self._path)
                sync(self._path.parent)
        finally:
            if self._shard is not None:
                self._shard.__exit__()
            shutil.rmtree(self._partial, ignore_errors=True)

    def add(
        self, record: TileRecord, jpeg: bytes, conditions: Mapping[Modality, bytes] | None = None
    ) -> None:
        """Append one tile, and PNGs of what can steer a generator towards it.

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
        name = f"{len(self._shards):06d}"
        if self._shard is None:
            self._shard = ShardWriter(self._partial / shard_path(name))
        placed: dict[str, object] = {"shard": name}
        placed |= self._shard.append_tile(record.tile_id, jpeg, conditions or {})
        for column, values in self._columns.items():
            values.append(placed[column] if column in placed else getattr(record, column))
        if self._shard.num_bytes >= self._shard_bytes:
            self._close_shard()

    def _close_shard(self) -> None:
        if self._shard is not None:
            self._shards[f"{len(self._shards):06d}"] = self._shard.finish()
            self._shard.__exit__()
            self._shard = None


def _tar_header(name: str, num_bytes: int) -> bytes:
    """What ``tarfile`` writes for a member of this name and size, in a tenth of the time."""
    start, end = _HEADER
    size = b"%011o\0" % num_bytes
    fields = name.encode().ljust(100, b"\0") + start + size + end
    checksum = b"%06o\0 " % (sum(fields) + 8 * ord(" "))
    return fields[:148] + checksum + fields[148:]


def _split_header() -> tuple[bytes, bytes]:
    """A header without name, size and checksum, from the library that knows the format."""
    whole = tarfile.TarInfo().tobuf(tarfile.USTAR_FORMAT)
    return whole[100:124], whole[136:148] + whole[156:]


_HEADER = _split_header()


def shard_path(name: str) -> str:
    """Path of a shard below the store."""
    return f"{SHARDS}/{name}.tar"


def describe_file(path: Path) -> StoredFile:
    """Size and SHA-256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    return StoredFile(num_bytes=path.stat().st_size, sha256=digest.hexdigest())


def describe_bytes(content: bytes) -> StoredFile:
    """Size and SHA-256 of what would be a file."""
    return StoredFile(num_bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
