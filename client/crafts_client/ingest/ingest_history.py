"""What was said of every table so far, as one report of the whole store. For the site's own eyes.

A run tells of its own table. The page must show the store, whichever table a slide came with, and
also what became of tables that were refused.
"""

from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from crafts_client.ingest.report import IngestReport, IngestRun, SourceOutcome

IsInStore = Callable[[SourceOutcome], bool]


def with_run(
    former: IngestReport | None,
    report: IngestReport,
    *,
    table: Path,
    at: datetime,
    is_in_store: IsInStore,
) -> IngestReport:
    """Everything known after a run: its own table first, then what came with others.

    Args:
        former: Of the runs before.
        report: Of this run alone.
        table: The file that was ingested.
        at: When.
        is_in_store: Whether the store has tiles of a source that an earlier run told of.
    """
    name = str(table.resolve())
    own = [source.model_copy(update={"table": name}) for source in report.sources]
    named = {(source.file, source.patient) for source in own}
    # A line that was taken out of a table is of no interest, unless its tiles are there.
    others = [
        source
        for source in (former.sources if former is not None else ())
        if (source.file, source.patient) not in named
        and (is_in_store(source) if source.num_tiles else source.table != name)
    ]
    told = {(source.table, source.line) for source in others}
    notes = [
        *(note.model_copy(update={"table": name}) for note in report.captions),
        *(n for n in (former.captions if former is not None else ()) if (n.table, n.line) in told),
    ]
    run = IngestRun(
        table=name,
        at=at,
        kind=report.kind,
        num_listed=len(report.sources),
        num_already=report.already,
        num_skipped=len(report.skipped),
        num_tiles=report.num_tiles,
    )
    earlier = [r for r in (former.runs if former is not None else ()) if r.table != name]
    return IngestReport.of(
        report.kind, [*own, *others], captions=notes, already=report.already, runs=[run, *earlier]
    )


def with_refusal(
    former: IngestReport | None, run: IngestRun, *, is_in_store: IsInStore
) -> IngestReport:
    """Everything known after a run that was refused: only the newest run's problems are kept."""
    if former is None:
        return IngestReport.of(run.kind, [], runs=[run])
    earlier = [
        r.model_copy(update={"problems": ()})
        for r in former.runs
        if not (r.table == run.table and r.num_problems)
    ]
    sources = [s for s in former.sources if not s.num_tiles or is_in_store(s)]
    return IngestReport.of(
        former.kind, sources, captions=former.captions, already=former.already,
        runs=[run, *earlier],
    )  # fmt: skip
