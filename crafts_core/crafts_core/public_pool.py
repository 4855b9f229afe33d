"""A public pool: open tiles at a foundation's scale, of which a study picks some (``retrieval``).

It is made of the same table of open images that a foundation is built from (``tiles_table``), so
licence and source of everything are known; rows that are held out stay out. A site's tile store is
no pool: it names neither. Kept in a folder of its hash, which plans name::

    pool.json    where each tile is from, and its scale
    tiles.npy    pixels, uint8

Shape letters: N tiles, H W C pixels.
"""

import hashlib
import io
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, ValidationError

from crafts_core.durable import write_directory
from crafts_core.errors import CraftsError
from crafts_core.evaluation.encoder import Images
from crafts_core.exchange import canonical_json
from crafts_core.foundation_manifest import FoundationError, sha256_of
from crafts_core.progress import Progress
from crafts_core.retrieval_record import PoolSource

_WHAT, _TILES = "pool.json", "tiles.npy"


class PoolError(CraftsError):
    """The public pool of a study is missing, damaged or another one."""


class _Facts(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    mpp: float
    sources: tuple[PoolSource, ...]
    source_of: tuple[int, ...]


@dataclass(frozen=True)
class PublicPool:
    """Tiles, and where each is from."""

    images_NHWC: Images
    source_N: npt.NDArray[np.int64]
    """Place of each tile's image in ``sources``."""
    sources: tuple[PoolSource, ...]
    mpp: float

    def __len__(self) -> int:
        return len(self.images_NHWC)

    @property
    def tile_px(self) -> int:
        return int(self.images_NHWC.shape[1])

    def cases(self) -> npt.NDArray[np.str_]:
        """The case of each tile."""
        return np.asarray([each.case for each in self.sources])[self.source_N]

    @cached_property
    def hash(self) -> str:
        """SHA-256 of all pixels and of everything that is said of them."""
        pixels = hashlib.sha256()
        for image_HWC in self.images_NHWC:
            pixels.update(np.ascontiguousarray(image_HWC).tobytes())
        told = [self._facts().model_dump(mode="json"), self.tile_px, pixels.hexdigest()]
        return hashlib.sha256(canonical_json(told).encode()).hexdigest()

    def keep(self, pools: Path) -> Path:
        """Write it into a folder of pools, whole or not at all; what is there already stays.

        Raises:
            OSError: the disk refuses.
        """
        folder, pixels = pools / self.hash, io.BytesIO()
        if not folder.exists():
            np.save(pixels, self.images_NHWC)
            what = self._facts().model_dump_json(indent=1) + "\n"
            write_directory(folder, {_WHAT: what.encode(), _TILES: pixels.getbuffer()})
        return folder

    def _facts(self) -> _Facts:
        return _Facts(mpp=self.mpp, sources=self.sources, source_of=tuple(self.source_N.tolist()))


def open_pool(pools: Path, pool_hash: str) -> PublicPool:
    """The pool of that hash, every pixel compared with it.

    Raises:
        PoolError: it is not there, or not what it was.
    """
    folder = pools / pool_hash
    again = "make it of its table again: crafts-server pool add TABLE"
    try:
        facts = _Facts.model_validate_json((folder / _WHAT).read_bytes())
        images_NHWC = np.load(folder / _TILES, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as error:
        raise PoolError(f"there is no pool {pool_hash[:16]} in {pools}; {again}") from error
    except (OSError, ValueError, ValidationError) as error:
        raise PoolError(f"cannot read {folder}; remove it and {again}") from error
    pool = PublicPool(images_NHWC, np.asarray(facts.source_of), facts.sources, facts.mpp)
    if len(pool.source_N) != len(pool) or pool.hash != pool_hash:
        raise PoolError(f"{folder} is not what it was; remove it and {again}")
    return pool


def read_pool(
    table: Path, *, tile_px: int, mpp: float, progress: Progress = lambda _what, _done, _all: None
) -> PublicPool:
    """Every tile with tissue on it of a table's images, but for those that are held out.

    Raises:
        PoolError: there is no table, or an image of it cannot be read.
    """
    from crafts_core.foundation_build.tiles_table import read_open_tiles, read_table  # needs torch

    if not table.is_file():
        raise PoolError(
            f"{table} is no table of open tiles (docs/foundation.md says what it holds)"
        )
    try:
        rows = [row for row in read_table(table) if row.split == "build"]
        found = read_open_tiles(
            rows,
            tile_px=tile_px,
            mpp=mpp,
            progress=lambda done, total: progress("public pool", done, total),
        )
        used = sorted(set(found.row_N.tolist()))
        sources = tuple(
            PoolSource(
                file=_name(rows[row].file, table.parent),
                sha256=sha256_of(rows[row].file),
                case=rows[row].case,
                licence=rows[row].licence,
                source=rows[row].source,
            )
            for row in used
        )
    except FoundationError as error:
        raise PoolError(str(error)) from error
    return PublicPool(
        images_NHWC=found.image_NHWC,
        source_N=np.searchsorted(np.asarray(used), found.row_N),
        sources=sources,
        mpp=mpp,
    )


def table_fingerprint(table: Path) -> str:
    """Changes with the table, and with the size or date of any image that it names.

    Raises:
        PoolError: it cannot be read.
        OSError: an image is missing.
    """
    from crafts_core.foundation_build.tiles_table import read_table

    try:
        seen = [(str(row.file), row.file.stat()) for row in read_table(table)]
    except FoundationError as error:
        raise PoolError(str(error)) from error
    told = [[name, entry.st_size, entry.st_mtime_ns] for name, entry in seen]
    whole = table.read_text(encoding="utf-8-sig") + json.dumps(told)
    return hashlib.sha256(whole.encode()).hexdigest()


def _name(file: Path, folder: Path) -> str:
    """What a card may show of where an image is."""
    return file.relative_to(folder).as_posix() if file.is_relative_to(folder) else file.name
