"""``crafts-client attack``: on a finished generator, and on every update that left this site."""

from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np

from crafts_client.attack_words import MEANING, verdict
from crafts_client.home import SiteHome
from crafts_client.outbox import REFUSED_RELEASE
from crafts_client.patients import PatientTiles
from crafts_client.register import PatientRegister
from crafts_client.seen_updates import SeenUpdates
from crafts_client.site_ledger import existing_ledger
from crafts_client.update_attack import attack_updates
from crafts_core.errors import CraftsError
from crafts_core.evaluation.leakage import Leakage, LeakageConfig, measure_leakage
from crafts_core.evaluation.real_tiles import RealTiles
from crafts_core.foundation import Foundation, load
from crafts_core.generator import Generator
from crafts_core.progress import Progress
from crafts_core.tiles import TileStore, TileStoreError
from crafts_core.tiles.latents import LatentCache
from crafts_privacy.ledger import EntryKind


class SiteLeakage(Leakage):
    """``leakage.json``: the generator's attacks, then that on the updates if there are any."""

    updates_seen: int
    """How many were attacked: those that are kept."""
    updates_left: int

    def lines(self) -> Iterator[str]:
        """For a person: each attack, and what all of them together mean."""
        for each in self.attacks:
            low, high = each.auc_interval
            found = f"area {each.auc:.2f} ({low:.2f} to {high:.2f})"
            yield f"{each.name}: {found}, p = {each.p_value:.2g}"
        yield f"updates: {self.updates_seen} of {self.updates_left} that left are kept here"
        copies = self.memorisation
        yield (
            f"images nearer to training tiles: {copies.share_nearer_members:.2f} "
            f"({copies.interval.low:.2f} to {copies.interval.high:.2f}), p = {copies.p_value:.2g}"
        )
        yield verdict([*(each.p_value for each in self.attacks), copies.p_value])
        yield MEANING


def attack_site(
    site: SiteHome,
    generator: Path,
    others: Path,
    config: LeakageConfig,
    progress: Progress | None = None,
) -> SiteLeakage:
    """Attack what others have of this site, with its own patients and with ``others``.

    Of patients who have withdrawn nothing is read.

    Raises:
        CraftsError: too few patients, or a store, a generator or a kept update cannot be read.
    """
    foundation = load(site.foundation_path, device=site.config.device)
    own, foreign = (TileStore.open(path) for path in (site.tile_store_path, others))
    withdrawn = PatientRegister(site.register_path).withdrawn
    left = _left(site)
    updates = tuple(SeenUpdates(site.seen_path).read(left))
    try:
        found = measure_leakage(
            Generator.from_directory(generator, device=site.config.device),
            foundation.generator,
            _tiles(own, without=withdrawn),
            _tiles(foreign),
            config,
            progress,
        )
        attacks = found.attacks
        if updates:
            ours, theirs = _patients(own, foundation), _patients(foreign, foundation)
            ours.leave_out(withdrawn)
            attacks = (
                *attacks,
                attack_updates(foundation, updates, ours, theirs, config, progress),
            )
    except ValueError as error:
        raise CraftsError(str(error)) from error
    values = dict(found) | {"attacks": attacks}
    return SiteLeakage(**values, updates_seen=len(updates), updates_left=len(left))


def _left(site: SiteHome) -> set[str]:
    """Hashes of what this cohort's ledger let out."""
    ledger = existing_ledger(site)
    entries = () if ledger is None else ledger.entries()
    return {
        entry.detail
        for entry in entries
        if entry.kind is EntryKind.COMMITTED
        and entry.cohort == site.config.cohort
        and entry.detail != REFUSED_RELEASE
        and entry.share is None  # a masked vector is no update: nobody can read it
    }


def _tiles(store: TileStore, *, without: Collection[str] = ()) -> RealTiles:
    rows = np.arange(store.num_tiles)
    gone = [place for place, patient in enumerate(store.patients) if patient in without]
    return RealTiles.read(store, rows[~np.isin(store.patient_indices(rows), gone)])


def _patients(store: TileStore, foundation: Foundation) -> PatientTiles:
    """With the cache that ingest made, or a new one."""
    try:
        cache = LatentCache.open(store, foundation.manifest.hash)
    except TileStoreError:
        cache = LatentCache.build(store, foundation)
    return PatientTiles(store, cache, foundation)
