"""Tiles copied as they are stored: no pixel is decoded, so none is lost to a second JPEG."""

from pathlib import Path

from crafts_client.ingest.readers.seam import Level
from crafts_client.ingest.readers.stored_tiles import StoredLevel, StoredTiles
from crafts_client.ingest.slides import Slide
from crafts_client.ingest.tiling import tile_extent


class TileCopier:
    """Copies the tiles of one level of one open slide, for as long as the slide is open."""

    def __init__(self, stored: StoredLevel, level: Level, step: int) -> None:
        self._stored = stored
        self._step = step
        tile_px = stored.tile_px[0]
        self._columns, self._rows = level.width // tile_px, level.height // tile_px

    def copy(self, x: int, y: int) -> bytes | None:
        """The tile with this level-0 corner as a JPEG file of its own.

        None where the grid of the file has no whole tile there, or where what is stored is not
        beyond doubt: the caller then reads the pixels.
        """
        column, column_rest = divmod(x, self._step)
        row, row_rest = divmod(y, self._step)
        if column_rest or row_rest or column >= self._columns or row >= self._rows:
            return None
        return self._stored.jpeg(column, row)


def tile_copier(path: Path, slide: Slide, tile_px: int, mpp: float) -> TileCopier | None:
    """A copier, if one level of the slide is stored as just the tiles that are wanted.

    Args:
        path: The file that ``slide`` was opened from.
        slide: The copier works until this is closed.
        tile_px: Side of a tile.
        mpp: Microns per pixel of a tile.
    """
    level = _level_at(slide, tile_px, mpp)
    if level is None or not slide.source.has_plain_tiles:
        return None
    tiles = StoredTiles.open(path, [level])
    slide.close_with(tiles.close)
    [stored] = tiles.levels
    if stored is None or stored.tile_px != (tile_px, tile_px):
        return None
    return TileCopier(stored, level, round(level.downsample) * tile_px)


def _level_at(slide: Slide, tile_px: int, mpp: float) -> Level | None:
    """The level whose tiles are those of the grid, if level-0 pixels go into its pixels evenly."""
    extent = tile_extent(slide, tile_px, mpp)
    for level in slide.source.levels:
        is_whole = all(
            length % size == 0 and length // size == level.downsample
            for length, size in zip(slide.size_px, level[:2], strict=True)
        )
        if is_whole and extent == (tile_px * level.downsample, tile_px * level.downsample):
            return level
    return None
