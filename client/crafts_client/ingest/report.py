"""What ingest did: for the site's own eyes, because it names slides and patients."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal, Self, TypedDict, Unpack

from pydantic import BaseModel, ConfigDict, Field

from crafts_client.ingest.caption_notes import CaptionNote
from crafts_client.ingest.table import TableRow
from crafts_core.durable import write_file

MAX_DENSITY = 0.8
"""Where the histograms of ``Stain`` end."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Stain(_Record):
    """How strongly one slide's tissue is stained, in optical density (log10)."""

    hematoxylin: float
    """Mean over the tissue."""
    eosin: float
    hematoxylin_shares: tuple[float, ...]
    """Parts of the tissue in equal steps of density from 0 to ``MAX_DENSITY``; last open."""
    eosin_shares: tuple[float, ...]


class SourceFacts(TypedDict, total=False):
    """What the reader knows of a source, beside what became of it; see ``SourceOutcome``."""

    scanner: str | None
    reader: str | None
    mpp: float | None
    size_px: tuple[int, int] | None
    damaged_levels: int
    copied: int
    identifiers: tuple[str, ...]
    stain: Stain | None
    picture: str | None
    seconds: float | None


class SourceOutcome(_Record):
    """What became of one slide or ready tile."""

    line: int
    file: str
    patient: str
    num_tiles: int
    rejected: dict[str, int]
    """Places on the slide that gave no tile, by reason."""
    skipped: str | None
    """Why nothing at all came from this file; None if it was used."""
    scanner: str | None = None
    reader: str | None = None
    """The program or library part that decoded it."""
    mpp: float | None = None
    """Microns per level-0 pixel."""
    size_px: tuple[int, int] | None = None
    """Level-0 width and height."""
    damaged_levels: int = 0
    """Coarse levels with damage, where a finer one was read to find the tissue."""
    copied: int = 0
    """Tiles whose compressed bytes went into the store as they were."""
    identifiers: tuple[str, ...] = ()
    """Kinds of identifying things that the file has and the store does not."""
    stain: Stain | None = None
    picture: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")] | None = None
    """Name of its pictures without the ending; None if there are none."""
    seconds: float | None = None

    @classmethod
    def of(
        cls,
        row: TableRow,
        *,
        num_tiles: int,
        rejected: dict[str, int],
        skipped: str | None,
        **facts: Unpack[SourceFacts],
    ) -> Self:
        return cls(
            line=row.line,
            file=row.name,
            patient=row.patient,
            num_tiles=num_tiles,
            rejected={reason: number for reason, number in sorted(rejected.items()) if number},
            skipped=skipped,
            **facts,
        )


class IngestReport(_Record):
    """Counts over a whole table. Exact counts are private: they stay at the site."""

    kind: Literal["slides", "tiles"]
    num_tiles: int
    rejected: dict[str, int]
    tiles_per_patient: dict[str, int]
    sources: tuple[SourceOutcome, ...]
    captions: tuple[CaptionNote, ...] = ()
    already: int = 0
    """Sources of the table that were in the store before."""

    @classmethod
    def of(
        cls,
        kind: Literal["slides", "tiles"],
        outcomes: Iterable[SourceOutcome],
        *,
        captions: Iterable[CaptionNote] = (),
        already: int = 0,
    ) -> Self:
        sources = tuple(sorted(outcomes, key=lambda outcome: outcome.line))
        rejected: Counter[str] = Counter()
        per_patient: Counter[str] = Counter()
        for source in sources:
            rejected.update(source.rejected)
            per_patient[source.patient] += source.num_tiles
        return cls(
            kind=kind,
            num_tiles=sum(per_patient.values()),
            rejected=dict(sorted(rejected.items())),
            tiles_per_patient=dict(sorted(per_patient.items())),
            sources=sources,
            captions=tuple(sorted(captions, key=lambda note: note.line)),
            already=already,
        )

    def without(self, patient: str) -> Self:
        """The report as if this patient had never been in the table.

        A caption whose line is no source's could be anybody's, so it goes, too.
        """
        sources = [source for source in self.sources if source.patient != patient]
        lines = {source.line for source in sources}
        return self.of(
            self.kind,
            sources,
            captions=[note for note in self.captions if note.line in lines],
            already=self.already,
        )

    @property
    def skipped(self) -> tuple[SourceOutcome, ...]:
        """The files that gave nothing, each with its reason."""
        return tuple(source for source in self.sources if source.skipped is not None)

    def write(self, path: Path) -> None:
        """Write JSON that only its owner may read, atomically."""
        write_file(path, self.model_dump_json(indent=2) + "\n", mode=0o600)
