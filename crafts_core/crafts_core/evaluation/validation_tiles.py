"""Real tiles for validating an encoder: a finished store, or a folder with a table.

The table (TSV or CSV, the one of that kind in the folder) names ``file``, relative to it; a patient
(``patient``, ``case`` or ``source_tile_group``); a class (``label``, ``cancer_type``, ``class``,
``organ`` or ``caption``); and where it is known ``mpp``. Rows whose ``split`` is ``build`` are left
out: encoders were trained on such tiles.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from crafts_core.errors import CraftsError
from crafts_core.evaluation.changes import PATCHES_PX
from crafts_core.evaluation.image_sets import (
    LABEL,
    PATIENT,
    ImageSetError,
    Row,
    kind_of_table,
    middle_square,
    named_image,
    scaled_image,
    table_rows,
)
from crafts_core.evaluation.real_tiles import RealTiles
from crafts_core.tiles.store import TileStore
from crafts_core.tiles.writer import MANIFEST_NAME

_CLASS = (*LABEL, "caption")
_BUILD = "build"


class ValidationTilesError(CraftsError):
    """A folder has no tiles that an encoder could be validated on."""


def read_tiles(
    path: Path, *, mpp: float | None, at_mpp: float, largest_px: int
) -> tuple[RealTiles, float]:
    """Tiles of a store as they are, or of a folder at one scale and size; and their scale.

    Args:
        path: A store, or a folder with a table.
        mpp: Scale of tiles that do not say it.
        at_mpp: Scale that a folder's tiles are brought to.
        largest_px: A folder's tiles have this side, or a smaller one that all of them fill, in
            whole patches of the largest kind.

    Raises:
        CraftsError: what is missing.
    """
    if (path / MANIFEST_NAME).is_file():
        return _of_store(TileStore.open(path), mpp)
    table = _table(path)
    rows = [row for row in table_rows(table) if row.get("split") != _BUILD]
    if not rows:
        raise ValidationTilesError(f"{table} has no rows to validate on")
    scaled = [_read(path, row, mpp, at_mpp, table) for row in rows]
    unit = PATCHES_PX[-1]
    smallest = min(min(image.size) for image in scaled)
    side_px = min(smallest, largest_px) // unit * unit
    if side_px < 2 * unit:
        raise ValidationTilesError(
            f"{table}: expected tiles of at least {2 * unit} px at {at_mpp} microns per pixel, got "
            f"one of {smallest}"
        )
    tiles = RealTiles(
        images_NHWC=np.stack([middle_square(image, side_px) for image in scaled]),
        patients=np.array([_first(row, PATIENT, table) for row in rows]),
        captions=[_first(row, _CLASS, table) for row in rows],
    )
    return tiles, at_mpp


def _of_store(store: TileStore, mpp: float | None) -> tuple[RealTiles, float]:
    scale = store.mpp or mpp
    if scale is None:
        raise ValidationTilesError(f"{store.path} does not say its scale; give --mpp")
    return RealTiles.read(store, np.arange(store.num_tiles)), scale


def _table(path: Path) -> Path:
    found = sorted(each for each in path.iterdir() if kind_of_table(each) in (".tsv", ".csv"))
    if len(found) != 1:
        names = ", ".join(each.name for each in found) or "none"
        raise ValidationTilesError(
            f"{path} is no tile store; as a folder of tiles it needs one TSV or CSV, got {names}"
        )
    return found[0]


def _first(row: Row, names: tuple[str, ...], table: Path) -> str:
    for name in names:
        if row.get(name):
            return row[name]
    raise ValidationTilesError(f"{table}: a row of {row.get('file')} has no {' or '.join(names)}")


def _read(path: Path, row: Row, mpp: float | None, at_mpp: float, table: Path) -> Image.Image:
    name, told = row.get("file"), row.get("mpp") or mpp
    if not name or told is None:
        what = "file" if not name else "mpp; give --mpp"
        raise ValidationTilesError(f"{table}: a row has no {what}")
    try:
        return scaled_image(named_image(path, table, name), float(told) / at_mpp)
    except (ValueError, ImageSetError) as error:
        raise ValidationTilesError(f"{table}: {name} cannot be read ({error})") from error
