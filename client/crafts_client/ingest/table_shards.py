"""A table that several machines ingest: which rows are whose, and what each of them has done.

Every machine cuts its rows into the shards and journals of the one store, as an ingest does that
is killed just before its work counts, and leaves a note beside them. Joining is the ingest of the
whole table: it finds everything cut, so the store is the same to the byte as one that a single
machine made, whatever was killed on the way.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from crafts_client.ingest.choices import Artefact, TissueMethod
from crafts_client.ingest.errors import IngestError
from crafts_client.ingest.shard_cut import WORK
from crafts_core.durable import exclusive_lock, write_file

MOST_SHARDS = 10_000
_NOTES = "table-shard-*.json"
_DIFFERENCES = {
    "table_hash": "another table",
    "salt": "another salt",
    "foundation": "another foundation",
    "cohort": "another cohort",
    "names": "another list of names",
    "ready_tiles": "the other kind of --ready-tiles",
    "max_tiles_per_slide": "another --max-tiles",
    "tissue": "another --tissue",
    "keep": "another --keep",
    "root": "another --root",
    "version": "another version of crafts-client",
}


@dataclass(frozen=True, slots=True)
class TableShard:
    """One of ``count`` parts of a table, from 1. A patient is in one of them, with all slides."""

    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """As on the command line: ``3/16``.

        Raises:
            ValueError: it is none.
        """
        found = re.fullmatch(r"(\d{1,5})/(\d{1,5})", text)
        number, count = map(int, found.groups()) if found else (0, 0)
        if not 1 <= number <= count <= MOST_SHARDS:
            raise ValueError(f"expected I/N with 1 <= I <= N <= {MOST_SHARDS}, got {text}")
        return cls(number, count)

    def has(self, patient: str) -> bool:
        """Whether a pseudonym is of this part, whatever else is in the table."""
        return int(patient[:15], 16) % self.count == self.number - 1


class ShardSettings(BaseModel):
    """All that must be the same in every shard of a table, and at the join."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    table: Path
    table_hash: str
    root: Path | None
    salt: str
    """A keyed hash that only this salt gives."""
    foundation: str
    cohort: str
    names: str
    """Hash of the home's list of names."""
    ready_tiles: bool
    max_tiles_per_slide: int | None
    tissue: TissueMethod
    keep: tuple[Artefact, ...]
    version: str

    def difference(self, other: "ShardSettings") -> str | None:
        """In words, the first thing that differs; where the table lies makes no difference."""
        mine, theirs = self.model_dump(), other.model_dump()
        return next(
            (told for name, told in _DIFFERENCES.items() if mine[name] != theirs[name]), None
        )


class ShardNote(BaseModel):
    """How far a shard is."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    number: Annotated[int, Field(ge=1)]
    count: Annotated[int, Field(ge=1)]
    is_finished: bool
    settings: ShardSettings

    @property
    def shard(self) -> TableShard:
        return TableShard(self.number, self.count)


def settings_hash(path: Path) -> str:
    """Of a file's bytes; of one that is not there, of nothing.

    Raises:
        IngestError: it cannot be read.
    """
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise IngestError(f"cannot read {path}: {error.strerror}") from error


@contextmanager
def noted_shard(store: Path, shard: TableShard, settings: ShardSettings) -> Iterator[None]:
    """Hold a shard of a table, and note that it is begun; and that it is finished, if it ends well.

    Raises:
        IngestError: another process is at it, or the shards that are there are of another table,
            of other settings or of another number.
    """
    (store / WORK).mkdir(parents=True, exist_ok=True)
    path = store / WORK / f"table-shard-{shard.number:05d}-of-{shard.count:05d}.json"
    held = IngestError(f"shard {shard} is being cut elsewhere; wait for it, or end it")
    with exclusive_lock(path.with_suffix(".lock"), held=held):
        others = [note for note in shard_notes(store) if note.shard != shard]
        _refuse_others(others, store, shard.count)

        def note(*, is_finished: bool) -> None:
            known = ShardNote(
                number=shard.number, count=shard.count, is_finished=is_finished, settings=settings
            )
            write_file(path, known.model_dump_json() + "\n", mode=0o600)

        note(is_finished=False)
        yield
        note(is_finished=True)


def shard_notes(store: Path) -> list[ShardNote]:
    """Of all shards that were begun and are not joined, in their order.

    Raises:
        IngestError: a note cannot be read.
    """
    notes = []
    for path in sorted((store / WORK).glob(_NOTES)):
        try:
            notes.append(ShardNote.model_validate_json(path.read_bytes()))
        except (OSError, ValidationError) as error:
            raise IngestError(f"cannot read {path}; remove it and cut that shard again") from error
    return notes


def check_nothing_waits(store: Path) -> None:
    """Refuse what would throw away what shards have cut.

    Raises:
        IngestError: shards were begun and are not joined.
    """
    if notes := shard_notes(store):
        raise IngestError(
            f"{_listed(notes)} of {notes[0].settings.table} wait to be joined: crafts-client tiles "
            f"join first, or give them up by removing {store / WORK}"
        )


def complete_shards(store: Path, notes: Sequence[ShardNote]) -> ShardSettings:
    """What all shards of a table were cut with; they can be joined.

    Raises:
        IngestError: some are missing or not finished, or they do not belong together.
    """
    count, settings = notes[0].count, notes[0].settings
    _refuse_others(notes, store, count)
    finished = {note.number for note in notes if note.is_finished}
    missing = [TableShard(n, count) for n in range(1, count + 1) if n not in finished]
    if missing:
        are = "is" if len(missing) == 1 else "are"
        raise IngestError(
            f"{_of(missing)} {are} missing or not finished; run crafts-client ingest "
            f"{settings.table} --shard {missing[0]}, and so on, with the options of the others"
        )
    for note in notes[1:]:
        refuse_difference(note, settings, f"than shard {notes[0].shard}")
    if not settings.table.exists():
        raise IngestError(f"the table of the shards, {settings.table}, is not there; put it back")
    return settings


def refuse_difference(note: ShardNote, settings: ShardSettings, than: str) -> None:
    """A shard that was cut with something else must be cut again.

    Raises:
        IngestError: it was.
    """
    if (told := note.settings.difference(settings)) is not None:
        raise IngestError(
            f"shard {note.shard} was cut with {told} {than}: run crafts-client ingest "
            f"{settings.table} --shard {note.shard} again as all others (what fits is not cut "
            "twice)"
        )


def _refuse_others(notes: Sequence[ShardNote], store: Path, count: int) -> None:
    if others := [note for note in notes if note.count != count]:
        raise IngestError(
            f"{_listed(others)} and shards of {count} do not fit together: use one number, and "
            f"remove {store / WORK}/table-shard-*-of-{others[0].count:05d}.json if that is wrong "
            "(what was cut is kept)"
        )


def _listed(notes: Sequence[ShardNote]) -> str:
    return _of([note.shard for note in notes])


def _of(shards: Sequence[TableShard]) -> str:
    more = f" and {len(shards) - 5} more" if len(shards) > 5 else ""
    word = "shard" if len(shards) == 1 else "shards"
    return f"{word} {', '.join(map(str, shards[:5]))}{more}"
