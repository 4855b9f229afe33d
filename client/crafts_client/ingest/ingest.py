"""From a site's table to its tile store. Nothing but pseudonyms and pixels goes in."""

import contextlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from crafts_client.ingest.cutting import SlideJob, cut_slide
from crafts_client.ingest.deidentify import Salt
from crafts_client.ingest.errors import IngestError, SlideError
from crafts_client.ingest.parts import CutTile, part_path, read_part
from crafts_client.ingest.pool import run_jobs
from crafts_client.ingest.ready_tiles import TileJob, prepare_tile
from crafts_client.ingest.report import IngestReport, SourceOutcome
from crafts_client.ingest.slides import MissingScaleError, Slide
from crafts_client.ingest.table import TableRow
from crafts_client.ingest.tiling import TilingOptions
from crafts_core.tiles.records import TileRecord
from crafts_core.tiles.writer import TileStoreWriter

Progress = Callable[[int, int], None]


def ingest_slides(
    rows: Sequence[TableRow],
    out: Path,
    *,
    cohort: str,
    salt: Salt,
    options: TilingOptions,
    num_processes: int = 2,
    progress: Progress | None = None,
) -> IngestReport:
    """Cut every slide of a table into tiles and commit them as one store at ``out``.

    A slide that cannot be used is skipped and named in the report. Interrupted, the same call
    goes on with the slides that are left; the store appears only when it is whole, and is the
    same to the byte.

    Args:
        rows: From ``read_table``.
        out: Folder of the store; must not exist.
        cohort: The name under which these patients are accounted for.
        salt: The site's key for pseudonyms.
        options: What a tile is.
        num_processes: 1 runs everything in this process.
        progress: Called with slides done and slides in all.

    Raises:
        IngestError: a slide has no scale (all such are named), no slide gave a tile, or the disk
            refuses.
    """
    _refuse_existing(out)
    _refuse_missing_scale(rows)
    parts = out.with_name(f".{out.name}.parts")
    outcomes: list[SourceOutcome] = []
    with _disk_errors(out):
        parts.mkdir(parents=True, exist_ok=True)
        jobs = [_slide_job(row, parts, salt, options) for row in rows]
        for outcome in run_jobs(cut_slide, jobs, num_processes=num_processes):
            outcomes.append(outcome)
            if progress is not None:
                progress(len(outcomes), len(jobs))
        report = IngestReport.of("slides", outcomes)
        _refuse_nothing(report)
        with TileStoreWriter(
            out, cohort=cohort, tile_px=options.tile_px, mpp=options.mpp
        ) as writer:
            for job in _patient_by_patient(jobs, salt):
                for tile in read_part(job.part):
                    record = _record(job.row, tile, job.slide_id, salt, options.mpp)
                    writer.add(record, tile.jpeg)
        shutil.rmtree(parts)
    return report


def ingest_tiles(
    rows: Sequence[TableRow],
    out: Path,
    *,
    cohort: str,
    salt: Salt,
    tile_px: int,
    mpp: float | None = None,
    source_mpp: float | None = None,
    num_processes: int = 1,
    progress: Progress | None = None,
) -> IngestReport:
    """Commit ready tiles, one image file each, as a store at ``out``.

    ``mpp`` is what a pixel of the store measures. An image whose own resolution is known (the
    table's ``mpp``, else ``source_mpp``) gives its central ``tile_px * mpp`` microns; any other
    image is resampled whole (its central square). An unreadable or too small image is skipped and
    named in the report.

    Raises:
        IngestError: no image could be used, or the disk refuses.
    """
    _refuse_existing(out)
    ordered = sorted(rows, key=lambda row: (salt.patient_id(row.patient), _slide_id(row, salt)))
    jobs = [
        TileJob(row=row, tile_px=tile_px, side_px=_side_px(row.mpp or source_mpp, mpp, tile_px))
        for row in ordered
    ]
    prepared = run_jobs(prepare_tile, jobs, num_processes=num_processes, chunk_size=32)
    outcomes: list[SourceOutcome] = []
    with (
        _disk_errors(out),
        contextlib.closing(prepared),
        TileStoreWriter(out, cohort=cohort, tile_px=tile_px, mpp=mpp) as writer,
    ):
        for row, tile in zip(ordered, prepared, strict=True):
            if isinstance(tile, SlideError):
                skipped = SourceOutcome.of(row, num_tiles=0, rejected={}, skipped=str(tile))
                outcomes.append(skipped)
            else:
                writer.add(_record(row, tile, _slide_id(row, salt), salt, mpp), tile.jpeg)
                outcomes.append(SourceOutcome.of(row, num_tiles=1, rejected={}, skipped=None))
            if progress is not None:
                progress(len(outcomes), len(jobs))
        report = IngestReport.of("tiles", outcomes)
        _refuse_nothing(report)
    return report


def _side_px(image_mpp: float | None, store_mpp: float | None, tile_px: int) -> float | None:
    """Pixels of an image that one tile of the store covers; None where either is unknown."""
    if image_mpp is None or store_mpp is None:
        return None
    return tile_px * store_mpp / image_mpp


def _slide_job(row: TableRow, parts: Path, salt: Salt, options: TilingOptions) -> SlideJob:
    slide_id = _slide_id(row, salt)
    part = part_path(parts, slide_id, row, options)
    return SlideJob(row=row, slide_id=slide_id, part=part, options=options)


def _slide_id(row: TableRow, salt: Salt) -> str:
    return salt.slide_id(row.patient, row.name)


def _patient_by_patient(jobs: Sequence[SlideJob], salt: Salt) -> Iterator[SlideJob]:
    """The slides that were cut, in an order that says nothing about the table's."""
    ordered = sorted(jobs, key=lambda job: (salt.patient_id(job.row.patient), job.slide_id))
    return (job for job in ordered if job.part.exists())


def _record(
    row: TableRow, tile: CutTile, slide_id: str, salt: Salt, mpp: float | None
) -> TileRecord:
    return TileRecord(
        tile_id=salt.tile_id(slide_id, tile.x, tile.y),
        patient=salt.patient_id(row.patient),
        case=salt.case_id(row.patient, row.case),
        slide=slide_id,
        x=tile.x,
        y=tile.y,
        level0_width=tile.width,
        level0_height=tile.height,
        mpp=mpp,
        caption=row.caption,
        label=row.label,
        tissue_fraction=tile.tissue_fraction,
        sharpness=tile.sharpness,
    )


def _refuse_existing(out: Path) -> None:
    if out.exists():
        raise IngestError(f"{out} exists; choose another folder or remove it first")


def _refuse_missing_scale(rows: Sequence[TableRow]) -> None:
    """Look at every header first: a wrong guess of scale would spoil the whole store."""
    problems = []
    for row in rows:
        if row.mpp is None:
            # A slide that cannot be opened at all is skipped later, by name.
            with contextlib.suppress(SlideError):
                problem = _missing_scale(row)
                problems += [problem] if problem else []
    if problems:
        raise IngestError(*problems)


def _missing_scale(row: TableRow) -> str | None:
    try:
        with Slide.open(row.path):
            return None
    except MissingScaleError as error:
        return f"line {row.line}: {row.name}: {error}"


def _refuse_nothing(report: IngestReport) -> None:
    if report.num_tiles == 0:
        reasons = (f"line {s.line}: {s.file}: {s.skipped}" for s in report.skipped)
        raise IngestError("no tile is left to train on", *reasons)


@contextlib.contextmanager
def _disk_errors(out: Path) -> Iterator[None]:
    """One clear line for a full or failing disk; committed parts stay for the next run."""
    try:
        yield
    except OSError as error:
        raise IngestError(
            f"writing {out} failed: {error.strerror or error}; nothing finished is lost: mend it "
            "and run the same command again"
        ) from error
