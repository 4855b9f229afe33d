"""What is taken out of a site's tile store again: patients, slides, what is damaged."""

import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from crafts_client.home import SiteHome
from crafts_client.ingest.deidentify import Salt
from crafts_client.ingest.errors import IngestError
from crafts_client.ingest.ingest_page import PAGE_NAME
from crafts_client.ingest.named_files import composed
from crafts_client.ingest.pictures import OVERLAY_ENDING, picture_name
from crafts_client.ingest.report import IngestReport
from crafts_client.ingest.store_update import content_key, remove_patient, remove_slides
from crafts_client.ingest.table_shards import check_nothing_waits
from crafts_client.preparation import fill_cache, former_report, one_at_a_time, write_report
from crafts_client.register import PatientRegister
from crafts_core.foundation import Foundation, verify
from crafts_core.progress import Progress
from crafts_core.tiles import TileStore, TileStoreError, damaged_files
from crafts_core.tiles.cache_files import cache_folder, check_cache
from crafts_core.tiles.writer import MANIFEST_NAME, shard_path


def forget(home: SiteHome, patient: str, load: Callable[[], Foundation], progress: Progress) -> int:
    """Withdraw a patient and remove every trace but the pseudonym in the register; tiles removed.

    The ledger keeps what was spent. Killed on the way, the same call goes on.

    Args:
        home: Whose patient.
        patient: The name in the table of ingest.
        load: Gives the home's foundation, if something is left that it must encode.
        progress: Of the cache.

    Raises:
        HomeError: nobody of this name was ever here.
        IngestError: an ingest is at work.
    """
    with one_at_a_time(home):
        return _forget(home, patient, load, progress)


def _forget(
    home: SiteHome, patient: str, load: Callable[[], Foundation], progress: Progress
) -> int:
    salt, path = Salt.load(home.salt_path), home.tile_store_path
    pseudonym = salt.patient_id(patient)
    register = PatientRegister(home.register_path)
    if (path / MANIFEST_NAME).exists():
        register.enrol(TileStore.open(path).patients, home.config.cohort)
    register.withdraw(pseudonym, alike=salt.alike_id(patient))
    num_tiles = remove_patient(path, pseudonym) if path.exists() else 0
    report = former_report(home)
    _sweep(home, None if report is None else report.without_patient(patient), load, progress)
    return num_tiles


@dataclass(frozen=True, slots=True, kw_only=True)
class Dropped:
    """What went with a slide."""

    num_tiles: int
    others: tuple[str, ...]
    """Ready tiles that lay in a shard with it: the next ingest brings them back."""


def num_tiles_of(home: SiteHome, file: Path) -> int:
    """How many tiles of one slide, or ready tile, are in the store.

    Raises:
        IngestError: the store has no such slide.
    """
    store = TileStore.open(home.tile_store_path)
    slide = _slide_of(file, store, Salt.load(home.salt_path), former_report(home))
    return sum(each == slide for each in store.index["slide"].to_pylist())


def drop(home: SiteHome, file: Path, load: Callable[[], Foundation], progress: Progress) -> Dropped:
    """Remove one slide, or ready tile, with its latents, pictures and report lines.

    The patient stays known, and a table that still lists the slide brings it back.

    Args:
        home: Whose slide.
        file: The slide's file or folder, whatever it is called now; or its name in the table.
        load: Gives the home's foundation, if something is left that it must encode.
        progress: Of the cache.

    Raises:
        IngestError: the store has no such slide, or an ingest is at work.
    """
    with one_at_a_time(home):
        check_nothing_waits(home.tile_store_path)
        path, salt, report = home.tile_store_path, Salt.load(home.salt_path), former_report(home)
        store = TileStore.open(path)
        slide = _slide_of(file, store, salt, report)
        gone = remove_slides(path, [slide])
        names = _names(gone, report, salt)
        if report is not None:
            report = report.without(lambda s: salt.slide_id(s.patient, s.file) in gone)
        _sweep(home, report, load, progress)
        return Dropped(
            num_tiles=store.num_tiles - _num_tiles(home),
            others=tuple(sorted(names[name] for name in gone - {slide})),
        )


def _slide_of(file: Path, store: TileStore, salt: Salt, report: IngestReport | None) -> str:
    """The slide that a file is, by its content, or that was listed under this name."""
    sources = store.manifest.sources
    if file.exists():
        try:
            content = content_key(file, salt)
        except OSError as error:
            raise IngestError(f"{file} cannot be read: {error.strerror}") from error
        found = {slide for slide, known in sources.items() if known.content == content}
    else:
        told = report.sources if report is not None else ()
        found = {
            salt.slide_id(s.patient, s.file)
            for s in told
            if composed(s.file) == composed(str(file))
        }
        found &= sources.keys()
    if len(found) != 1:
        what = "several slides" if found else "no slide"
        raise IngestError(
            f"{file}: {what} in the store came from it; name the file itself, or, where it is "
            "gone, its name in the table of ingest"
        )
    return found.pop()


@dataclass(frozen=True, slots=True, kw_only=True)
class Repaired:
    """What a repair took out, for the next ingest to make again."""

    damaged: tuple[str, ...]
    """Files of the store that were not what was written."""
    num_tiles: int
    slides: tuple[str, ...]
    """What they were called when they were ingested."""
    has_latents: bool
    """Whether the latent cache was as it was written."""


def repair(home: SiteHome) -> Repaired:
    """Take out of the store what is damaged; the next ingest makes it again, the same to the byte.

    Where the index itself is damaged, nothing is known of any tile, and all are made again.

    Raises:
        TileStoreError: there is no store.
        IngestError: an ingest is at work, or the store was not made by one.
    """
    with one_at_a_time(home):
        check_nothing_waits(home.tile_store_path)
        path, report, salt = home.tile_store_path, former_report(home), Salt.load(home.salt_path)
        damaged = damaged_files(path)
        if any("/" not in name for name in damaged):  # index or captions
            (path / MANIFEST_NAME).unlink()
            return Repaired(damaged=damaged, num_tiles=0, slides=(), has_latents=True)
        store = TileStore.open(path, without=damaged)
        has_latents = _check_latents(home, store)
        if not damaged:
            return Repaired(damaged=(), num_tiles=0, slides=(), has_latents=has_latents)
        is_hit = [shard_path(shard) in damaged for shard in store.index["shard"].to_pylist()]
        slides = set(store.index.filter(pa.array(is_hit))["slide"].to_pylist())
        gone = remove_slides(path, slides, damaged=damaged)
        names = _names(gone, report, salt)
        return Repaired(
            damaged=damaged,
            num_tiles=store.num_tiles - _num_tiles(home),
            slides=tuple(sorted(names[slide] for slide in gone)),
            has_latents=has_latents,
        )


def _check_latents(home: SiteHome, store: TileStore) -> bool:
    """Whether the cache is whole; one that is not is removed, which costs time and nothing else."""
    foundation = verify(home.foundation_path).hash
    try:
        check_cache(store, foundation)
    except TileStoreError:
        shutil.rmtree(cache_folder(store, foundation), ignore_errors=True)
        return False
    return True


def _names(slides: Collection[str], report: IngestReport | None, salt: Salt) -> dict[str, str]:
    """What slides were called in their table; the pseudonym of one that no report knows."""
    told = report.sources if report is not None else ()
    known = {salt.slide_id(source.patient, source.file): source.file for source in told}
    return {slide: known.get(slide, slide) for slide in slides}


def _num_tiles(home: SiteHome) -> int:
    path = home.tile_store_path
    return TileStore.open(path).num_tiles if path.exists() else 0


def _sweep(
    home: SiteHome,
    report: IngestReport | None,
    load: Callable[[], Foundation],
    progress: Progress,
) -> None:
    """After tiles went: report, pictures and latents without whatever was theirs."""
    path = home.tile_store_path
    if report is not None:
        write_report(home, report)
    else:  # what cannot be read any more may name whoever went
        for told in (home.ingest_report_path, home.path / PAGE_NAME):
            told.unlink(missing_ok=True)
    store = TileStore.open(path) if path.exists() else None
    _sweep_pictures(home, report, store)
    if store is not None:
        foundation = load()
        fill_cache(home, foundation, progress)
        current = cache_folder(store, foundation.manifest.hash)
        for folder in (path / "latents").iterdir():
            if folder != current:
                shutil.rmtree(folder)


def _sweep_pictures(home: SiteHome, report: IngestReport | None, store: TileStore | None) -> None:
    """Remove the pictures of slides that neither the report nor the store names."""
    kept = {source.picture for source in report.sources} if report is not None else set()
    slides = store.manifest.sources if store is not None else ()
    kept |= {picture_name(slide) for slide in slides}
    for path in home.pictures_path.glob("*.jpg"):
        if path.stem.removesuffix(OVERLAY_ENDING) not in kept:
            path.unlink()
    for path in home.pictures_path.glob(".*.jpg.writing"):  # a kill or a full disk left it
        path.unlink()
