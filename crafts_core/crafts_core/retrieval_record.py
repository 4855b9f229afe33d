"""What a study picked of a public pool: for receipts and cards. Says nothing of a patient's own.

It follows from what sites told (noised), from the pool and from the plan: post-processing.
"""

from collections.abc import Iterator, Sequence
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from crafts_core.fields import Sha256
from crafts_core.harmless import harmless

PICKED = "picked.tsv"
_COLUMNS = ("caption", "tiles", "file", "sha256", "case", "licence", "source")
_Colours = tuple[float, float, float]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class PoolSource(_Record):
    """An image of the pool, as its table names it."""

    file: str
    """Below the table's folder, or the last part of a path elsewhere."""
    sha256: Sha256
    case: str
    licence: str
    source: str


class Retrieval(_Record):
    """Tiles that were picked, and the colours that they were given."""

    pool: Sha256
    num_pool_tiles: Annotated[int, Field(ge=1)]
    captions: tuple[str, ...]
    tiles: tuple[tuple[int, ...], ...]
    """For each caption the tiles of the pool, nearest first; none where too few patients have it,
    so that the anchor is no more than its text."""
    images: tuple[tuple[int, ...], ...]
    """For each of them the place of its image in ``sources``."""
    sources: tuple[PoolSource, ...]
    scale: _Colours
    """Of the optical density of each colour."""
    shift: _Colours
    """Added to it then."""

    @property
    def num_tiles(self) -> int:
        return sum(map(len, self.tiles))

    @property
    def licences(self) -> tuple[tuple[str, str], ...]:
        """Licence and source of whatever was picked, each pair once."""
        return tuple(sorted({(each.licence, each.source) for each in self.sources}))

    @property
    def in_words(self) -> str:
        """For people."""
        without = sum(not tiles for tiles in self.tiles)
        left = f"; no tile for {without} captions" if without else ""
        return (
            f"{self.num_tiles} of {self.num_pool_tiles} public tiles, from {len(self.sources)} "
            f"images of {len({each.case for each in self.sources})} cases{left}"
        )

    def as_table(self) -> str:
        """Tab separated, a line for each caption and image."""
        rows = ["\t".join(_COLUMNS), *("\t".join(map(_cell, row)) for row in self._rows())]
        return "".join(f"{row}\n" for row in rows)

    def _rows(self) -> Iterator[Sequence[object]]:
        for caption, places in zip(self.captions, self.images, strict=True):
            for place in sorted(set(places)):
                each = self.sources[place]
                yield (
                    *(caption, places.count(place), each.file, each.sha256),
                    *(each.case, each.licence, each.source),
                )


def _cell(value: object) -> str:
    return harmless(str(value))
