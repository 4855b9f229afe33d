"""A foundation sees private tiles once a person here approved its hash, and not before."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from typer.testing import CliRunner

from crafts_client.approvals import FoundationApprovals
from crafts_client.cli import app
from crafts_client.doctor import examine
from crafts_client.doctor import foundation as foundation_check
from crafts_client.errors import HomeError
from crafts_client.home import SiteHome
from crafts_client.ingest.choices import TissueMethod
from crafts_client.policy import PolicyError, Rule
from crafts_client.preparation import IngestOptions, fill_cache, prepare_site
from crafts_client.site import Site
from crafts_core.foundation_manifest import FoundationManifest, embedded_path, read_manifest
from crafts_core.tiles import TileStore
from support.foundations import write_tiny_foundation
from support.sites import make_site_home

NOBODY = (
    r"policy rule foundation_approval: nobody here approved foundation tiny; .* approve \w{64}$"
)


def run(home: SiteHome, *words: str):
    return CliRunner().invoke(app, ["foundation", *words, "--home", str(home.path)])


@pytest.fixture
def home(tmp_path: Path, foundation, coordinator) -> SiteHome:
    home = make_site_home(tmp_path / "site", foundation, coordinator.public_key)
    home.foundation_approvals.take_back(foundation.manifest.hash)
    return home


def test_without_it_nothing_private_is_read_or_encoded(home, foundation, monkeypatch) -> None:
    monkeypatch.setattr(TileStore, "read_images", None)
    options = IngestOptions(
        ready_tiles=True,
        max_tiles_per_slide=None,
        tissue=TissueMethod.OTSU,
        keep=(),
        num_processes=1,
    )
    with pytest.raises(PolicyError, match=NOBODY):
        prepare_site(
            home,
            foundation,
            table=home.path / "none.csv",
            root=None,
            options=options,
            progress=lambda *_: None,
        )
    with pytest.raises(PolicyError, match=NOBODY):
        fill_cache(home, foundation, lambda *_: None)
    with pytest.raises(PolicyError, match=NOBODY):
        Site(home, foundation)
    with pytest.raises(PolicyError, match=NOBODY):
        list(foundation_check(home))
    assert any("nobody here approved" in finding.found for finding in examine(home))


def test_a_running_site_sees_that_it_was_taken_back(home, foundation, coordinator) -> None:
    plan = coordinator.plan()
    message = coordinator.message(plan, coordinator.start(plan))
    home.foundation_approvals.approve(foundation.manifest)
    site = Site(home, foundation)
    home.foundation_approvals.take_back(foundation.manifest.hash)
    with pytest.raises(PolicyError) as refused:
        site.answer(message)
    assert refused.value.rule is Rule.FOUNDATION_APPROVAL
    assert site._ledger.events("main") == ()
    (home.path / "approved_foundations.json").write_text("{")
    with pytest.raises(HomeError, match="approve everything again"):
        site.answer(message)
    (home.path / "approved_foundations.json").unlink()
    home.foundation_approvals.approve(foundation.manifest)
    site.answer(message)


def test_a_person_sees_what_it_is_and_approves_it_by_its_hash(home, foundation) -> None:
    wanted = foundation.manifest.hash
    listed = {each["hash"]: each for each in json.loads(run(home, "list", "--json").stdout)}
    embedded = read_manifest(embedded_path()).hash
    assert listed.keys() == {wanted, embedded}
    assert listed[embedded]["approved"], "installed together with the code that runs it"
    shown = listed[wanted]
    assert (shown["name"], shown["licence"], shown["approved"]) == ("tiny", "Apache-2.0", False)
    files = [foundation.path / name for name in foundation.manifest.files]
    assert shown["bytes"] == sum(file.stat().st_size for file in files)

    assert "expected at least 16" in run(home, "approve", wanted[:15]).stderr
    assert "foundation fetch" in run(home, "approve", "0" * 64).stderr
    short = run(home, "approve", wanted[:63])
    assert (short.exit_code, "all 64 digits" in short.stderr) == (1, True), "two may begin alike"
    assert not home.foundation_approvals.has(wanted)
    done = run(home, "approve", wanted)
    assert wanted in done.stdout, "all of it, to compare with the study's"
    assert home.foundation_approvals.has(wanted)
    assert f"{wanted}  tiny" in run(home, "list").stdout
    assert "is not approved any more" in run(home, "approve", wanted[:16], "--take-back").stdout
    assert not home.foundation_approvals.has(wanted)
    refused = run(home, "approve", embedded[:16], "--take-back")
    assert (refused.exit_code, "part of the installed package" in refused.stderr) == (1, True)


def test_one_that_is_not_what_its_manifest_says_is_not_approved(home, foundation) -> None:
    folder = write_tiny_foundation(home.foundations_path / "fetched", seed=5)
    manifest = read_manifest(folder)
    (folder / "unet" / "config.json").write_text("{}")
    refused = run(home, "approve", manifest.hash)
    assert (refused.exit_code, "does not match its SHA-256" in refused.stderr) == (1, True)
    assert not home.foundation_approvals.has(manifest.hash)


def test_of_approvals_at_once_every_one_counts(tmp_path: Path, foundation) -> None:
    """Read, changed and written back: the later one took the earlier one's word."""
    path, start = tmp_path / "approved.json", threading.Barrier(4)
    manifests = [
        foundation.manifest.model_copy(update={"name": f"foundation-{number}"})
        for number in range(40)
    ]

    def approve(some: list[FoundationManifest]) -> None:
        start.wait()
        for manifest in some:
            FoundationApprovals(path).approve(manifest)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(approve, [manifests[number::4] for number in range(4)]))
    assert set(FoundationApprovals(path).all()) == {each.hash for each in manifests}
