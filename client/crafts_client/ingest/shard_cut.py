"""One shard while it is cut: what of it is done outlives any kill.

Beside the shard, which only grows, lies a journal. Each of its lines says how far the work has
come, how long the shard was then and what its hash was, and which tiles came in since the line
before. Whoever goes on takes the last whole line and cuts off what lies behind it, so the shard
ends up the same to the byte, however often it was interrupted. A shard that is not what its journal
says (a power failure, a meddler) is begun anew.
"""

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from crafts_client.ingest.errors import IngestError
from crafts_core.durable import exclusive_lock
from crafts_core.plan_sections import Modality
from crafts_core.tiles import TileStoreError
from crafts_core.tiles.writer import SHARDS, ShardWriter, StoredFile, shard_path

WORK = "work"
_COMMIT_EVERY_S = 0.5
_LOCK_S = 60.0
"""A worker whose program was killed ends with its next tile."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CutTile:
    """A tile as it comes from a slide."""

    x: int
    y: int
    width: float
    height: float
    tissue_fraction: float
    sharpness: float
    jpeg: bytes
    is_copy: bool = False
    """Whether the slide's own compressed bytes were taken."""
    conditions: Mapping[Modality, bytes] = field(default_factory=dict)
    """PNGs of what lies over the tile."""


class PlacedTile(NamedTuple):
    """A tile that is in a shard. ``place`` is what it was cut for: a number in the job's list."""

    place: int
    tile_id: str
    x: int
    y: int
    width: float
    height: float
    tissue_fraction: float
    sharpness: float
    is_copy: bool
    offset: int
    length: int
    nuclei_offset: int
    nuclei_length: int
    fluorescence_offset: int
    fluorescence_length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """A finished shard."""

    name: str
    stored: StoredFile
    tiles: tuple[PlacedTile, ...]
    rejected: tuple[tuple[int, str], ...]
    """Places that gave no tile, and why."""


@dataclass(slots=True, kw_only=True)
class _State:
    """What all lines of a journal say together."""

    next_place: int
    num_bytes: int
    sha256: str | None
    tiles: list[PlacedTile]
    rejected: list[tuple[int, str]]
    is_finished: bool


class ShardCut:
    """A shard that this process is cutting."""

    def __init__(self, store: Path, name: str, key: str) -> None:
        self._name, self._journal_path = name, store / WORK / f"{name}.jsonl"
        self._key = key
        self._state, kept_bytes = _read_journal(self._journal_path, key)
        path = store / shard_path(name)
        try:
            self._shard = _reopen(path, self._state)
        except TileStoreError:
            self._state, kept_bytes = _nothing(), 0
            self._shard = ShardWriter(path)
        self._journal = self._journal_path.open("r+b")
        self._journal.truncate(kept_bytes)
        self._journal.seek(kept_bytes)
        if kept_bytes == 0:
            self._write({"key": key})
        self._new_tiles = len(self._state.tiles)
        self._new_rejected = len(self._state.rejected)
        self._committed_at = time.monotonic()

    @property
    def next_place(self) -> int:
        """The first place that nothing is known of yet."""
        return self._state.next_place

    @property
    def is_finished(self) -> bool:
        return self._state.is_finished

    @property
    def num_tiles(self) -> int:
        return len(self._state.tiles)

    def num_rejected(self, reason: str) -> int:
        """How many places gave no tile for this reason so far."""
        return sum(why == reason for _, why in self._state.rejected)

    def keep(self, tile_id: str, tile: CutTile) -> None:
        """The next place gave a tile."""
        placed = self._shard.append_tile(tile_id, tile.jpeg, tile.conditions)
        self._state.tiles.append(
            PlacedTile(
                place=self._state.next_place,
                tile_id=tile_id,
                x=tile.x,
                y=tile.y,
                width=tile.width,
                height=tile.height,
                tissue_fraction=tile.tissue_fraction,
                sharpness=tile.sharpness,
                is_copy=tile.is_copy,
                **placed,
            )
        )
        self._advance()

    def reject(self, reason: str) -> None:
        """The next place gave none."""
        self._state.rejected.append((self._state.next_place, reason))
        self._advance()

    def finish(self) -> Shard:
        """All places are done. Again is fine."""
        if not self._state.is_finished:
            self._shard.finish()
            self._state.is_finished = True
            self._commit()
        return Shard(
            name=self._name,
            stored=StoredFile(num_bytes=self._shard.num_bytes, sha256=self._shard.sha256),
            tiles=tuple(self._state.tiles),
            rejected=tuple(self._state.rejected),
        )

    def close(self) -> None:
        """Let go of the files."""
        self._shard.__exit__()
        with suppress(OSError):
            self._journal.close()

    def _advance(self) -> None:
        self._state.next_place += 1
        if time.monotonic() - self._committed_at >= _COMMIT_EVERY_S:
            self._commit()

    def _commit(self) -> None:
        self._shard.flush()
        state = self._state
        self._write(
            {
                "next": state.next_place,
                "bytes": self._shard.num_bytes,
                "sha256": self._shard.sha256,
                "tiles": state.tiles[self._new_tiles :],
                "rejected": state.rejected[self._new_rejected :],
                "finished": state.is_finished,
            }
        )
        self._new_tiles, self._new_rejected = len(state.tiles), len(state.rejected)
        self._committed_at = time.monotonic()

    def _write(self, line: dict[str, Any]) -> None:
        self._journal.write(json.dumps(line).encode() + b"\n")
        self._journal.flush()


@contextmanager
def cut_shard(store: Path, name: str, key: str) -> Iterator[ShardCut]:
    """The shard ``name`` of the store at ``store``, to go on with or to begin.

    Args:
        store: Its ``shards`` and ``work`` folders are made if they are missing.
        name: Of the shard.
        key: Everything that decides what is in it; a journal of another key is begun anew.

    Raises:
        IngestError: another process is cutting it.
    """
    for folder in (SHARDS, WORK):
        (store / folder).mkdir(parents=True, exist_ok=True)
    held = IngestError(f"another ingest is at work in {store}; wait for it, or end it")
    with exclusive_lock(store / WORK / f"{name}.jsonl", held=held, timeout_s=_LOCK_S):
        cut = ShardCut(store, name, key)
        try:
            yield cut
        finally:
            cut.close()


def _reopen(path: Path, state: _State) -> ShardWriter:
    return ShardWriter(path, keep_bytes=state.num_bytes, digest=state.sha256)


def _read_journal(path: Path, key: str) -> tuple[_State, int]:
    """What a journal says, and how many of its bytes say it: a torn end says nothing."""
    state, kept_bytes = _nothing(), 0
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            values = json.loads(line if line.endswith(b"\n") else b"")
            if kept_bytes == 0:
                if values != {"key": key}:
                    break
            else:
                state = _State(
                    next_place=values["next"],
                    num_bytes=values["bytes"],
                    sha256=values["sha256"],
                    tiles=state.tiles + [PlacedTile(*tile) for tile in values["tiles"]],
                    rejected=state.rejected + [(n, reason) for n, reason in values["rejected"]],
                    is_finished=values["finished"],
                )
        except (ValueError, KeyError, TypeError):
            break
        kept_bytes += len(line)
    return state, kept_bytes


def _nothing() -> _State:
    return _State(next_place=0, num_bytes=0, sha256=None, tiles=[], rejected=[], is_finished=False)
