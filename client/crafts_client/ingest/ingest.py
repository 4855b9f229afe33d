"""From a site's table to its tile store. Nothing but pseudonyms and pixels goes in.

A store is made and added to in place: shards grow below ``shards/`` while journals in ``work/`` say
how far they have come, and one rename makes the result count. So the same command goes on with what
an interrupted one left, does nothing where everything is there, and cuts only what is new.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path

from crafts_client.ingest.cutting import CutJob, check_damage, cut_jobs, cut_stretch
from crafts_client.ingest.deidentify import Salt
from crafts_client.ingest.errors import IngestError, Problem, SlideError
from crafts_client.ingest.pool import SILENCE_S, Beat, Pool
from crafts_client.ingest.ready_tiles import (
    GroupJob,
    audit_group,
    condition_problems,
    cut_group,
)
from crafts_client.ingest.report import IngestReport, SourceFacts
from crafts_client.ingest.shard_cut import WORK, Shard
from crafts_client.ingest.source_audit import UNSEEN
from crafts_client.ingest.store_update import Source, StoreUpdate, Target, open_update
from crafts_client.ingest.survey import SlideJob, Survey, draw_slide, missing_scale, survey_slide
from crafts_client.ingest.table import TableRow
from crafts_client.ingest.table_shards import TableShard
from crafts_client.ingest.tiling import TilingOptions
from crafts_core.progress import Progress, silent


def ingest_slides(
    rows: Sequence[TableRow],
    out: Path,
    *,
    cohort: str,
    salt: Salt,
    options: TilingOptions,
    num_processes: int = 2,
    withdrawn: Collection[str] = (),
    pictures: Path | None = None,
    former: IngestReport | None = None,
    problems: Sequence[Problem] = (),
    progress: Progress = silent,
    silence_s: float = SILENCE_S,
    shard: TableShard | None = None,
) -> IngestReport:
    """Cut every slide of a table into tiles, as the store at ``out`` or into it.

    A slide that cannot be used is skipped and named in the report; what was cut from it before
    stays. Interrupted, the same call goes on with the tiles that are left, and the store ends up
    the same to the byte.

    Args:
        rows: From ``read_table``.
        out: Folder of the store; one that is there gets what is new in the table.
        cohort: The name under which these patients are accounted for.
        salt: The site's key for pseudonyms.
        options: What a tile is.
        num_processes: 0 runs everything in this process, where a damaged file may end it.
        withdrawn: Pseudonyms of patients whose slides are not read.
        pictures: Folder for a thumbnail and an overlay of each slide; none are drawn if absent.
        former: What was said of slides that are in the store already.
        problems: What is known to be wrong with the table. It is told together with what is wrong
            with its slides, instead of cutting any.
        progress: Called with the step, what is done of it and what there is.
        silence_s: A slide that nothing is heard of for so long is skipped.
        shard: Cut only the slides of this part of the table, and leave it to a later call without
            one to make them count. Calls for different shards may run at the same time.

    Raises:
        IngestError: there are problems, a slide has no scale, cannot be read or is another's copy,
            or has an image over the whole of it, which is not read (everything is named at once);
            or no slide gave a tile, the store is of other tiles, another ingest is at work, or the
            disk refuses.
    """
    target = Target(
        store=out,
        cohort=cohort,
        salt=salt,
        tile_px=options.tile_px,
        mpp=options.mpp,
        withdrawn=withdrawn,
    )
    problems = [*problems, *_conditions_of_slides(rows)]
    rows = _of_shard(rows, shard, salt)
    with (
        _also_told(problems),
        open_update(target, former, is_shared=shard is not None) as update,
        Pool(num_processes, silence_s=silence_s) as pool,
    ):
        listed, wrong = _sources(rows, salt, lambda _: asdict(options))
        wrong += _duplicates(listed, "slide")
        sources = update.new(listed)
        jobs = [_slide_job(source, target, options, pictures) for source in _largest_first(sources)]
        _refuse_what_is_wrong(pool, jobs, [*problems, *wrong], progress)
        surveys = _survey(pool, jobs, progress)
        _cut(pool, jobs, surveys, update, target, progress)
        return update.commit("slides", rows) if shard is None else update.report("slides")


def ingest_tiles(
    rows: Sequence[TableRow],
    out: Path,
    *,
    cohort: str,
    salt: Salt,
    tile_px: int,
    mpp: float | None = None,
    source_mpp: float | None = None,
    num_processes: int = 2,
    withdrawn: Collection[str] = (),
    former: IngestReport | None = None,
    problems: Sequence[Problem] = (),
    progress: Progress = silent,
    shard: TableShard | None = None,
) -> IngestReport:
    """Take ready tiles, one image file each, as the store at ``out`` or into it.

    ``mpp`` is what a pixel of the store measures. An image whose own resolution is known (the
    table's ``mpp``, else ``source_mpp``) gives its central ``tile_px * mpp`` microns; any other
    image is resampled whole (its central square). An unreadable or too small image is skipped and
    named in the report. What lies over a tile (``TableRow.conditions``) is taken along. Everything
    else is as in ``ingest_slides``.

    Raises:
        IngestError: there are problems, files that cannot be read or images over tiles that do not
            fit them (everything is named at once); or no image could be used, the store is of other
            tiles, another ingest is at work, or the disk refuses.
    """
    target = Target(
        store=out, cohort=cohort, salt=salt, tile_px=tile_px, mpp=mpp, withdrawn=withdrawn
    )
    rows = _of_shard(rows, shard, salt)
    with (
        _also_told(problems),
        open_update(target, former, is_shared=shard is not None) as update,
        Pool(num_processes) as pool,
    ):
        sides = {row.name: _side_px(row.mpp or source_mpp, mpp, tile_px) for row in rows}
        listed, wrong = _sources(rows, salt, lambda row: [tile_px, sides[row.name]])
        # The same image twice of one patient is common; of two it breaks what each is promised.
        wrong += _duplicates(listed, "image", of_two_patients=True)
        sources = update.new(listed)
        wrong += _wrong_conditions(pool, sources, progress)
        if problems or wrong:
            raise IngestError.at_lines([*problems, *wrong])
        groups = _by_patient(sources)
        jobs = [_group_job(group, target, sides) for group in groups]
        identifiers = _identifiers(pool, groups, progress)
        on_beat = _counting(progress, "reading tiles", len(sources))
        for place, cut in pool.run(cut_group, jobs, on_beat=on_beat):
            _take_group(groups[place], cut, update, identifiers)
        return update.commit("tiles", rows) if shard is None else update.report("tiles")


def _of_shard(rows: Sequence[TableRow], shard: TableShard | None, salt: Salt) -> Sequence[TableRow]:
    if shard is None:
        return rows
    return [row for row in rows if shard.has(salt.patient_id(row.patient))]


# ---- what is wrong before anything is cut ---------------------------------------------------


@contextmanager
def _also_told(problems: Sequence[Problem]) -> Iterator[None]:
    """Where the store itself is refused, the table's problems are told as well, not next time."""
    try:
        yield
    except IngestError as error:
        known = [f"line {line}: {told}" for line, told in problems]
        if set(known) <= set(error.problems):
            raise
        raise IngestError(*error.problems, *known) from error


def _sources(
    rows: Sequence[TableRow], salt: Salt, how: Callable[[TableRow], object]
) -> tuple[list[Source], list[Problem]]:
    """What each row stands for, and which files cannot be read at all."""
    sources, problems = list[Source](), list[Problem]()
    for row in rows:
        try:
            sources.append(Source.of(row, salt, how(row)))
        except SlideError as error:
            problems.append((row.line, f"{row.name} {error}"))
    return sources, problems


def _duplicates(
    sources: Sequence[Source], what: str, *, of_two_patients: bool = False
) -> Iterator[Problem]:
    """One slide under two names would count twice, or for two patients."""
    first: dict[str, Source] = {}
    for source in sources:
        before = first.setdefault(source.content, source)
        if before.row.target == source.row.target:
            continue
        if not of_two_patients or before.row.patient != source.row.patient:
            told = f"{source.row.name} is the same {what} as {before.row.name} on line"
            yield source.row.line, f"{told} {before.row.line}"


def _refuse_what_is_wrong(
    pool: Pool, jobs: Sequence[SlideJob], problems: Sequence[Problem], progress: Progress
) -> None:
    """Look at headers first: a wrong guess of scale would spoil the whole store.

    A slide that cannot be opened is no reason to refuse the others; but where the table must be
    mended, such slides are named, too, whether or not the table gives their scale. One that was
    looked at before has a scale.
    """
    unknown, known = list[TableRow](), list[TableRow]()
    for job in (job for job in jobs if not job.survey.exists()):
        (unknown if job.source.row.mpp is None else known).append(job.source.row)
    wrong, damaged = _look_at_headers(pool, unknown, progress)
    wrong += problems
    if wrong:
        _, more_damaged = _look_at_headers(pool, known, progress)
        raise IngestError.at_lines([*wrong, *damaged, *more_damaged])


def _conditions_of_slides(rows: Sequence[TableRow]) -> list[Problem]:
    return [
        (
            row.line,
            f"{modality} images of whole slides are not read; cut tiles first and use "
            "--ready-tiles, or remove the column",
        )
        for row in rows
        for modality in row.conditions
    ]


def _look_at_headers(
    pool: Pool, rows: Sequence[TableRow], progress: Progress
) -> tuple[list[Problem], list[Problem]]:
    """Slides without a scale, and those that cannot be opened."""
    wrong, damaged = list[Problem](), list[Problem]()
    on_beat = _counting(progress, "reading headers", len(rows))
    for place, found in pool.run(missing_scale, rows, on_beat=on_beat):
        row = rows[place]
        if isinstance(found, SlideError):
            damaged.append((row.line, f"{row.name} would be skipped: {found}"))
        elif found is not None:
            wrong.append((row.line, f"{row.name}: {found}"))
    return wrong, damaged


# ---- slides ---------------------------------------------------------------------------------


def _slide_job(
    source: Source, target: Target, options: TilingOptions, pictures: Path | None
) -> SlideJob:
    survey = target.store / WORK / f"{source.key[:32]}.npz"
    return SlideJob(source=source, survey=survey, options=options, pictures=pictures)


def _largest_first(sources: Iterable[Source]) -> list[Source]:
    """So that the last process to end does not work on a large slide alone."""
    return sorted(sources, key=lambda source: -source.row.path.stat().st_size)


def _survey(
    pool: Pool, jobs: Sequence[SlideJob], progress: Progress
) -> dict[int, Survey | SlideError]:
    on_beat = _counting(progress, "finding tissue", len(jobs))
    return dict(pool.run(survey_slide, jobs, on_beat=on_beat))


@dataclass(slots=True, kw_only=True)
class _Whole:
    """A slide of which stretches are being cut."""

    job: SlideJob
    survey: Survey
    num_missing: int
    shards: dict[int, Shard] = field(default_factory=dict)
    """By the first place of the stretch."""
    problem: str | None = None


def _cut(
    pool: Pool,
    jobs: Sequence[SlideJob],
    surveys: dict[int, Survey | SlideError],
    update: StoreUpdate,
    target: Target,
    progress: Progress,
) -> None:
    stretches: list[tuple[CutJob, _Whole]] = []
    drawings: list[tuple[SlideJob, tuple[int, ...]]] = []
    for place, job in enumerate(jobs):
        survey = surveys[place]
        if isinstance(survey, SlideError):
            update.skip(job.source, str(survey))
            continue
        cuts = cut_jobs(job, survey, target.store, target.salt)
        whole = _Whole(job=job, survey=survey, num_missing=len(cuts))
        stretches += [(cut, whole) for cut in cuts]
        if not cuts:
            update.done(job.source, 0, survey.rejected, **survey.facts)
            drawings.append((job, ()))
    on_beat = _counting(
        progress, "cutting tiles", sum(cut.stop - cut.start for cut, _ in stretches)
    )
    cuts = [cut for cut, _ in stretches]
    for number, shard in pool.run(cut_stretch, cuts, on_beat=on_beat):
        cut, whole = stretches[number]
        whole.num_missing -= 1
        if isinstance(shard, SlideError):
            whole.problem = str(shard)
        else:
            whole.shards[cut.start] = shard
        if whole.num_missing == 0:
            drawings.append((whole.job, _take_slide(whole, update)))
            whole.shards.clear()  # what is needed of them is in the update, in a tenth of the room
    drawings = [drawing for drawing in drawings if not drawing[0].is_drawn]
    if drawings and drawings[0][0].pictures is not None:
        on_beat = _counting(progress, "drawing pictures", len(drawings))
        for _ in pool.run(draw_slide, drawings, on_beat=on_beat):
            pass


def _take_slide(whole: _Whole, update: StoreUpdate) -> tuple[int, ...]:
    """Everything of one slide, or nothing of it; which of its places gave a tile."""
    source, survey = whole.job.source, whole.survey
    rejected = Counter(survey.rejected)
    for shard in whole.shards.values():
        rejected.update(reason for _, reason in shard.rejected)
    try:
        check_damage(rejected["unreadable"], len(survey.places_N5))
    except SlideError as error:
        whole.problem = str(error)
    if whole.problem is not None:
        update.skip(source, whole.problem, **survey.facts)
        return ()
    for shard in whole.shards.values():
        update.add(source, shard, shard.tiles)
    tiles = [(start, tile) for start, shard in whole.shards.items() for tile in shard.tiles]
    facts = SourceFacts(**survey.facts, copied=sum(tile.is_copy for _, tile in tiles))
    update.done(source, len(tiles), rejected, **facts)
    return tuple(start + tile.place for start, tile in tiles)


# ---- ready tiles ----------------------------------------------------------------------------


def _wrong_conditions(pool: Pool, sources: Sequence[Source], progress: Progress) -> list[Problem]:
    """Look at every header first: a mask over the wrong tile would steer wrongly, unseen."""
    rows = [source.row for source in sources if source.row.conditions]
    on_beat = _counting(progress, "reading headers", len(rows))
    problems: list[Problem] = []
    for place, found in pool.run(condition_problems, rows, on_beat=on_beat):
        if isinstance(found, SlideError):
            found = [(rows[place].line, str(found))]
        problems += found
    return problems


def _by_patient(sources: Iterable[Source]) -> list[list[Source]]:
    def patient(source: Source) -> str:
        return source.row.patient

    ordered = sorted(sources, key=lambda source: (patient(source), source.slide_id))
    return [list(group) for _, group in groupby(ordered, patient)]


def _group_job(group: Sequence[Source], target: Target, sides: dict[str, float | None]) -> GroupJob:
    key = target.salt.key(*(source.key for source in group))
    return GroupJob(
        paths=tuple(source.row.path for source in group),
        conditions=tuple(source.row.conditions for source in group),
        slide_ids=tuple(source.slide_id for source in group),
        side_px=tuple(sides[source.row.name] for source in group),
        tile_px=target.tile_px,
        store=target.store,
        salt=target.salt,
        shard=key[:32],
        key=key,
    )


def _identifiers(
    pool: Pool, groups: Sequence[Sequence[Source]], progress: Progress
) -> dict[str, tuple[str, ...]]:
    """By slide: what its file carries beside the picture.

    Looked at anew in every run, so that an interrupted one loses nothing of it.
    """
    found: dict[str, tuple[str, ...]] = {}
    jobs = [[source.row for source in group] for group in groups]
    on_beat = _counting(progress, "looking for identifiers", sum(map(len, jobs)))
    for place, kinds in pool.run(audit_group, jobs, on_beat=on_beat):
        seen = [(UNSEEN,)] * len(groups[place]) if isinstance(kinds, SlideError) else kinds
        found |= {source.slide_id: k for source, k in zip(groups[place], seen, strict=True)}
    return found


def _take_group(
    group: Sequence[Source],
    shard: Shard | SlideError,
    update: StoreUpdate,
    identifiers: Mapping[str, tuple[str, ...]],
) -> None:
    facts = [SourceFacts(identifiers=identifiers[source.slide_id]) for source in group]
    if isinstance(shard, SlideError):
        for source, known in zip(group, facts, strict=True):
            update.skip(source, f"one of this patient's images: {shard}", **known)
        return
    for tile in shard.tiles:
        update.add(group[tile.place], shard, [tile])
        update.done(group[tile.place], 1, {}, **facts[tile.place])
    for place, reason in shard.rejected:
        update.skip(group[place], reason, **facts[place])


def _side_px(image_mpp: float | None, store_mpp: float | None, tile_px: int) -> float | None:
    """Pixels of an image that one tile of the store covers; None where either is unknown."""
    if image_mpp is None or store_mpp is None:
        return None
    return tile_px * store_mpp / image_mpp


def _counting(progress: Progress, step: str, total: int) -> Beat:
    done = 0

    def on_beat(places: int) -> None:
        nonlocal done
        # A shard that is tried a second time is counted from where it was.
        done = min(done + places, total)
        progress(step, done, total)

    return on_beat
