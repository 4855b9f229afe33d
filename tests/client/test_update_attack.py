"""Whoever saw every update is attacked for, and what is kept for it is bounded and the owner's."""

import itertools
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from crafts_client import site_attack
from crafts_client.errors import HomeError
from crafts_client.home import SiteHome
from crafts_client.patients import PatientTiles
from crafts_client.register import PatientRegister
from crafts_client.seen_updates import SeenUpdates
from crafts_client.site import Site
from crafts_client.site_attack import attack_site
from crafts_client.training_task import Randomness
from crafts_client.update_attack import attack_updates
from crafts_core.adapters import merged_denoiser
from crafts_core.errors import CraftsError
from crafts_core.evaluation.leakage import Attack, Leakage, LeakageConfig, measure_leakage
from crafts_core.evaluation.real_tiles import RealTiles
from crafts_core.foundation import Foundation
from crafts_core.plan import Plan
from crafts_core.state import State, add_delta
from crafts_core.tiles import TileRecord, TileStore, TileStoreWriter, encode_tile
from crafts_core.tiles.latents import LatentCache
from crafts_privacy.ledger import EntryKind, Ledger
from support.foundations import tiny_foundation
from support.noise import SeededNoise, SeededSampler
from support.sites import Coordinator, make_site_home, plan_values, without_privacy

PATIENTS, ROUNDS = 10, 4
CONFIG = LeakageConfig(patients=PATIENTS, num_images=16, num_inference_steps=2, num_resamples=200)


@pytest.fixture(scope="module")
def foundation(tmp_path_factory: pytest.TempPathFactory) -> Foundation:
    foundation = tiny_foundation(tmp_path_factory.mktemp("f") / "tiny")
    vae = foundation.generator.vae
    # Latents as large as those of a trained VAE; otherwise the loss is all noise.
    vae.register_to_config(scaling_factor=15 * vae.config.scaling_factor)
    return foundation


def write_tissue(path: Path, foundation: Foundation, seed: int) -> TileStore:
    """Patients of one distribution, each with a colour and a pattern of their own."""
    rng, side = np.random.default_rng(seed), foundation.manifest.tile_px
    with TileStoreWriter(path, cohort="main", tile_px=side, mpp=1.0) as writer:
        for patient in range(PATIENTS):
            look = rng.integers(60, 200, 3) + rng.integers(-60, 60, (4, 4, 3))
            for number in range(2):
                grain = rng.integers(-10, 10, (side, side, 3))
                pixels = np.kron(look, np.ones((side // 4, side // 4, 1), dtype=np.int64)) + grain
                record = TileRecord(
                    tile_id=f"{patient:04d}{number:04d}",
                    patient=f"patient{patient:04d}",
                    case="",
                    slide=f"slide{patient:04d}",
                    x=number * side,
                    y=0,
                    level0_width=side,
                    level0_height=side,
                    mpp=1.0,
                    caption="tissue with glands",
                    label="",
                    tissue_fraction=1.0,
                    sharpness=1.0,
                )
                writer.add(record, encode_tile(pixels.clip(0, 255).astype(np.uint8)))
    store = TileStore.open(path)
    LatentCache.build(store, foundation)
    return store


def seeded() -> Randomness:
    """Everything follows from what is written here."""
    seeds = itertools.count()
    return Randomness(
        noise=SeededNoise(1),
        sampler=SeededSampler(2),
        generator=lambda *_: torch.Generator().manual_seed(next(seeds)),
    )


def trained(folder: Path, foundation: Foundation, *, private: bool) -> tuple[SiteHome, Plan, State]:
    """A site that answered every round of a plan whose coordinator blends in its tenth."""
    coordinator = Coordinator(folder, foundation)
    home = make_site_home(
        folder / "site", foundation, coordinator.public_key, num_patients=1, allow_non_private=True
    )
    config = home.path / "site.toml"
    config.write_text(config.read_text().replace('"tiles"', '"tissue"'))
    home = SiteHome.open(home.path)
    write_tissue(home.tile_store_path, foundation, seed=1)
    stage = {"name": "pretraining", "rounds": ROUNDS, "local_steps": 1, "learning_rate": 0.05}
    values = plan_values(foundation.manifest.hash) | {"stage": [stage]}
    values["adapter"] |= {"schedule": "second_only"}
    values["privacy"] |= {"sample_rate": 1.0, "target_epsilon": 1.0, "max_grad_norm": 1e-4}
    values["privacy"] |= {"draws_per_tile": 4}
    if not private:
        values = without_privacy(values)
        values["privacy"] |= {"max_grad_norm": 1e-4}
    plan = Plan.parse(values)
    state, site = coordinator.start(plan), Site(home, foundation, randomness=seeded())
    for number in range(1, ROUNDS + 1):
        request = coordinator.request(plan, state, number=number)
        release = site.answer(coordinator.message(plan, state, request=request))
        state = add_delta(state, release.delta, 0.1)
    return home, plan, state


def committed(home: SiteHome) -> set[str]:
    entries = Ledger(home.ledger_path).entries()
    return {entry.detail for entry in entries if entry.kind is EntryKind.COMMITTED}


def attacked(home: SiteHome, foundation: Foundation, others: TileStore) -> Attack:
    updates = tuple(SeenUpdates(home.seen_path).read(committed(home)))
    assert [update.request.round for update in updates] == [1, 2, 3, 4]
    sides = [
        PatientTiles(store, LatentCache.open(store, foundation.manifest.hash), foundation)
        for store in (TileStore.open(home.tile_store_path), others)
    ]
    return attack_updates(foundation, updates, *sides, CONFIG)


@pytest.mark.slow
def test_without_noise_the_updates_tell_members_and_the_generator_hardly_does(
    tmp_path, foundation
) -> None:
    others = write_tissue(tmp_path / "others", foundation, seed=2)
    home, plan, state = trained(tmp_path, foundation, private=False)

    found = attacked(home, foundation, others)

    assert found.auc > 0.9
    assert found.p_value < 0.001
    members, strangers = (
        RealTiles.read(store, np.arange(store.num_tiles))
        for store in (TileStore.open(home.tile_store_path), others)
    )
    unet = merged_denoiser(foundation.generator.denoiser, plan.adapter, state)
    generator = foundation.generator
    published = replace(generator, denoiser=unet)
    final = measure_leakage(published, generator, members, strangers, CONFIG)
    assert max(attack.auc for attack in final.attacks) < found.auc - 0.15
    assert min(attack.p_value for attack in final.attacks) > 0.01


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory, foundation: Foundation) -> SiteHome:
    home, _, _ = trained(tmp_path_factory.mktemp("kept"), foundation, private=True)
    return home


@pytest.mark.slow
def test_with_noise_the_updates_tell_nobody(kept, tmp_path, foundation) -> None:
    """Epsilon 1 for all rounds."""
    others = write_tissue(tmp_path / "others", foundation, seed=2)
    found = attacked(kept, foundation, others)
    assert 0.2 < found.auc < 0.8
    assert found.p_value > 0.01


@pytest.mark.slow
def test_nothing_is_read_of_who_has_withdrawn(kept, tmp_path, foundation, monkeypatch) -> None:
    home = SiteHome.open(Path(shutil.copytree(kept.path, tmp_path / "site")))
    gone, *others = TileStore.open(home.tile_store_path).patients
    PatientRegister(home.register_path).withdraw(gone)
    seen = []

    def looked(*arguments: object, **_: object) -> Leakage:
        seen.append(set(arguments[2].patients))
        raise ValueError("seen")

    def pulled(_: object, __: object, members: PatientTiles, *___: object) -> Attack:
        seen.append({members.pseudonym(place) for place in range(members.num_patients)})
        raise ValueError("seen")

    monkeypatch.setattr(site_attack, "measure_leakage", looked)
    for _ in range(2):
        with pytest.raises(CraftsError, match="seen"):
            attack_site(home, foundation.path, home.tile_store_path, CONFIG)
        monkeypatch.setattr(site_attack, "measure_leakage", lambda *_: SimpleNamespace(attacks=()))
        monkeypatch.setattr(site_attack, "attack_updates", pulled)
    assert seen == [set(others)] * 2


@pytest.mark.slow
def test_every_round_is_kept_for_the_owner_alone_with_what_it_answered(kept) -> None:
    """Also those that the outbox forgot; a file that the ledger did not commit is not read."""
    files = list(kept.seen_path.iterdir())
    assert {path.stem for path in files} == committed(kept)
    assert all(path.stat().st_mode & 0o077 == 0 for path in (kept.seen_path, *files))
    first, second, *_ = SeenUpdates(kept.seen_path).read(committed(kept))
    assert first.stage.name == "pretraining"
    for name, delta in first.delta.items():
        moved = first.received[name] + 0.1 * delta
        np.testing.assert_allclose(second.received[name], moved, atol=1e-7)
    assert list(SeenUpdates(kept.seen_path).read(set())) == []


def test_the_oldest_go_where_they_would_take_more_than_the_bound(kept, tmp_path) -> None:
    update, *_ = SeenUpdates(kept.seen_path).read(committed(kept))
    size = next(kept.seen_path.iterdir()).stat().st_size
    folder = SeenUpdates(tmp_path / "seen", most_bytes=int(2.5 * size))
    for number in range(4):
        name = f"{number:064d}"
        folder.keep(update.plan, update.request, update.received, update.delta, name)
        os.utime(tmp_path / "seen" / f"{name}.safetensors", ns=(number, number))
    assert sorted(int(path.stem) for path in (tmp_path / "seen").iterdir()) == [2, 3]
    small = SeenUpdates(tmp_path / "seen", most_bytes=100)
    small.keep(update.plan, update.request, update.received, update.delta, "f" * 64)
    assert len(list((tmp_path / "seen").iterdir())) == 2, "what fits nowhere drives nothing out"


@pytest.mark.parametrize("damage", [b"", b"not safetensors at all"])
def test_a_damaged_file_is_named(tmp_path, damage: bytes) -> None:
    path = tmp_path / "0.safetensors"
    path.write_bytes(damage)
    with pytest.raises(HomeError, match=r"0\.safetensors is damaged; remove it"):
        list(SeenUpdates(tmp_path).read({"0"}))
