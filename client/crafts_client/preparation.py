"""From a site's table to everything its trainer needs: tile store, report, latent cache."""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from crafts_client.home import SiteHome
from crafts_client.ingest.choices import Artefact, TissueMethod
from crafts_client.ingest.deidentify import Salt, plain_name
from crafts_client.ingest.errors import IngestError, Problem
from crafts_client.ingest.ingest import ingest_slides, ingest_tiles
from crafts_client.ingest.ingest_history import with_refusal, with_run
from crafts_client.ingest.ingest_page import PAGE_NAME, write_ingest_page
from crafts_client.ingest.listed_names import NOBODY, ListedNames
from crafts_client.ingest.patient_names import likeness
from crafts_client.ingest.report import IngestReport, IngestRun, NothingUsedError, SourceOutcome
from crafts_client.ingest.store_update import content_key
from crafts_client.ingest.table import TableRow, examine_table
from crafts_client.ingest.table_checks import look_alike
from crafts_client.ingest.table_shards import (
    ShardSettings,
    TableShard,
    check_nothing_waits,
    complete_shards,
    noted_shard,
    refuse_difference,
    settings_hash,
    shard_notes,
)
from crafts_client.ingest.tiling import TilingOptions
from crafts_client.register import PatientRegister
from crafts_core.durable import exclusive_lock, write_file
from crafts_core.foundation import Foundation, read_manifest
from crafts_core.progress import Progress
from crafts_core.tiles import TileStore, TileStoreError
from crafts_core.tiles.latents import LatentCache
from crafts_core.tiles.writer import MANIFEST_NAME, StoredSource

_REGISTER_S = 600.0
"""Shards of a table begin together, and each reads the whole register."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IngestOptions:
    """What the operator chose."""

    ready_tiles: bool
    max_tiles_per_slide: int | None
    tissue: TissueMethod
    keep: tuple[Artefact, ...]
    num_processes: int


def prepare_site(
    home: SiteHome,
    foundation: Foundation,
    *,
    table: Path,
    root: Path | None,
    options: IngestOptions,
    progress: Progress,
) -> IngestReport:
    """Ingest what is new in a table, and encode what is new in the store.

    Ready tiles are resampled whole to the foundation's size, their scale taken as it is, unless the
    table gives it: then each gives what the foundation's resolution needs of its middle. Slides of
    patients who withdrew are not read.

    Raises:
        IngestError: everything that is wrong with the table and its files, or with the disk.
        HomeError: the register of patients is not what was written.
        PolicyError: nobody here approved the foundation; no file is read.
    """
    home.foundation_approvals.check(foundation.manifest)
    with one_at_a_time(home):
        check_nothing_waits(home.tile_store_path)
        return _ingest(home, foundation, table, root, options, progress)


def prepare_shard(
    home: SiteHome,
    foundation: Foundation,
    shard: TableShard,
    *,
    table: Path,
    root: Path | None,
    options: IngestOptions,
    progress: Progress,
) -> IngestReport:
    """Cut the slides of one part of a table. They count, and are encoded, with ``join_shards``.

    Several may run at the same time, also on other machines that see this home. Interrupted, the
    same call goes on.

    Returns:
        What became of this part alone.

    Raises:
        IngestError: everything that is wrong with the table and its files; the shard is being cut
            elsewhere; others are of another number; or an ingest or forget is at work.
        HomeError: the register of patients is not what was written.
        PolicyError: nobody here approved the foundation; no file is read.
    """
    home.foundation_approvals.check(foundation.manifest)
    settings = _settings(home, foundation, table, root, options)
    with (
        one_at_a_time(home, is_shared=True),
        noted_shard(home.tile_store_path, shard, settings),
    ):
        former = former_report(home)
        return _cut(home, foundation, table, root, options, former, progress, shard)


def join_shards(
    home: SiteHome, foundation: Foundation, *, num_processes: int, progress: Progress
) -> IngestReport | None:
    """Make what all shards of a table have cut the store's content, and encode it.

    It is the ingest of the whole table, with the shards' options: so every table check is made
    again over all of it, and a tile that is missing is cut. Killed on the way, the same call goes
    on.

    Returns:
        As of the whole table; None where nothing waited to be joined.

    Raises:
        IngestError: shards are missing, not finished or being cut, or were cut with another table,
            salt or options than the others or this home has now; or as ``prepare_site``.
    """
    home.foundation_approvals.check(foundation.manifest)
    with one_at_a_time(home):
        notes = shard_notes(home.tile_store_path)
        if not notes:
            fill_cache(home, foundation, progress)
            return None
        asked = complete_shards(home.tile_store_path, notes)
        options = IngestOptions(
            ready_tiles=asked.ready_tiles,
            max_tiles_per_slide=asked.max_tiles_per_slide,
            tissue=asked.tissue,
            keep=asked.keep,
            num_processes=num_processes,
        )
        now = _settings(home, foundation, asked.table, asked.root, options)
        refuse_difference(notes[0], now, "than there is now")
        return _ingest(home, foundation, asked.table, asked.root, options, progress)


def _settings(
    home: SiteHome,
    foundation: Foundation,
    table: Path,
    root: Path | None,
    options: IngestOptions,
) -> ShardSettings:
    if not table.is_file():
        raise IngestError(f"no table at {table}")  # before a note of it keeps others waiting
    return ShardSettings(
        table=table.resolve(),
        table_hash=settings_hash(table),
        root=None if root is None else root.resolve(),
        salt=Salt.load(home.salt_path).key("shards of a table"),
        foundation=foundation.manifest.hash,
        cohort=home.config.cohort,
        names=settings_hash(home.names_path),
        ready_tiles=options.ready_tiles,
        max_tiles_per_slide=options.max_tiles_per_slide,
        tissue=options.tissue,
        keep=options.keep,
        version=version("crafts-federated"),
    )


def _ingest(
    home: SiteHome,
    foundation: Foundation,
    table: Path,
    root: Path | None,
    options: IngestOptions,
    progress: Progress,
) -> IngestReport:
    former = former_report(home)
    try:
        report = _cut(home, foundation, table, root, options, former, progress)
    except NothingUsedError as error:
        _note(home, former, error.report, table)
        error.point_to(home.path / PAGE_NAME)
        raise
    except IngestError as error:
        _note_refusal(home, former, error, table, "tiles" if options.ready_tiles else "slides")
        error.point_to(home.path / PAGE_NAME)
        raise
    _note(home, former, report, table)
    fill_cache(home, foundation, progress)
    return report


def _cut(
    home: SiteHome,
    foundation: Foundation,
    table: Path,
    root: Path | None,
    options: IngestOptions,
    former: IngestReport | None,
    progress: Progress,
    shard: TableShard | None = None,
) -> IngestReport:
    config, manifest, salt = home.config, foundation.manifest, Salt.load(home.salt_path)
    listed = ListedNames.read(home.names_path) if home.names_path.exists() else NOBODY
    reading = examine_table(table, root=root, cohort=config.cohort, listed=listed)
    rows = _with_unread(reading.rows, foundation)
    register = PatientRegister(home.register_path)
    problems = [
        *reading.problems,
        *_of_other_cohorts(rows, register, salt, config.cohort),
        *_look_like_others(home, rows, former, salt),
        *_look_withdrawn(rows, register.withdrawn, salt),
    ]
    has_scale = options.ready_tiles and any(row.mpp is not None for row in rows)
    if has_scale:
        told = "no mpp, but other lines have one; give it for all ready tiles, or for none"
        problems += [(row.line, told) for row in rows if row.mpp is None]
    if not problems:  # before any pixel is read: whoever is read can also be forgotten
        pseudonyms = (salt.patient_id(row.patient) for row in rows)
        register.enrol(
            (p for p in pseudonyms if shard is None or shard.has(p)),
            config.cohort,
            patience_s=_REGISTER_S,
        )
    if options.ready_tiles:
        return ingest_tiles(
            rows,
            home.tile_store_path,
            cohort=config.cohort,
            salt=salt,
            tile_px=manifest.tile_px,
            mpp=manifest.mpp if has_scale else None,
            num_processes=options.num_processes,
            withdrawn=register.withdrawn,
            former=former,
            problems=problems,
            progress=progress,
            shard=shard,
        )
    return ingest_slides(
        rows,
        home.tile_store_path,
        cohort=config.cohort,
        salt=salt,
        options=TilingOptions(
            tile_px=manifest.tile_px,
            mpp=manifest.mpp,
            tissue=options.tissue,
            max_tiles_per_slide=options.max_tiles_per_slide,
        ).keeping(options.keep),
        num_processes=options.num_processes,
        withdrawn=register.withdrawn,
        pictures=home.pictures_path,
        former=former,
        problems=problems,
        progress=progress,
        shard=shard,
    )


def _with_unread(rows: Sequence[TableRow], foundation: Foundation) -> tuple[TableRow, ...]:
    """The rows, with what of their captions will not steer anything."""
    captions = list(dict.fromkeys(row.caption for row in rows))
    tails = dict(zip(captions, _unread(captions, foundation), strict=True))
    return tuple(replace(row, unread=tails[row.caption]) for row in rows)


def _unread(captions: Sequence[str], foundation: Foundation) -> list[str]:
    """The end of each that steers nothing: all of one that the tokenizer cannot read."""
    try:
        return foundation.generator.unread(captions)
    except Exception:  # of some caption, by whatever a tokenizer may stumble over
        if len(captions) > 1:
            return [tail for each in captions for tail in _unread([each], foundation)]
        return list(captions)


def _of_other_cohorts(
    rows: Sequence[TableRow], register: PatientRegister, salt: Salt, cohort: str
) -> Iterator[Problem]:
    """Patients whose budget is another cohort's, by each of their lines."""
    cohorts = register.cohorts()
    for row in rows:
        other = cohorts.get(salt.patient_id(row.patient), cohort)
        if other != cohort:
            told = (
                f"patient {row.patient} belongs to cohort {other} of this home for life; take the "
                f'line out, or set cohort = "{other}" in site.toml and ingest again'
            )
            yield row.line, told


def _look_like_others(
    home: SiteHome, rows: Sequence[TableRow], former: IngestReport | None, salt: Salt
) -> Iterator[Problem]:
    """Patients of this table who may be those of another under a name that is written otherwise.

    A slide that this table lists, too, is no reason: it is this table's patient's from now on.
    """
    if former is None:
        return
    alike = defaultdict[str, list[SourceOutcome]](list)
    for source in former.sources:
        alike[likeness(source.patient)].append(source)
    stored, row_of = _stored(home), {row.name: row for row in rows}
    line_of = {row.patient: row.line for row in reversed(rows)}
    for patient, line in line_of.items():
        for source in alike[likeness(patient)]:
            if plain_name(source.patient) != plain_name(patient) and _stays(
                source, stored, row_of.get(source.file), salt
            ):
                yield line, look_alike(patient, f"{source.patient}, who is in the store")
                break


def _look_withdrawn(
    rows: Sequence[TableRow], withdrawn: Collection[str], salt: Salt
) -> Iterator[Problem]:
    """Patients who may have withdrawn under a name that is written otherwise."""
    for patient, line in {row.patient: row.line for row in reversed(rows)}.items():
        if salt.patient_id(patient) not in withdrawn and salt.alike_id(patient) in withdrawn:
            yield line, look_alike(patient, "one who withdrew, whose lines belong in no table")


def _stays(
    source: SourceOutcome, stored: Mapping[str, StoredSource], row: TableRow | None, salt: Salt
) -> bool:
    """Whether an earlier source's tiles stay, whatever a row of that name lists.

    Another folder has other files of the same names.
    """
    known = stored.get(salt.slide_id(source.patient, source.file))
    if known is None or row is None:
        return known is not None
    try:
        return content_key(row.path, salt) != known.content
    except OSError:  # told where the row is read
        return False


def keep_names(home: SiteHome, names: Path) -> None:
    """Take a list of names into the home, for this and every later ingest.

    Raises:
        IngestError: it is no such list.
    """
    ListedNames.read(names)
    write_file(home.names_path, names.read_bytes(), mode=0o600)


def fill_cache(home: SiteHome, foundation: Foundation, progress: Progress) -> None:
    """Compute latents and embeddings once; goes on where it was interrupted.

    What cannot be read or encoded is passed over (``num_unusable_tiles``) and tried again by the
    next call.

    Raises:
        PolicyError: nobody here approved the foundation.
    """
    home.foundation_approvals.check(foundation.manifest)
    store = TileStore.open(home.tile_store_path)
    LatentCache.build(
        store, foundation, views=home.config.views, progress=partial(progress, "latents")
    )


def num_unusable_tiles(home: SiteHome) -> int:
    """Tiles that count as zero, as they cannot be read or encoded. For the operator's eyes only."""
    store = TileStore.open(home.tile_store_path)
    return len(LatentCache.open(store, read_manifest(home.foundation_path).hash).unusable)


def one_at_a_time(home: SiteHome, *, is_shared: bool = False) -> AbstractContextManager[None]:
    """Nothing else changes what the home holds meanwhile.

    ``is_shared``: with others who cut another shard of a table.
    """
    held = IngestError(f"another ingest or forget is at work in {home.path}; wait for it")
    return exclusive_lock(home.path / "ingest.lock", held=held, is_shared=is_shared)


def _note(home: SiteHome, former: IngestReport | None, report: IngestReport, table: Path) -> None:
    """Write what is known after a run; also where nothing of its table could be used."""
    now, known = datetime.now(UTC), _is_in_store(home)
    write_report(home, with_run(former, report, table=table, at=now, is_in_store=known))


def _note_refusal(
    home: SiteHome,
    former: IngestReport | None,
    error: IngestError,
    table: Path,
    kind: Literal["slides", "tiles"],
) -> None:
    run = IngestRun(
        table=str(table.resolve()),
        at=datetime.now(UTC),
        kind=kind,
        num_problems=len(error.problems),
        problems=error.problems,
    )
    with suppress(OSError, TileStoreError):  # a full disk, a damaged store: the error says so
        write_report(home, with_refusal(former, run, is_in_store=_is_in_store(home)))


def _is_in_store(home: SiteHome) -> Callable[[SourceOutcome], bool]:
    salt, held = Salt.load(home.salt_path), _stored(home)
    return lambda source: salt.slide_id(source.patient, source.file) in held


def _stored(home: SiteHome) -> Mapping[str, StoredSource]:
    """The sources whose tiles are in the store, by pseudonym."""
    path = home.tile_store_path
    return TileStore.open(path).manifest.sources if (path / MANIFEST_NAME).exists() else {}


def former_report(home: SiteHome) -> IngestReport | None:
    """What ingest said so far, if it is there and of this version."""
    try:
        return IngestReport.model_validate_json(home.ingest_report_path.read_bytes())
    except (OSError, ValidationError):
        return None


def write_report(home: SiteHome, report: IngestReport) -> None:
    """The report, and the page of it that people read."""
    report.write(home.ingest_report_path)
    write_ingest_page(report, home.path)
