"""A site with several devices: here three processes on the CPU."""

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from zlib import crc32

import pytest
from torch import multiprocessing

from crafts_client.devices import _unknown
from crafts_client.errors import HomeError
from crafts_client.home import SiteConfig, SiteHome
from crafts_client.patients import PatientTiles
from crafts_client.register import PatientRegister
from crafts_client.site import Site
from crafts_core.exchange import global_norm
from crafts_core.foundation import Foundation
from crafts_core.tiles import TileStore
from crafts_core.tiles.latents import LatentCache
from crafts_privacy.errors import RankError
from crafts_privacy.ledger import Ledger
from support.sites import Coordinator, make_site_home, policy_of


def with_devices(path: Path, foundation: Foundation, signer: str, devices: list[str]) -> SiteHome:
    home = make_site_home(path, foundation, signer, allow_non_private=True)
    values = home.config.model_dump() | {"more_devices": tuple(devices)}
    toml = (path / "site.toml").read_text()
    toml = toml.replace("more_devices = []", f"more_devices = {json.dumps(devices)}")
    (path / "site.toml").write_text(toml)
    return SiteHome(path=path, config=SiteConfig(**values), policy=policy_of(signer))


@pytest.fixture
def coordinator(tmp_path: Path, foundation: Foundation) -> Coordinator:
    return Coordinator(tmp_path, foundation)


@pytest.mark.slow
def test_devices_share_the_patients_and_one_lost_device_loses_nothing(
    tmp_path, foundation, coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = with_devices(tmp_path / "home", foundation, coordinator.public_key, ["cpu", "cpu"])
    privacy = coordinator.plan().privacy.model_dump() | {"sample_rate": 1.0}
    plan = coordinator.plan(privacy=privacy)
    state = coordinator.start(plan)
    site, here = Site(home, foundation), []
    batch = PatientTiles.batch

    def counted(self, patient, **options):
        here.append(patient)
        return batch(self, patient, **options)

    monkeypatch.setattr(PatientTiles, "batch", counted)
    first = site.answer(coordinator.message(plan, state))
    everybody = TileStore.open(home.tile_store_path).patients
    mine = {index for index, name in enumerate(everybody) if crc32(name.encode()) % 3 == 0}
    assert 0 < len(mine) < 6
    assert set(here) == mine, "the others belong to the two workers"
    assert global_norm(first.delta) > 0

    worker = multiprocessing.active_children()[0]
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    second = coordinator.message(plan, state, request=coordinator.request(plan, state, number=2))
    with pytest.raises(RankError):
        site.answer(second)
    ledger = Ledger(home.ledger_path)
    assert [held.round for held in ledger.open_reservations()] == [2]
    assert global_norm(site.answer(second).delta) > 0
    assert len(ledger.events("main")) == 2, "the same reservation paid for the second try"
    site.close()


def test_who_leaves_sends_nobody_to_another_device(tmp_path, foundation, coordinator) -> None:
    """Devices may round differently: one patient less must not move the others among them."""
    home = with_devices(tmp_path / "home", foundation, coordinator.public_key, ["cpu"])
    store = TileStore.open(home.tile_store_path)
    patients = PatientTiles(store, LatentCache.open(store, foundation.manifest.hash), foundation)

    def dealt() -> dict[str, int]:
        return {
            patients.pseudonym(index): rank
            for rank in range(3)
            for index in patients.of_rank(SimpleNamespace(rank=rank, count=3))
        }

    before = dealt()
    assert before.keys() == set(store.patients)
    patients.leave_out([store.patients[0]])
    assert dealt() == {name: rank for name, rank in before.items() if name != store.patients[0]}


def test_no_device_trains_whom_the_site_has_not_enrolled(tmp_path, foundation, coordinator) -> None:
    """As after an ingest that went on since; nor one of another cohort."""
    home = make_site_home(tmp_path / "home", foundation, coordinator.public_key)
    register = PatientRegister(home.register_path)
    register.enrol(["known"], home.config.cohort)
    register.enrol(["elsewhere"], "another cohort")
    assert _unknown(home, ["known", "elsewhere", "new"]) == {"elsewhere", "new"}


def test_a_gpu_named_twice_is_refused(tmp_path, foundation, coordinator) -> None:
    home = with_devices(tmp_path / "home", foundation, coordinator.public_key, ["cuda:1", "cuda:1"])
    with pytest.raises(HomeError, match="cuda:1 twice"):
        Site(home, foundation)
