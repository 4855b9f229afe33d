"""What ingest did: for the site's own eyes, because it names slides and patients."""

from collections import Counter
from collections.abc import Callable, Iterable
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal, Self, TypedDict, Unpack

from pydantic import BaseModel, ConfigDict, Field

from crafts_client.ingest.caption_notes import CaptionNote
from crafts_client.ingest.deidentify import plain_name
from crafts_client.ingest.errors import IngestError
from crafts_client.ingest.table import TableRow
from crafts_core.durable import write_file
from crafts_core.plan_sections import Modality

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
    warnings: tuple[str, ...]
    picture: str | None


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
    conditions: tuple[Modality, ...] = ()
    """What lies over the ready tile in the store."""
    stain: Stain | None = None
    warnings: tuple[str, ...] = ()
    """What a person should look at although it was used."""
    picture: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")] | None = None
    """Name of its pictures without the ending; None if there are none."""
    table: str = ""
    """Path of the table that has the line; empty while only one is told of."""

    @property
    def place(self) -> tuple[str, int]:
        """Table and line."""
        return self.table, self.line

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
        """What became of one line of the table."""
        return cls(
            line=row.line,
            file=row.name,
            patient=row.patient,
            num_tiles=num_tiles,
            rejected={reason: number for reason, number in sorted(rejected.items()) if number},
            skipped=skipped,
            conditions=tuple(row.conditions) if num_tiles else (),
            **facts,
        )


class IngestRun(_Record):
    """The newest run of one table, or the newest that was refused."""

    table: str
    """Its path."""
    at: datetime
    kind: Literal["slides", "tiles"]
    num_listed: int = 0
    num_already: int = 0
    num_skipped: int = 0
    num_tiles: int = 0
    """Of the sources that the table lists, those that were in the store before included."""
    num_problems: int = 0
    """Above zero: the run was refused, and nothing came of it."""
    problems: tuple[str, ...] = ()
    """Kept for the newest run only. They may name patients."""


class IngestReport(_Record):
    """Counts over a table, or over a whole store. Exact counts are private: they stay here."""

    kind: Literal["slides", "tiles"]
    num_tiles: int
    rejected: dict[str, int]
    tiles_per_patient: dict[str, int]
    sources: tuple[SourceOutcome, ...]
    captions: tuple[CaptionNote, ...] = ()
    already: int = 0
    """Sources of the newest table that were in the store before."""
    runs: tuple[IngestRun, ...] = ()
    """Newest first; none where the report is of a single run."""

    @classmethod
    def of(
        cls,
        kind: Literal["slides", "tiles"],
        outcomes: Iterable[SourceOutcome],
        *,
        captions: Iterable[CaptionNote] = (),
        already: int = 0,
        runs: Iterable[IngestRun] = (),
    ) -> Self:
        """Sources and captions in the order of their lines, table after table as they come."""
        given = list(outcomes)
        tables = {table: n for n, table in enumerate(dict.fromkeys(s.table for s in given))}
        sources = tuple(sorted(given, key=lambda source: (tables[source.table], source.line)))
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
            captions=tuple(
                sorted(captions, key=lambda note: (tables.get(note.table, len(tables)), note.line))
            ),
            already=already,
            runs=tuple(runs),
        )

    def without_patient(self, patient: str) -> Self:
        """The report as if this patient had never been in a table."""
        name = plain_name(patient)
        return self.without(lambda source: plain_name(source.patient) == name)

    def without(self, is_gone: Callable[[SourceOutcome], bool]) -> Self:
        """The report as if some sources had never been in a table.

        A caption whose line is no source's could be anybody's, so it goes, too, and so do the
        problems of a table that was refused.
        """
        sources = [source for source in self.sources if not is_gone(source)]
        places = {source.place for source in sources}
        return self.of(
            self.kind,
            sources,
            captions=[note for note in self.captions if (note.table, note.line) in places],
            already=self.already,
            runs=[run.model_copy(update={"problems": ()}) for run in self.runs],
        )

    @property
    def warned(self) -> tuple[SourceOutcome, ...]:
        """Files that a person should look at."""
        return tuple(source for source in self.sources if source.warnings)

    @property
    def cut_captions(self) -> tuple[CaptionNote, ...]:
        """Those of which the text tower does not read all."""
        return tuple(note for note in self.captions if note.unread)

    @property
    def skipped(self) -> tuple[SourceOutcome, ...]:
        """The files that gave nothing, each with its reason."""
        return tuple(source for source in self.sources if source.skipped is not None)

    def write(self, path: Path) -> None:
        """Write JSON that only its owner may read, atomically."""
        write_file(path, self.model_dump_json(indent=2) + "\n", mode=0o600)


class NothingUsedError(IngestError):
    """No source of the table gave a tile, and the store holds none."""

    def __init__(self, report: IngestReport) -> None:
        reasons = (f"line {s.line}: {s.file} was skipped: {s.skipped}" for s in report.skipped)
        super().__init__("no tile is left to train on", *reasons)
        self.report = report
        """What became of each."""
