"""Making the hospitals of a scenario: slides or tiles as files, homes, tile stores, test set.

Whatever a site holds it got through the same ``crafts_client`` code as any hospital's data. Every
function leaves what is finished alone, so that an interrupted run goes on.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from crafts_client.home import SITE_NAME, SiteConfig, SiteHome
from crafts_client.ingest.deidentify import Salt
from crafts_client.ingest.errors import IngestError, Problem
from crafts_client.ingest.ingest import ingest_slides, ingest_tiles
from crafts_client.ingest.report import IngestReport
from crafts_client.ingest.table import TableColumns, TableRow, read_table
from crafts_client.ingest.tiling import TilingOptions
from crafts_client.policy import Policy
from crafts_client.preparation import fill_cache
from crafts_core.fields import describe_first_error
from crafts_core.foundation_manifest import sha256_of
from crafts_core.plan import Plan
from crafts_core.progress import Progress
from crafts_core.tiles import TileStore
from crafts_core.tiles.writer import MANIFEST_NAME
from crafts_simulations.errors import ScenarioError
from crafts_simulations.hospital import make_hospital, round_size
from crafts_simulations.repeatable import write_salt
from crafts_simulations.study import LocalStudy
from crafts_simulations.tile_split import deal
from crafts_simulations.workspace import Workspace

COHORT = "main"
_MICROBATCH_TILES = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class TileSource:
    """A folder of real tiles and the table that labels them."""

    folder: Path
    labels: Path
    columns: TableColumns

    def rows(self) -> tuple[TableRow, ...]:
        """Read the table; file names start from the folder or from the table's own place.

        Raises:
            IngestError: everything that is wrong with it.
        """
        try:
            return read_table(self.labels, root=self.folder, columns=self.columns)
        except IngestError as error:
            if self.labels.parent.resolve() == self.folder.resolve():
                raise
            from_folder = error
        try:
            return read_table(self.labels, columns=self.columns)
        except IngestError as error:
            # Where names do not start, every file is missing, and hides what is wrong.
            raise min(from_folder, error, key=lambda each: len(each.problems)) from None

    def fingerprint(self) -> str:
        """Changes with the table, and with the size or date of any file under the folder.

        Raises:
            OSError: the table or the folder cannot be read.
        """
        found = hashlib.sha256(self.labels.read_bytes())
        for path in sorted(path for path in self.folder.rglob("*") if path.is_file()):
            entry = path.stat()
            name = path.relative_to(self.folder).as_posix()
            found.update(f"{name}\0{entry.st_size}\0{entry.st_mtime_ns}\0".encode())
        return found.hexdigest()


def make_sites(study: LocalStudy, source: TileSource | None) -> None:
    """Make every hospital and the test set, as far as they are not made yet.

    Raises:
        CraftsError: what is missing, damaged or impossible.
    """
    if source is None:
        _make_synthetic(study)
    else:
        _make_from_tiles(study, source)


def _make_synthetic(study: LocalStudy) -> None:
    heldout_rows: list[TableRow] = []
    holdings = study.scenario.scenario.holdings
    for site in study.scenario.site:
        name = site.name
        folder = study.workspace.hospital(name)
        table = make_hospital(
            folder,
            site.hospital(holdings),
            num_processes=study.num_workers,
            progress=partial(study.progress, f"{name}: drawing slides"),
        )
        home = _home(study, name, site.declared_patients, site.policy)
        _ingest(study, read_table(table), home.tile_store_path, home.salt_path, name)
        fill_cache(home, study.foundation, _named(study.progress, name))
        test_table = make_hospital(
            study.workspace.hospital(f"{name}-heldout"),
            site.heldout_hospital(holdings),
            num_processes=study.num_workers,
            progress=partial(study.progress, f"{name}: drawing held-out slides"),
        )
        heldout_rows += read_table(test_table)
    store, salt = _new_heldout_paths(study)
    _ingest(study, heldout_rows, store, salt, "held-out")


def _make_from_tiles(study: LocalStudy, source: TileSource) -> None:
    split = study.scenario.tiles
    assert split is not None
    rows = source.rows()
    if not (_heldout_path(study.workspace) / MANIFEST_NAME).exists():
        refuse_shared_tiles(rows)
    dealt = deal(rows, study.scenario.site_names, split)
    for name, rows in dealt.sites.items():
        num_patients = len({row.patient for row in rows})
        home = _home(study, name, round_size(num_patients), {})
        _ingest_tiles(study, rows, home.tile_store_path, home.salt_path, name)
        fill_cache(home, study.foundation, _named(study.progress, name))
    store, salt = _new_heldout_paths(study)
    _ingest_tiles(study, dealt.heldout, store, salt, "held-out")


def refuse_shared_tiles(rows: Sequence[TableRow]) -> None:
    """No image is two patients': they may come to two sites, or one of them to the test set.

    Raises:
        IngestError: names all that are.
    """
    first: dict[str, TableRow] = {}
    problems: list[Problem] = []
    for row in rows:
        before = first.setdefault(sha256_of(row.path), row)
        if before.patient != row.patient:
            told = f"{row.name} is the same image as {before.name} on line {before.line}"
            problems.append((row.line, f"{told}, of another patient"))
    if problems:
        raise IngestError.at_lines(problems)


def heldout_store(workspace: Workspace) -> TileStore:
    """The test set."""
    return TileStore.open(_heldout_path(workspace))


def site_policy(plan: Plan, signer: str, changes: dict[str, Any]) -> Policy:
    """What a willing site allows: exactly this plan, once, unless ``changes`` say otherwise.

    Raises:
        ScenarioError: a change is no limit of a policy, or not a possible value.
    """
    privacy = plan.privacy
    values: dict[str, Any] = {
        "allowed_signers": (signer,),
        "allowed_stages": tuple(
            {stage.name: None for stage in plan.stage if not stage.is_retrieval}
        ),
        "max_epsilon": privacy.target_epsilon or 1.0,
        "max_delta": privacy.delta or 1e-3,
        "lifetime_filters": ("sums",),
        "min_noise_multiplier": 0.0,
        "max_sample_rate": privacy.sample_rate,
        "min_patients": 1,
        "max_tiles_per_patient": privacy.tiles_per_patient,
        "max_draws_per_tile": privacy.draws_per_tile,
        "max_local_steps": max(stage.local_steps for stage in plan.stage),
        "max_rounds": plan.num_rounds,
        "max_update_norm": 1e6,
        "max_adapter_norm": 1e6,
        # The patients of a simulation are drawn, or belong to whoever runs it.
        "allow_non_private": privacy.mechanism == "none",
        "require_secure_aggregation": False,
        "require_approval": False,
    }
    if privacy.trust == "distributed":
        # Nobody's patients: how little a site's own noise protects them is for real policies.
        values |= {"allowed_trust": ("distributed",), "max_epsilon_alone": 1e6}
    try:
        return Policy.model_validate(values | changes)
    except ValidationError as error:
        raise ScenarioError(f"scenario policy: {describe_first_error(error)}") from error


def _home(
    study: LocalStudy, name: str, declared_patients: int, policy_changes: dict[str, Any]
) -> SiteHome:
    """The site's home; one that is there already stays as it is."""
    path = study.workspace.site(name)
    if (path / SITE_NAME).exists():
        return SiteHome.open(path)
    config = SiteConfig(
        name=name,
        cohort=COHORT,
        declared_patients=declared_patients,
        device=str(study.foundation.device),
        foundation=study.foundation_name,
        tile_store="tiles",
        microbatch_tiles=_MICROBATCH_TILES,
        # Within one process nobody sees when a site answers.
        answer_every_s="auto" if study.real_processes else 0,
    )
    policy = site_policy(study.plan, study.signer, {**study.scenario.policy, **policy_changes})
    if study.repeatable_seed is not None:
        write_salt(path / "salt", seed=study.repeatable_seed, name=name)
    home = SiteHome.create(path, config, policy)  # a salt that is there stays
    home.foundation_approvals.approve(study.foundation.manifest)  # the scenario's author did
    return home


def _ingest(study: LocalStudy, rows: Sequence[TableRow], store: Path, salt: Path, who: str) -> None:
    """What synthetic hospitals hold."""
    if study.scenario.scenario.holdings == "tiles":
        _ingest_tiles(study, rows, store, salt, who)
    else:
        _ingest_slides(study, rows, store, salt, who)


def _ingest_slides(
    study: LocalStudy, rows: Sequence[TableRow], store: Path, salt: Path, who: str
) -> None:
    if (store / MANIFEST_NAME).exists():
        return
    manifest = study.foundation.manifest
    report = ingest_slides(
        rows,
        store,
        cohort=COHORT,
        salt=Salt.load(salt),
        options=TilingOptions(
            tile_px=manifest.tile_px,
            mpp=manifest.mpp,
            max_tiles_per_slide=study.scenario.scenario.max_tiles_per_slide,
        ),
        num_processes=study.num_workers,
        progress=_named(study.progress, who),
    )
    _keep(report, store)


def _ingest_tiles(
    study: LocalStudy, rows: Sequence[TableRow], store: Path, salt: Path, who: str
) -> None:
    if (store / MANIFEST_NAME).exists():
        return
    split = study.scenario.tiles
    report = ingest_tiles(
        rows,
        store,
        cohort=COHORT,
        salt=Salt.load(salt),
        tile_px=study.foundation.manifest.tile_px,
        mpp=study.foundation.manifest.mpp,
        source_mpp=None if split is None else split.source_mpp,
        num_processes=study.num_workers,
        progress=_named(study.progress, who),
    )
    _keep(report, store)


def _keep(report: IngestReport, store: Path) -> None:
    report.write(store.with_name("ingest.json"))


def _new_heldout_paths(study: LocalStudy) -> tuple[Path, Path]:
    """Store and salt of the test set; the salt is made on first use."""
    store = _heldout_path(study.workspace)
    store.parent.mkdir(exist_ok=True)
    salt = store.with_name("salt")
    if not salt.exists():
        if study.repeatable_seed is None:
            Salt.create(salt)
        else:
            write_salt(salt, seed=study.repeatable_seed, name="held-out")
    return store, salt


def _heldout_path(workspace: Workspace) -> Path:
    return workspace.heldout / "tiles"


def _named(progress: Progress, who: str) -> Progress:
    return lambda what, done, total: progress(f"{who}: {what}", done, total)
