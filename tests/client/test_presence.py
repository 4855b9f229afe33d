"""No outcome of a round tells that a patient is in the cohort, unless it is a noised number.

A coordinator that chose foundation, plan and adapter looks at neighbouring cohorts. Whatever cannot
be used of a patient counts as zero, in the home alone: asked without noise, the answer is the one
of a cohort that does not draw that patient, to the last bit.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Context, RecordDict
from typer.testing import CliRunner

from crafts_client import patients as patients_module
from crafts_client import unusable
from crafts_client.cli import app
from crafts_client.client_app import HOME_KEY, make_client_app
from crafts_client.home import SiteHome
from crafts_client.patients import PatientTiles
from crafts_client.preparation import fill_cache
from crafts_client.site import Site
from crafts_client.training_task import Randomness
from crafts_core.exchange import global_norm
from crafts_core.foundation import Foundation, load, write_manifest
from crafts_core.plan import Plan
from crafts_core.plan_sections import Modality
from crafts_core.stages.batch import TileBatch
from crafts_core.state import State
from crafts_core.tiles import TileRecord, TileStore, TileStoreWriter, encode_tile
from crafts_core.tiles.cache_files import (
    CAPTION_EMBEDDINGS,
    LATENTS,
    TEXT,
    TILE_EMBEDDINGS,
    cache_folder,
)
from crafts_core.tiles.conditions import encode_condition, nuclei_condition, to_bytes
from crafts_core.tiles.latents import LatentCache
from crafts_core.tiles.records import decode_tile
from support.noise import FixedSampler, NoNoise
from support.sites import Coordinator, control_values, flower_message, make_site_home, plan_values

pytestmark = pytest.mark.slow

PATIENTS, DECLARED, TILES_EACH = 5, 8, 3
LAST = PATIENTS - 1
ALL_STAGES = ("pretraining", "alignment", "control")
Pixels = np.ndarray


def random_tiles(count: int, side: int) -> list[Pixels]:
    rng = np.random.default_rng(5)
    return [rng.integers(0, 256, (side, side, 3), dtype=np.uint8) for _ in range(count)]


def make_home(path: Path, foundation: Foundation, signer: str, tiles: Sequence[Pixels]) -> SiteHome:
    """Each patient has three tiles in a row, with nuclei over them, and a caption of their own."""
    home = make_site_home(
        path,
        foundation,
        signer,
        num_patients=DECLARED,
        microbatch_tiles=4,  # a patient a pass
        allowed_stages=ALL_STAGES,
        max_delta=2e-3,  # two plans
    )
    shutil.rmtree(home.tile_store_path)
    side = foundation.manifest.tile_px
    labels = np.kron(np.arange(16).reshape(4, 4) % 3, np.ones((side // 4, side // 4)))
    mask = encode_condition(to_bytes(nuclei_condition(labels.astype(np.int64)), "nuclei"), "nuclei")
    with TileStoreWriter(home.tile_store_path, cohort="main", tile_px=side, mpp=1.0) as writer:
        for number, pixels in enumerate(tiles):
            patient = f"patient{number // TILES_EACH}"
            record = TileRecord(
                tile_id=f"t{number}", patient=patient, case="", slide=patient, x=0, y=0,
                level0_width=1, level0_height=1, mpp=1.0, caption=f"tissue of {patient}", label="",
                tissue_fraction=1, sharpness=1,
            )  # fmt: skip
            writer.add(record, encode_tile(pixels), {"nuclei": mask})
    fill_cache(home, foundation, lambda *_: None)
    return home


@pytest.fixture
def home(tmp_path: Path, foundation, coordinator) -> SiteHome:
    tiles = random_tiles(PATIENTS * TILES_EACH, foundation.manifest.tile_px)
    return make_home(tmp_path / "site", foundation, coordinator.public_key, tiles)


def fixed(drawn: Sequence[int] | None = None) -> Randomness:
    """No noise, these patients in every step, the same draws of each."""
    return Randomness(
        noise=NoNoise(),
        sampler=FixedSampler(drawn),
        generator=lambda _step, _patient: torch.Generator().manual_seed(3),
    )


def one_step(values: dict[str, object], coordinator: Coordinator) -> Plan:
    (stage, *_) = values["stage"]  # type: ignore[misc]
    return coordinator.plan(**values | {"stage": [stage | {"rounds": 3, "local_steps": 1}]})


def answered(site: Site, coordinator: Coordinator, plan: Plan, number: int = 1) -> State:
    state = {name: value + 0.01 for name, value in coordinator.start(plan).items()}
    request = coordinator.request(plan, state, number=number)
    return site.answer(coordinator.message(plan, state, request=request)).delta


def told(home: SiteHome, foundation: Foundation, coordinator: Coordinator, plan: Plan) -> int | str:
    """What leaves the site, seen by a coordinator that cannot see through noise."""
    content = coordinator.content(plan, coordinator.start(plan))
    client = make_client_app(lambda path: Site(SiteHome.open(path), foundation))
    where = Context(7, 7, {HOME_KEY: str(home.path)}, RecordDict(), {})
    reply = client(flower_message(content), where)
    return reply.error.code if reply.has_error() else "answered"


class TestHostileFoundation:
    """One number of its VAE's configuration is another: one tile alone leaves float16."""

    @pytest.fixture
    def tiles(self, foundation) -> list[Pixels]:
        """The tile with the largest latent comes last, as its patient's only one."""
        tiles = random_tiles(60, foundation.manifest.tile_px)
        special = int(self.largest(foundation, tiles).argmax())
        others = [tile for number, tile in enumerate(tiles) if number != special]
        return [*others[: LAST * TILES_EACH], tiles[special]]

    def largest(self, foundation: Foundation, tiles: Sequence[Pixels]) -> np.ndarray:
        side = foundation.manifest.tile_px
        stored = np.stack([decode_tile(encode_tile(tile), side) for tile in tiles])
        images = torch.from_numpy(stored).permute(0, 3, 1, 2) / 127.5 - 1
        return foundation.generator.encode_images(images).abs().amax((1, 2, 3)).numpy()

    @pytest.fixture
    def hostile(self, tmp_path: Path, foundation, tiles) -> Foundation:
        sizes = self.largest(foundation, tiles)
        probe = foundation.probe.tiles_NCHW / 127.5 - 1
        public = float(foundation.generator.encode_images(probe).abs().max())
        least = max(public, *sizes[:-1].tolist())
        folder = tmp_path / "hostile"
        shutil.copytree(foundation.path, folder)
        file = folder / "vae" / "config.json"
        config = json.loads(file.read_text())
        factor = 2 * torch.finfo(torch.float16).max / float(sizes[-1] + least)
        file.write_text(json.dumps(config | {"scaling_factor": config["scaling_factor"] * factor}))
        (folder / "foundation.json").unlink()
        about = foundation.manifest.model_dump(
            exclude={"format_version", "versions", "files", "name"}
        )
        write_manifest(folder, name="hostile", **about)
        return load(folder)

    def test_tells_nothing_of_the_patient_with_that_tile(self, tmp_path, hostile, tiles) -> None:
        coordinator = Coordinator(tmp_path, hostile)
        plan = one_step(plan_values(hostile.manifest.hash), coordinator)
        with_it, without = (
            make_home(tmp_path / str(len(part)), hostile, coordinator.public_key, part)
            for part in (tiles, tiles[:-1])
        )
        cache = LatentCache.open(TileStore.open(with_it.tile_store_path), hostile.manifest.hash)
        assert cache.unusable == (LAST * TILES_EACH,), "what the coordinator built it for"

        assert told(with_it, hostile, coordinator, plan) == "answered"
        assert told(without, hostile, coordinator, plan) == "answered"

        deltas = [
            answered(Site(each, hostile, randomness=fixed()), coordinator, plan, 2)
            for each in (with_it, without)
        ]
        assert global_norm(deltas[0]) > 0
        assert all(torch.equal(deltas[0][name], deltas[1][name]) for name in deltas[0])
        assert unusable.total(without.unusable_path) == unusable.Unusable()
        assert unusable.total(with_it.unusable_path).tiles >= 1


def spoil(
    home: SiteHome,
    foundation: Foundation,
    name: str,
    rows: Sequence[int],
    value: float = math.nan,
) -> None:
    """Write another number over rows of the cache, as a disk that rots would."""
    folder = cache_folder(TileStore.open(home.tile_store_path), foundation.manifest.hash)
    shape = json.loads((folder / "meta.json").read_text())["shapes"][name]
    array = np.memmap(folder / name, dtype=np.float16, mode="r+", shape=tuple(shape))
    array[list(rows)] = value
    array.flush()


def unreadable_masks(home: SiteHome, foundation: Foundation) -> None:
    """Of the last patient: other bytes, as many as there were."""
    store = TileStore.open(home.tile_store_path)
    for row in store.index.to_pylist()[LAST * TILES_EACH :]:
        with (home.tile_store_path / "shards" / f"{row['shard']}.tar").open("r+b") as file:
            file.seek(row["nuclei_offset"])
            file.write(b"?" * row["nuclei_length"])


LAST_ROWS = range(LAST * TILES_EACH, PATIENTS * TILES_EACH)
DAMAGE: dict[str, Callable[[SiteHome, Foundation], object]] = {
    "latents": lambda home, foundation: spoil(home, foundation, LATENTS, LAST_ROWS),
    "tile embeddings": lambda home, foundation: spoil(home, foundation, TILE_EMBEDDINGS, LAST_ROWS),
    "captions": lambda home, foundation: (
        spoil(home, foundation, TEXT, [LAST]),
        spoil(home, foundation, CAPTION_EMBEDDINGS, [LAST]),
    ),
    "masks": unreadable_masks,
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_patient_of_whom_nothing_can_be_used_counts_as_zero(
    tmp_path, home, foundation, coordinator, what: str
) -> None:
    """The same answer, to the last bit, as where that patient is not drawn; in stage control."""
    plan = one_step(control_values(foundation.manifest.hash), coordinator)
    other = SiteHome.open(shutil.copytree(home.path, tmp_path / "other"))
    DAMAGE[what](home, foundation)

    drawn = answered(Site(home, foundation, randomness=fixed()), coordinator, plan)
    spared = answered(Site(other, foundation, randomness=fixed(range(LAST))), coordinator, plan)

    assert global_norm(drawn) > 0
    assert all(torch.equal(drawn[name], spared[name]) for name in drawn)
    assert unusable.total(home.unusable_path) == unusable.Unusable(tiles=2), "two tiles a patient"


def test_tiles_that_vanish_under_a_running_site_count_as_zero(
    home, foundation, coordinator
) -> None:
    """Cut off, gone: neither an error nor, as with mapped files, a dead process."""
    pretraining = one_step(plan_values(foundation.manifest.hash), coordinator)
    control = one_step(control_values(foundation.manifest.hash), coordinator)
    site = Site(home, foundation, randomness=fixed())
    for shard in home.tile_store_path.glob("shards/*.tar"):
        shard.unlink()
    assert global_norm(answered(site, coordinator, control)) == 0
    assert global_norm(answered(site, coordinator, pretraining)) > 0, "it needs the cache alone"
    store = TileStore.open(home.tile_store_path, check_shards=False)
    os.truncate(cache_folder(store, foundation.manifest.hash) / LATENTS, 0)
    assert global_norm(answered(site, coordinator, pretraining, 2)) == 0


def test_damaged_pixels_are_no_reason_for_a_site_to_stay_away(
    home, foundation, coordinator
) -> None:
    """Its operator hears of them, and of nothing else that the coordinator is told."""
    shard = next(home.tile_store_path.glob("shards/*.tar"))
    shard.write_bytes(shard.read_bytes()[:-1])
    plan = one_step(plan_values(foundation.manifest.hash), coordinator)
    assert told(home, foundation, coordinator, plan) == "answered"
    checked = CliRunner().invoke(app, ["tiles", "check", "--home", str(home.path)])
    assert (checked.exit_code, "missing or torn" in checked.output) == (1, True)


def test_the_other_tiles_of_a_patient_keep_their_weights(home, foundation, monkeypatch) -> None:
    spoil(home, foundation, LATENTS, [1])
    store = TileStore.open(home.tile_store_path)
    tiles = PatientTiles(store, LatentCache.open(store, foundation.manifest.hash), foundation)

    def batch(patient: int, modality: Modality | None = None) -> TileBatch:
        generator = torch.Generator().manual_seed(0)
        return tiles.batch(patient, max_tiles=9, generator=generator, modality=modality)

    whole, damaged = batch(1, "nuclei"), batch(0)
    assert (len(whole), len(damaged)) == (3, 2)
    assert damaged.weight_B.tolist() == [pytest.approx(1 / 3)] * 2
    honest, first = patients_module.to_floats, np.array([np.nan, 1, 1]).reshape(3, 1, 1, 1)
    monkeypatch.setattr(patients_module, "to_floats", lambda *image: honest(*image) * first)
    left = batch(1, "nuclei")
    assert torch.equal(left.latents_BCHW, whole.latents_BCHW[1:])
    assert torch.equal(left.condition_BCHW, whole.condition_BCHW[1:])
    assert (tiles.take_num_unusable(), tiles.take_num_unusable()) == (2, 0)


def test_a_profile_beyond_all_numbers_counts_as_zero_in_company(
    tmp_path, home, foundation, coordinator
) -> None:
    """Every stored number is finite; with the anchors, the foundation's choice, it overflows."""
    values = plan_values(foundation.manifest.hash)
    plan = one_step(values | {"stage": values["stage"][1:]}, coordinator)  # type: ignore[index]
    loud = replace(foundation, anchors_KD=foundation.anchors_KD * 1e35)
    spoil(home, foundation, TILE_EMBEDDINGS, LAST_ROWS, 6e4)
    config = home.config.model_copy(update={"microbatch_tiles": 64})
    other = replace(home, path=shutil.copytree(home.path, tmp_path / "other"), config=config)
    home = replace(home, config=config)

    drawn = answered(Site(home, loud, randomness=fixed()), coordinator, plan)
    spared = answered(Site(other, loud, randomness=fixed(range(LAST))), coordinator, plan)

    assert global_norm(drawn) > 0
    for name in drawn:
        torch.testing.assert_close(drawn[name], spared[name], rtol=1e-4, atol=1e-7)
    assert unusable.total(home.unusable_path) == unusable.Unusable(gradients=1)


def test_counts_that_cannot_be_written_change_nothing(
    home, foundation, coordinator, monkeypatch
) -> None:
    """An error, or time for a file, would tell that there was something to count."""
    plan = one_step(plan_values(foundation.manifest.hash), coordinator)
    tried: list[str] = []

    def full_disk(_: Path, text: str, **__: object) -> None:
        tried.append(text)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(unusable, "write_file", full_disk)
    site = Site(home, foundation, randomness=fixed())
    assert answered(site, coordinator, plan)
    spoil(home, foundation, LATENTS, LAST_ROWS)
    assert answered(site, coordinator, plan, 2)
    counted = [unusable.Unusable.model_validate_json(text).tiles for text in tried]
    assert counted == [0, 2]
