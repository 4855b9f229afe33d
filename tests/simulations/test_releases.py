"""Releases end to end on drawn hospitals: told, summed, read, stored, and trained towards."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from crafts_client.home import SiteHome
from crafts_core.evaluation.colour import colour_statistics
from crafts_core.foundation import Foundation
from crafts_core.generator import Generator
from crafts_core.generator_record import GeneratorRecord
from crafts_core.releases import ANCHORS, COLOUR
from crafts_core.state import weights_of
from crafts_core.tiles import TileStore
from crafts_core.tiles.latents import LatentCache
from crafts_core.told_colours import find_colours, with_colours
from crafts_core.vocabulary import cancer_type, caption_class, compose_caption
from crafts_privacy.accounting import epsilon
from crafts_privacy.ledger import Ledger
from crafts_server.checkpoints import Checkpoint
from crafts_server.home import CoordinatorHome
from crafts_simulations.federation import export, federate
from crafts_simulations.processes import loopback_config
from crafts_simulations.scenario import Scenario, parse_scenario
from crafts_simulations.sites import make_sites
from crafts_simulations.study import LocalStudy
from crafts_simulations.workspace import Workspace
from support.foundations import tiny_foundation
from support.scenarios import tiny_scenario_values

pytestmark = pytest.mark.slow
NOBODYS = "H&E, mesothelioma, pleura"
CAPTIONS = (*(compose_caption(cancer_type(code), None) for code in ("LUAD", "COAD")), NOBODYS)
TARGET = 100.0
"""Little noise, so that twelve patients can be seen."""


def scenario_of(foundation: Path) -> Scenario:
    values = tiny_scenario_values(foundation)
    pretraining, alignment = values["stage"]
    once = {"rounds": 1, "local_steps": 1}
    values["site"][1]["declared_patients"] = 16
    values["study"]["captions"] = list(CAPTIONS)
    values["privacy"] |= {"target_epsilon": TARGET, "tiles_per_patient": 9}
    values["stage"] = [
        {"name": "anchors", "noise_multiplier": 0.2},
        {"name": "colour", "noise_multiplier": 0.2},
        pretraining | once,
        alignment | once | {"lambda_align": 0.3, "alignment_loss": "contrast"},
    ]
    return parse_scenario(values, "a test")


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> LocalStudy:
    foundation = tiny_foundation(tmp_path_factory.mktemp("foundation") / "tiny")
    scenario = scenario_of(foundation.path)
    workspace = Workspace.claim(tmp_path_factory.mktemp("run") / "out", {})
    home = CoordinatorHome.create(workspace.coordinator, loopback_config(foundation.path))
    study = LocalStudy(
        workspace=workspace,
        scenario=scenario,
        plan=scenario.plan(foundation.manifest.hash),
        foundation=foundation,
        signer=home.public_key,
        device="cpu",
        num_workers=0,
        num_trainers=1,
        ray=None,
        real_processes=False,
        progress=lambda _what, _done, _total: None,
    )
    make_sites(study, None)
    return study


@pytest.fixture(scope="module")
def chain(study: LocalStudy) -> list[Checkpoint]:
    return federate(study, CoordinatorHome.open(study.workspace.coordinator))


def stores(study: LocalStudy) -> list[TileStore]:
    homes = (SiteHome.open(study.workspace.site(name)) for name in ("north", "south"))
    return [TileStore.open(home.tile_store_path) for home in homes]


def pooled_anchors(study: LocalStudy, foundation: Foundation) -> torch.Tensor:
    """Tile by tile over both hospitals, without noise; patients here have one class each."""
    sums = torch.zeros(len(CAPTIONS), foundation.aligner.embedding_dim)
    for store in stores(study):
        cache = LatentCache.open(store, foundation.manifest.hash)
        for patient in range(store.num_patients):
            rows = store.tile_rows_of(patient)
            number = caption_class(store.captions[store.caption_ids(rows)[0]], CAPTIONS)
            assert number is not None
            sums[number] += cache.tile_embeddings(rows).mean(dim=0)
    return torch.nn.functional.normalize(sums, dim=1)


def test_the_run_knows_where_its_tissue_lies(study: LocalStudy, chain: list[Checkpoint]) -> None:
    told = chain[1].receipt().release
    assert told is not None
    assert told.is_public == (False, False, True), "nobody has the third"
    anchors_KD = chain[1].state()[ANCHORS]
    near = (anchors_KD * pooled_anchors(study, study.foundation)).sum(dim=1)[:2]
    assert near.min() > 0.9
    text_KD = study.foundation.aligner.embed_captions([NOBODYS])
    assert torch.allclose(anchors_KD[2:], text_KD, atol=1e-6)
    assert torch.allclose(torch.tensor(told.values), anchors_KD, atol=1e-6)


def test_sites_count_by_their_patients_whatever_the_rule(chain: list[Checkpoint]) -> None:
    weights = {each.site: each.weight for each in chain[1].receipt().sites}
    assert weights == pytest.approx({"north": 1 / 3, "south": 2 / 3})
    trained = {each.site: each.weight for each in chain[3].receipt().sites}
    assert trained != pytest.approx(weights)


def test_the_run_knows_its_colour(study: LocalStudy, chain: list[Checkpoint]) -> None:
    told = chain[2].receipt().release
    assert told is not None
    assert told.is_public == (False,)
    images = [store.read_images(range(store.num_tiles)) for store in stores(study)]
    expected = torch.tensor(colour_statistics(torch.cat([*map(torch.from_numpy, images)]).numpy()))
    assert torch.allclose(
        chain[2].state()[COLOUR][0, 1:4].double(), expected.mean(dim=0)[:3], atol=0.25
    )


def test_the_exported_generator_has_the_colours_told(
    study: LocalStudy, chain: list[Checkpoint]
) -> None:
    """In its decoder alone: what anybody may do with what was released."""
    export(study, chain)
    out = study.workspace.generator
    record = GeneratorRecord.model_validate_json((out / "generator.json").read_text())
    assert record.colours is not None
    exported = Generator.from_directory(out)
    expected = find_colours(
        replace(exported, vae=study.foundation.generator.vae),
        chain[2].state()[COLOUR][0, 1:].double().numpy(),
        CAPTIONS,
        seed=study.plan.study.seed,
    )
    assert record.colours == expected
    decoder = with_colours(study.foundation.generator.vae, expected).decoder.state_dict()
    found = exported.vae.decoder.state_dict()
    assert all(torch.equal(found[name], decoder[name]) for name in decoder)
    assert "## Colours" in (out / "README.md").read_text()


def test_what_was_told_stays_as_it_is(study: LocalStudy, chain: list[Checkpoint]) -> None:
    assert [each.receipt().stage for each in chain[1:]] == [
        *("anchors", "colour", "pretraining", "alignment")
    ]
    first, last = chain[2].state(), chain[-1].state()
    assert torch.equal(first[ANCHORS], last[ANCHORS])
    assert torch.equal(first[COLOUR], last[COLOUR])
    moved = [name for name in weights_of(last) if not torch.equal(first[name], last[name])]
    assert moved, "the adapter trained"
    assert all(torch.equal(chain[0].state()[name], first[name]) for name in weights_of(first))


def test_all_of_it_is_charged_to_the_plans_target(
    study: LocalStudy, chain: list[Checkpoint]
) -> None:
    assert len(chain) == 5
    for name in ("north", "south"):
        ledger = Ledger(SiteHome.open(study.workspace.site(name)).ledger_path)
        (cohort,) = {entry.cohort for entry in ledger.entries() if entry.cohort}
        assert 0.98 * TARGET < epsilon(ledger.events(cohort), 1e-3) <= TARGET


def test_the_generator_is_of_weights_alone(study: LocalStudy, chain: list[Checkpoint]) -> None:
    export(study, chain)
    assert (study.workspace.generator / "model_index.json").is_file()
    assert study.workspace.adapter.is_file()


def test_another_process_goes_on_with_what_was_told(
    study: LocalStudy, chain: list[Checkpoint]
) -> None:
    again = federate(study, CoordinatorHome.open(study.workspace.coordinator))
    assert [each.hash for each in again] == [each.hash for each in chain]
    assert math.isfinite(chain[-1].receipt().margin_after)
