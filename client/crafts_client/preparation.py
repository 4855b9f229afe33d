"""From a site's table to everything its trainer needs: tile store, report, latent cache."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from crafts_client.home import SiteHome
from crafts_client.ingest import (
    IngestReport,
    Salt,
    TilingOptions,
    ingest_slides,
    ingest_tiles,
    read_table,
)
from crafts_core.foundation import Foundation
from crafts_core.tiles import TileStore
from crafts_core.tiles.latents import LatentCache

StepProgress = Callable[[str, int, int], None]
"""Name of the step, done, in all."""


def prepare_site(
    home: SiteHome,
    foundation: Foundation,
    *,
    table: Path,
    root: Path | None,
    ready_tiles: bool,
    max_tiles_per_slide: int | None,
    num_processes: int,
    progress: StepProgress,
) -> IngestReport:
    """Ingest a table at a site whose store does not exist yet.

    Ready tiles are resampled whole to the foundation's size; their scale is taken as it is.

    Raises:
        IngestError: everything that is wrong with the table, or the disk.
    """
    rows = read_table(table, root=root)
    manifest, salt = foundation.manifest, Salt.load(home.salt_path)
    if ready_tiles:
        report = ingest_tiles(
            rows,
            home.tile_store_path,
            cohort=home.config.cohort,
            salt=salt,
            tile_px=manifest.tile_px,
            num_processes=num_processes,
            progress=progress,
        )
    else:
        report = ingest_slides(
            rows,
            home.tile_store_path,
            cohort=home.config.cohort,
            salt=salt,
            options=TilingOptions(
                tile_px=manifest.tile_px,
                mpp=manifest.mpp,
                max_tiles_per_slide=max_tiles_per_slide,
            ),
            num_processes=num_processes,
            progress=progress,
        )
    report.write(home.ingest_report_path)
    fill_cache(home, foundation, progress)
    return report


def fill_cache(home: SiteHome, foundation: Foundation, progress: StepProgress) -> None:
    """Compute latents and embeddings once; goes on where it was interrupted."""
    store = TileStore.open(home.tile_store_path)
    LatentCache.build(
        store, foundation, views=home.config.views, progress=partial(progress, "latents")
    )
