"""The public pool of a simulated study, and what came of it.

A simulation has everybody's tiles in one place, so it can see what no federation can: whether the
pool holds tiles of a hospital or of the test set. Then every figure would be about nothing.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from crafts_client.home import SiteHome
from crafts_core.adapters import merged_denoiser
from crafts_core.evaluation.baselines import PublicPart
from crafts_core.evaluation.encoder import Images
from crafts_core.evaluation.real_tiles import OverlapError
from crafts_core.foundation_manifest import FoundationManifest
from crafts_core.progress import Progress
from crafts_core.public_pool import PublicPool, open_pool, read_pool
from crafts_core.retrieval import picked_tiles
from crafts_core.study.lookalikes import alike_to, thumbnails_of
from crafts_core.tiles import TileStore
from crafts_server.checkpoints import Checkpoint
from crafts_server.export import retrieval_of
from crafts_server.home import CoordinatorHome
from crafts_simulations.sites import heldout_store
from crafts_simulations.study import LocalStudy


def kept_pool(
    home: CoordinatorHome, table: Path, manifest: FoundationManifest, progress: Progress
) -> PublicPool:
    """The pool in a run's home, made of its table at first. A run is of one table.

    Raises:
        PoolError: the table cannot be read, or what was made of it was altered.
    """
    made = [path.name for path in home.pools.glob("*")]
    if made:
        return open_pool(home.pools, made[0])
    pool = read_pool(table, tile_px=manifest.tile_px, mpp=manifest.mpp, progress=progress)
    pool.keep(home.pools)
    return pool


def refuse_known_tiles(study: LocalStudy, pool: PublicPool) -> None:
    """Refuse a pool with tiles of a hospital or of the test set, also recoloured or turned.

    Not seen are other cuts of the same slide: keep patients apart when the table is made.

    Raises:
        OverlapError: names an image of the pool.
    """
    homes = [SiteHome.open(study.workspace.site(name)) for name in study.scenario.site_names]
    stores = [TileStore.open(home.tile_store_path) for home in homes]
    seen = thumbnails_of(pool.images_NHWC)
    for store in [*stores, heldout_store(study.workspace)]:
        private: Images = store.read_images(np.arange(store.num_tiles))
        alike = alike_to(seen, thumbnails_of(private))
        if len(alike):
            image = pool.sources[pool.source_N[alike[0]]]
            raise OverlapError(
                f"{len(alike)} tiles of the pool are also a hospital's or in the test set, the "
                f"first of {image.file}; take these images out of the table"
            )


def public_part(
    study: LocalStudy, chain: Sequence[Checkpoint], pool: PublicPool
) -> PublicPart | None:
    """What was picked, and what the generator was before any hospital trained it."""
    retrieval, first = retrieval_of(chain), study.plan.num_first_rounds
    if retrieval is None or not retrieval.num_tiles:
        return None
    foundation, state = study.foundation.generator, chain[first].state()
    denoiser = merged_denoiser(foundation.denoiser, study.plan.adapter, state)
    return PublicPart(
        picked=picked_tiles(pool, retrieval), generator=replace(foundation, denoiser=denoiser)
    )
