"""A store that is being added to: what is there, what is new, and the rename that makes it so."""

import contextlib
import hashlib
import json
import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Unpack

import pyarrow as pa
import pyarrow.compute as pc

from crafts_client.ingest.caption_notes import caption_report
from crafts_client.ingest.deidentify import Salt
from crafts_client.ingest.errors import IngestError, SlideError
from crafts_client.ingest.housekeeping import is_housekeeping, is_unfinished
from crafts_client.ingest.readers.dicom_instances import instances, is_dicom
from crafts_client.ingest.report import (
    IngestReport,
    NothingUsedError,
    SourceFacts,
    SourceOutcome,
)
from crafts_client.ingest.shard_cut import WORK, PlacedTile, Shard
from crafts_client.ingest.table import TableRow
from crafts_core.durable import exclusive_lock
from crafts_core.tiles.records import ROW_SCHEMA
from crafts_core.tiles.store import TileStore
from crafts_core.tiles.writer import (
    MANIFEST_NAME,
    SHARDS,
    StoredFile,
    StoredSource,
    commit_store,
    copy_members,
)

_ROWS_PER_TABLE = 5_000
_LOCK = "ingest.lock"
_CONTENT_BYTES = 2**20
_WHOLE_BYTES = 64 * 2**20
"""Uncompressed, two images of one size can begin and end alike, as white ones do."""
_ORDER = [(column, "ascending") for column in ("patient", "slide", "y", "x", "tile_id")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Whose tiles go where."""

    store: Path
    cohort: str
    salt: Salt
    tile_px: int
    mpp: float | None
    withdrawn: Collection[str]
    """Pseudonyms of patients whose slides are not read any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A slide or ready tile of the table."""

    row: TableRow
    slide_id: str
    key: str
    """See ``StoredSource``."""
    content: str

    @classmethod
    def of(cls, row: TableRow, salt: Salt, how: object) -> "Source":
        """``how`` is what decides the tiles beside the file: anything that JSON can say.

        Raises:
            SlideError: the file cannot be read.
        """
        slide_id = salt.slide_id(row.patient, row.name)
        try:
            content = content_key(row.path, salt)
            beside = [[name, content_key(path, salt)] for name, path in row.conditions.items()]
            # Times of files say nothing: copies, clocks and backups change them.
            made_from = json.dumps([how, row.mpp, content, *beside], sort_keys=True)
        except OSError as error:
            raise SlideError(f"cannot be read: {error.strerror}") from error
        return cls(row=row, slide_id=slide_id, key=salt.key(slide_id, made_from), content=content)


class StoreUpdate:
    """What a run adds to a store. ``open_update`` is the way in."""

    def __init__(self, target: Target, former: IngestReport | None) -> None:
        self._target = target
        said = () if former is None else former.sources
        self._said = {(outcome.file, outcome.patient): outcome for outcome in said}
        self._old = _open_old(target)
        self._old_rows = ROW_SCHEMA.empty_table() if self._old is None else self._old.rows()
        self._sources: dict[str, StoredSource] = dict(
            {} if self._old is None else self._old.manifest.sources
        )
        self._shards: dict[str, StoredFile] = {} if self._old is None else self._old.shards
        self._replaced: set[str] = set()
        self._moved: dict[str, list[str]] = {}
        self._rows: dict[str, TableRow] = {}
        self._tables: list[pa.Table] = []
        self._columns: dict[str, list[object]] = {name: [] for name in ROW_SCHEMA.names}
        self._outcomes: list[SourceOutcome] = []
        self._num_already = 0

    def new(self, sources: Sequence[Source]) -> list[Source]:
        """Those that must be read; of the others it is noted that they are here, or left out.

        A slide that is in the store under another name or patient is read again, and what it gave
        there goes: the table is right.
        """
        holders: dict[str, list[str]] = defaultdict(list)
        for slide_id, stored in self._sources.items():
            holders[stored.content].append(slide_id)
        listed = {source.slide_id for source in sources}
        wanted = []
        num_tiles = Counter(self._old_rows["slide"].to_pylist())
        for source in sources:
            known = self._sources.get(source.slide_id)
            if self._target.salt.patient_id(source.row.patient) in self._target.withdrawn:
                self.skip(source, "the patient withdrew; nothing is read")
            elif known is not None and known.key == source.key:
                self._rows[source.slide_id] = source.row
                self._num_already += 1
                self._say_again(source, num_tiles[source.slide_id])
            else:
                # All of them: the former patient may have held a ready tile twice.
                self._moved[source.slide_id] = [
                    holder for holder in holders[source.content] if holder not in listed
                ]
                wanted.append(source)
        return wanted

    def _say_again(self, source: Source, num_tiles: int) -> None:
        """What an earlier run found of a slide that is here already."""
        said = self._said.get((source.row.name, source.row.patient))
        if said is None or said.num_tiles != num_tiles:
            self.done(source, num_tiles, {})
        else:
            now = {"line": source.row.line, "conditions": tuple(source.row.conditions)}
            self._outcomes.append(said.model_copy(update=now))

    def add(self, source: Source, shard: Shard, tiles: Sequence[PlacedTile]) -> None:
        """Tiles of a source that lie in a shard; what was cut from it before goes."""
        if not tiles:
            return
        for name, values in _columns(source, self._target, shard.name, tiles).items():
            self._columns[name] += values
        if len(self._columns["patient"]) >= _ROWS_PER_TABLE:
            self._pack()
        self._shards[shard.name] = shard.stored
        self._replace(source)
        self._sources[source.slide_id] = StoredSource(key=source.key, content=source.content)

    def _replace(self, source: Source) -> None:
        """What a slide gave before, wherever it was, goes."""
        self._replaced.add(source.slide_id)
        for former in self._moved.get(source.slide_id, ()):
            self._replaced.add(former)
            self._sources.pop(former, None)

    def done(
        self,
        source: Source,
        num_tiles: int,
        rejected: Mapping[str, int],
        **facts: Unpack[SourceFacts],
    ) -> None:
        """All of a source was read."""
        if num_tiles == 0:
            self._replace(source)
            self._sources.pop(source.slide_id, None)
        skipped = None if num_tiles else "no place on it has enough clean tissue"
        self._outcomes.append(
            SourceOutcome.of(
                source.row, num_tiles=num_tiles, rejected=dict(rejected), skipped=skipped, **facts
            )
        )

    def skip(self, source: Source, why: str, **facts: Unpack[SourceFacts]) -> None:
        """Nothing comes from a source in this run."""
        if source.slide_id in self._sources:
            why += "; the tiles that it gave before stay in the store"
        self._outcomes.append(
            SourceOutcome.of(source.row, num_tiles=0, rejected={}, skipped=why, **facts)
        )

    def commit(self, kind: Literal["slides", "tiles"], table: Sequence[TableRow]) -> IngestReport:
        """Make it the store's content.

        Args:
            kind: What the sources were.
            table: Every row that was asked for; the report tells what became of its words.

        Raises:
            NothingUsedError: no tile is there at all.
        """
        report = IngestReport.of(
            kind, self._outcomes, captions=caption_report(table), already=self._num_already
        )
        self._pack()
        is_replaced = _is_one_of(self._old_rows["slide"], self._replaced)
        kept = self._without_bytes_of(
            self._old_rows.filter(is_replaced), self._old_rows.filter(pc.invert(is_replaced))
        )
        rows = pa.concat_tables([_as_in_table(kept, self._rows, self._target.salt), *self._tables])
        if rows.num_rows == 0:
            shutil.rmtree(self._target.store / WORK)
            shutil.rmtree(self._target.store / SHARDS, ignore_errors=True)
            raise NothingUsedError(report)
        present = set(rows["shard"].unique().to_pylist())
        commit_store(
            self._target.store,
            rows.sort_by(_ORDER),
            cohort=self._target.cohort,
            tile_px=self._target.tile_px,
            mpp=self._target.mpp,
            shards={name: stored for name, stored in self._shards.items() if name in present},
            sources=self._sources,
        )
        _remove_work(self._target.store)
        return report

    def report(self, kind: Literal["slides", "tiles"]) -> IngestReport:
        """What became of a shard of a table; its tiles count when all shards are joined."""
        return IngestReport.of(kind, self._outcomes, already=self._num_already)

    def _without_bytes_of(self, gone: pa.Table, kept: pa.Table) -> pa.Table:
        """What stays, with shards of its own where a ready tile that goes lay in one with it.

        Otherwise the pixels would outlive their row: a tile that was another patient's would still
        be there after that patient was forgotten.
        """
        for name in sorted({*gone["shard"].to_pylist()} & {*kept["shard"].to_pylist()}):
            is_mate = pc.equal(kept["shard"], name)
            rows, shard, stored = copy_members(
                self._target.store, name, self._shards[name], kept.filter(is_mate)
            )
            self._shards[shard] = stored
            kept = pa.concat_tables([kept.filter(pc.invert(is_mate)), rows])
        return kept

    def _pack(self) -> None:
        """Python's lists take ten times the memory of Arrow's."""
        self._tables.append(pa.table(self._columns, schema=ROW_SCHEMA))
        self._columns = {name: [] for name in ROW_SCHEMA.names}


def _remove_work(store: Path) -> None:
    """At once: half of the notes on a table's shards would say that shards are missing."""
    gone = store / f".{WORK}.gone"
    shutil.rmtree(gone, ignore_errors=True)  # a kill left it
    with contextlib.suppress(FileNotFoundError):
        (store / WORK).rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


@contextlib.contextmanager
def open_update(
    target: Target, former: IngestReport | None, *, is_shared: bool = False
) -> Iterator[StoreUpdate]:
    """Hold the store, and turn what the disk refuses into one clear line.

    Args:
        target: What is written.
        former: What was said of slides that are in the store already.
        is_shared: Others cut other shards of the table into it; nobody commits.

    Raises:
        IngestError: another ingest is at work, the store is of other tiles, or the disk refuses.
    """
    out = target.store
    held = IngestError(f"another ingest is at work in {out}; wait for it, or end it")
    try:
        out.mkdir(parents=True, exist_ok=True)
        with exclusive_lock(out / _LOCK, held=held, is_shared=is_shared):
            (out / WORK).mkdir(exist_ok=True)
            try:
                yield StoreUpdate(target, former)
            finally:
                with contextlib.suppress(OSError):  # a run that was refused had nothing to keep
                    (out / WORK).rmdir()
                _remove_if_empty(out)
    except OSError as error:
        raise IngestError(
            f"writing {out} failed: {error.strerror or error}; nothing finished is lost: mend it "
            "and run the same command again"
        ) from error


def _remove_if_empty(out: Path) -> None:
    """Leave no trace where nothing was begun."""
    kept = [path for path in out.rglob("*") if path.is_file() and path.name != _LOCK]
    if out.exists() and not kept:
        shutil.rmtree(out)


def remove_patient(path: Path, patient: str) -> int:
    """Take all tiles of a pseudonym out of a store; how many. The last patient takes it along.

    An unfinished store is removed whole.

    Raises:
        TileStoreError: the store is damaged.
        IngestError: an ingest is at work.
    """
    with _held(path):
        if not (path / MANIFEST_NAME).exists():
            shutil.rmtree(path)  # whatever an unfinished ingest had cut, of whomever
            return 0
        store = TileStore.open(path)
        return _take_out(store, pc.equal(store.index["patient"], patient))


def remove_slides(
    path: Path, slides: Collection[str], *, damaged: Collection[str] = ()
) -> set[str]:
    """Take slides out of a store, and whatever lies in a shard with them; gives all that went.

    The next ingest cuts those that its table lists, the same to the byte. Ready tiles of a patient
    share a shard, so they go and come together.

    Args:
        path: Of the store.
        slides: Their pseudonyms.
        damaged: Files of the store that cannot be relied on.

    Raises:
        TileStoreError: the store is damaged in other places.
        IngestError: an ingest is at work, or the store was not made by one.
    """
    with _held(path):
        store = TileStore.open(path, without=damaged)
        theirs = store.index.filter(_is_one_of(store.index["slide"], slides))
        is_gone = _is_one_of(store.index["shard"], theirs["shard"].unique().to_pylist())
        gone = set(store.index.filter(is_gone)["slide"].to_pylist())
        if gone - store.manifest.sources.keys():
            raise IngestError(f"{path} was not made by ingest; make it anew")
        _take_out(store, is_gone)
        return gone


def _held(path: Path) -> AbstractContextManager[None]:
    held = IngestError(f"an ingest is at work in {path}; wait for it, or end it")
    return exclusive_lock(path / _LOCK, held=held)


def _is_one_of(column: pa.ChunkedArray, values: Iterable[str]) -> pa.ChunkedArray:
    return pc.is_in(column, pa.array(sorted(values), pa.string()))


def _take_out(store: TileStore, is_gone: pa.ChunkedArray) -> int:
    """Go on without some rows and without their shards; how many rows went."""
    path, rows, manifest = store.path, store.rows(), store.manifest
    gone, left = rows.filter(is_gone), rows.filter(pc.invert(is_gone))
    if left.num_rows == 0:
        # First what makes it count: a kill leaves an unfinished store, not a torn one.
        (path / MANIFEST_NAME).unlink()
        shutil.rmtree(path)
        return int(rows.num_rows)
    shards, slides = (set(gone[column].to_pylist()) for column in ("shard", "slide"))
    if shared := shards & set(left["shard"].to_pylist()):
        raise IngestError(
            f"shard {min(shared)} holds tiles of several patients; such a store was not made "
            "by ingest: make it anew without this patient"
        )
    # What an interrupted run left may be of whoever goes.
    _remove_work(path)
    commit_store(
        path,
        left,
        cohort=manifest.cohort,
        tile_px=manifest.tile_px,
        mpp=manifest.mpp,
        shards={name: stored for name, stored in store.shards.items() if name not in shards},
        sources={name: s for name, s in manifest.sources.items() if name not in slides},
    )
    return int(gone.num_rows)


def _open_old(target: Target) -> TileStore | None:
    if not (target.store / MANIFEST_NAME).exists():
        return None
    old = TileStore.open(target.store)
    is_, wanted = ((about.cohort, about.tile_px, about.mpp) for about in (old.manifest, target))
    if target.mpp is None and is_[:2] == wanted[:2] and is_ != wanted:
        raise IngestError(
            f"the tiles of {target.store} have {is_[2]} microns per pixel, and no row of the table "
            "says a scale; give it in column mpp"
        )
    if is_ != wanted:
        raise IngestError(
            f"{target.store} holds tiles of cohort {is_[0]}, {is_[1]} px at {is_[2]} microns per "
            f"pixel; these are of {wanted[0]}, {wanted[1]} px at {wanted[2]}: choose another folder"
        )
    return old


def _columns(
    source: Source, target: Target, shard: str, tiles: Sequence[PlacedTile]
) -> dict[str, list[object]]:
    row, salt = source.row, target.salt
    same = {
        "patient": salt.patient_id(row.patient),
        "case": salt.case_id(row.patient, row.case),
        "slide": source.slide_id,
        "mpp": target.mpp,
        "shard": shard,
        "caption": row.caption,
        "label": row.label,
    }
    renamed = {"level0_width": "width", "level0_height": "height"}
    return {
        name: [same[name]] * len(tiles)
        if name in same
        else [getattr(tile, renamed.get(name, name)) for tile in tiles]
        for name in ROW_SCHEMA.names
    }


def _as_in_table(rows: pa.Table, table: Mapping[str, TableRow], salt: Salt) -> pa.Table:
    """Rows that stay, with what the table now says about their slides."""
    says: Mapping[str, Callable[[TableRow], str]] = {
        "case": lambda row: salt.case_id(row.patient, row.case),
        "caption": lambda row: row.caption,
        "label": lambda row: row.label,
    }
    slides = rows["slide"].to_pylist()
    for name, say in says.items():
        known = {slide: say(row) for slide, row in table.items()}
        values = [
            known.get(slide, value)
            for slide, value in zip(slides, rows[name].to_pylist(), strict=True)
        ]
        place = rows.schema.get_field_index(name)
        rows = rows.set_column(place, rows.schema.field(name), pa.array(values, pa.string()))
    return rows


def content_key(path: Path, salt: Salt) -> str:
    """What is the same for a slide however its file is called; see ``StoredSource``.

    Raises:
        OSError: the file cannot be read.
    """
    return salt.key("content", _content_of(path))


def _content_of(path: Path) -> str:
    """Hash of the length and of all of each file of a slide; of a large one, of both ends."""
    digest = hashlib.sha256()
    for file in _files(path):
        with file.open("rb") as opened:
            length = opened.seek(0, os.SEEK_END)
            digest.update(length.to_bytes(8, "big"))
            ends = (0, max(0, length - _CONTENT_BYTES))
            is_whole = 2 * _CONTENT_BYTES < length <= _WHOLE_BYTES
            for start in range(0, length, _CONTENT_BYTES) if is_whole else ends:
                opened.seek(start)
                digest.update(opened.read(_CONTENT_BYTES))
    return digest.hexdigest()


def _files(path: Path) -> list[Path]:
    """What a slide consists of, the same whichever file of it is named.

    MIRAX keeps its pixels in a folder of the same name beside it. Of a DICOM series each file
    stands for all.
    """
    if path.is_dir():
        return _files_in(path)
    if is_dicom(path):
        with contextlib.suppress(SlideError):  # it cannot be opened, and nothing comes of it
            return instances(path)[0]
    if path.suffix.lower() == ".mrxs":
        companions = (named.with_suffix("") for named in (path, path.resolve()))
        return [path, *next((_files_in(folder) for folder in companions if folder.is_dir()), [])]
    return [path]


def _files_in(folder: Path) -> list[Path]:
    """Without what file servers and desktops put there: it changes, and the slide does not."""
    return sorted(
        entry
        for entry in folder.iterdir()
        if entry.is_file() and not (is_housekeeping(entry.name) or is_unfinished(entry.name))
    )
