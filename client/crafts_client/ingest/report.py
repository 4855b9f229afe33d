"""What ingest did: for the site's own eyes, because it names slides and patients."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict

from crafts_client.ingest.table import TableRow
from crafts_core.durable import write_file


class SourceOutcome(BaseModel):
    """What became of one slide or ready tile."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    line: int
    file: str
    patient: str
    num_tiles: int
    rejected: dict[str, int]
    """Places on the slide that gave no tile, by reason."""
    skipped: str | None
    """Why nothing at all came from this file; None if it was used."""

    @classmethod
    def of(
        cls, row: TableRow, *, num_tiles: int, rejected: dict[str, int], skipped: str | None
    ) -> Self:
        return cls(
            line=row.line,
            file=row.name,
            patient=row.patient,
            num_tiles=num_tiles,
            rejected={reason: number for reason, number in sorted(rejected.items()) if number},
            skipped=skipped,
        )


class IngestReport(BaseModel):
    """Counts over a whole table. Exact counts are private: they stay at the site."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["slides", "tiles"]
    num_tiles: int
    rejected: dict[str, int]
    tiles_per_patient: dict[str, int]
    sources: tuple[SourceOutcome, ...]
    already: int = 0
    """Sources whose tiles were in the store before."""

    @classmethod
    def of(
        cls,
        kind: Literal["slides", "tiles"],
        outcomes: Iterable[SourceOutcome],
        *,
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
            already=already,
        )

    @property
    def skipped(self) -> tuple[SourceOutcome, ...]:
        """The files that gave nothing, each with its reason."""
        return tuple(source for source in self.sources if source.skipped is not None)

    def write(self, path: Path) -> None:
        """Write JSON that only its owner may read, atomically."""
        write_file(path, self.model_dump_json(indent=2) + "\n", mode=0o600)
