"""What a site tells once, before training: bounded by patient, noised, charged, and told once.

The last patient of the home has tiles of all three captions of the study.
"""

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from crafts_client import trainer
from crafts_client.answer_times import Pace
from crafts_client.budget import left_for
from crafts_client.errors import TrainingError
from crafts_client.home import SiteHome
from crafts_client.mechanism import mechanisms_of
from crafts_client.offered_plans import OfferedPlan, judge
from crafts_client.outbox import REFUSED_RELEASE
from crafts_client.plan_words import plan_words, seconds_per_step
from crafts_client.policy import PolicyError, Rule
from crafts_client.preparation import fill_cache
from crafts_client.register import PatientRegister
from crafts_client.site import Site
from crafts_client.site_ledger import open_ledger
from crafts_client.training_task import Randomness
from crafts_core.exchange import RoundRequest, SignedPlan
from crafts_core.foundation import Foundation
from crafts_core.plan import Plan
from crafts_core.plan_keys import commented_toml
from crafts_core.releases import ANCHORS, COLOUR, anchor_vector, colour_vector, release_schema
from crafts_core.state import State
from crafts_core.tiles import TileRecord, TileStore, TileStoreWriter, encode_tile
from crafts_core.tiles.latents import LatentCache
from crafts_privacy import signing
from crafts_privacy.accounting import PrivacyEvent, epsilon
from crafts_privacy.errors import PlanBudgetExceededError, StageSpentError
from crafts_privacy.ledger import EntryKind
from crafts_privacy.sampling import PoissonSampler
from support.noise import NoNoise
from support.sites import Coordinator, make_site_home, plan_values
from support.sum_study import distributed_values, summing_home

CAPTIONS = ("tissue with glands", "tissue with sheets", "tissue with spindle cells")
DECLARED, LAST = 10, 4
ALL_STAGES = ("anchors", "colour", "pretraining", "alignment")


def write_home(
    path: Path, foundation: Foundation, signer: str, patients: Sequence[int], **policy: object
) -> SiteHome:
    """Patients with three tiles each, the same pixels for the same patient in any home."""
    home = make_site_home(
        path, foundation, signer, num_patients=1, allowed_stages=ALL_STAGES, **policy
    )
    shutil.rmtree(home.tile_store_path)
    side = foundation.manifest.tile_px
    with TileStoreWriter(home.tile_store_path, cohort="main", tile_px=side, mpp=1.0) as writer:
        for patient in patients:
            rng = np.random.default_rng(patient)
            for number in range(3):
                which = number if patient == LAST else patient % 3
                record = TileRecord(
                    tile_id=f"{patient}-{number}", patient=f"patient{patient}", case="",
                    slide=f"slide{patient}", x=number, y=0, level0_width=1, level0_height=1,
                    mpp=1.0, caption=CAPTIONS[which], label="", tissue_fraction=1, sharpness=1,
                )  # fmt: skip
                pixels = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
                writer.add(record, encode_tile(pixels))
    fill_cache(home, foundation, lambda *_: None)
    return home


@pytest.fixture
def home(tmp_path: Path, foundation: Foundation, coordinator: Coordinator) -> SiteHome:
    return write_home(tmp_path / "site", foundation, coordinator.public_key, range(LAST + 1))


def plan_with(foundation: Foundation, **noise: float) -> Plan:
    """All tiles of a patient are told of, so that nothing is left to the draw."""
    values = plan_values(foundation.manifest.hash)
    told = [{"name": name, "noise_multiplier": each} for name, each in noise.items()]
    alignment = {**values["stage"][1], "alignment_loss": "contrast"}  # type: ignore[index]
    changes = {
        "study": {**values["study"], "captions": CAPTIONS},  # type: ignore[dict-item]
        "stage": [*told, values["stage"][0], alignment],  # type: ignore[index]
        "privacy": {**values["privacy"], "tiles_per_patient": 3},  # type: ignore[dict-item]
    }
    return Plan.parse(values | changes)


@pytest.fixture
def plan(foundation: Foundation) -> Plan:
    return plan_with(foundation, anchors=4.0, colour=5.0)


def quiet() -> Randomness:
    """No noise: what a coordinator would see that sees through it."""
    return Randomness(
        noise=NoNoise(),
        sampler=PoissonSampler(),
        generator=lambda _step, _patient: torch.Generator().manual_seed(3),
    )


def start_of(coordinator: Coordinator, foundation: Foundation, plan: Plan) -> State:
    return coordinator.start(plan) | release_schema(plan, foundation)


def ask(
    home: SiteHome, coordinator: Coordinator, plan: Plan, number: int, randomness: Randomness
) -> State:
    """One answer of a site that was opened for it."""
    site = Site(home, coordinator.foundation, randomness=randomness)
    state = start_of(coordinator, coordinator.foundation, plan)
    request = coordinator.request(plan, state, number=number)
    return site.answer(coordinator.message(plan, state, request=request)).delta


def vectors(home: SiteHome, foundation: Foundation, name: str) -> list[Tensor]:
    """What each patient is told by, straight from store and cache."""
    store = TileStore.open(home.tile_store_path)
    cache = LatentCache.open(store, foundation.manifest.hash)
    found = []
    for patient in range(store.num_patients):
        rows = store.tile_rows_of(patient)
        texts = [store.captions[each] for each in store.caption_ids(rows)]
        class_B = torch.tensor([CAPTIONS.index(text) for text in texts])
        if name == COLOUR:
            found.append(colour_vector(store.read_images(rows)))
        else:
            found.append(anchor_vector(cache.tile_embeddings(rows), class_B, len(CAPTIONS)))
    return found


@pytest.mark.parametrize(("number", "name"), [(1, ANCHORS), (2, COLOUR)])
def test_a_release_is_the_clipped_sum_over_patients(
    home: SiteHome, foundation: Foundation, coordinator: Coordinator, plan: Plan, number, name
) -> None:
    told = ask(home, coordinator, plan, number, quiet())
    each = vectors(home, foundation, name)
    assert name == COLOUR or max(float(vector.norm()) for vector in each) > 1.2, "one must be cut"
    expected = sum(vector / max(1.0, float(vector.norm())) for vector in each) / DECLARED
    assert list(told) == [name]
    assert torch.allclose(told[name].flatten(), expected, atol=1e-5)


def test_a_patient_of_all_classes_moves_the_sum_by_one_at_most(
    tmp_path: Path, foundation: Foundation, coordinator: Coordinator, plan: Plan, home: SiteHome
) -> None:
    """The whole stacked vector is cut, not each class of it."""
    without = write_home(tmp_path / "without", foundation, coordinator.public_key, range(LAST))
    more, less = (ask(each, coordinator, plan, 1, quiet())[ANCHORS] for each in (home, without))
    moved = float((more.double() - less.double()).norm()) * DECLARED
    assert 0.999 < moved <= 1.0 + 1e-6


@pytest.mark.parametrize(("number", "name", "noise"), [(1, ANCHORS, 40.0), (2, COLOUR, 50.0)])
def test_a_release_has_its_noise(
    home: SiteHome, foundation: Foundation, coordinator: Coordinator, number, name, noise
) -> None:
    plan = plan_with(foundation, anchors=40.0, colour=50.0)
    told = ask(home, coordinator, plan, number, Randomness.from_os())[name]
    clean = sum(v / max(1.0, float(v.norm())) for v in vectors(home, foundation, name)) / DECLARED
    ratio = float((told.flatten() - clean).norm()) * DECLARED / (noise * math.sqrt(told.numel()))
    slack = 5 / math.sqrt(2 * told.numel())  # five deviations of a root mean square
    assert 1 - min(slack, 0.99) < ratio < 1 + slack


def test_each_release_is_charged_as_a_round_of_its_own(
    home: SiteHome, coordinator: Coordinator, plan: Plan
) -> None:
    for number in (1, 2):
        ask(home, coordinator, plan, number, Randomness.from_os())
    entries = Site(home, coordinator.foundation)._ledger.entries()[1:]
    assert [(each.kind, each.stage, each.event) for each in entries] == [
        (kind, stage, PrivacyEvent(noise_multiplier=noise, sample_rate=1.0, steps=1))
        for stage, noise in (("anchors", 4.0), ("colour", 5.0))
        for kind in (EntryKind.RESERVED, EntryKind.COMMITTED)
    ]
    assert seconds_per_step(entries) is None, "how long training takes is not known yet"


@pytest.mark.slow
def test_asked_again_the_same_bytes_leave_and_nothing_is_charged(
    home: SiteHome, coordinator: Coordinator, plan: Plan
) -> None:
    first = ask(home, coordinator, plan, 1, Randomness.from_os())[ANCHORS]
    again = ask(home, coordinator, plan, 1, Randomness.from_os())[ANCHORS]
    assert torch.equal(first, again)
    assert len(Site(home, coordinator.foundation)._ledger.events("main")) == 1


def test_a_second_release_of_one_run_is_refused(
    home: SiteHome, foundation: Foundation, coordinator: Coordinator, plan: Plan
) -> None:
    """From another adapter it is another request."""
    ask(home, coordinator, plan, 1, quiet())
    site = Site(home, foundation, randomness=quiet())
    state = start_of(coordinator, foundation, plan)
    state[ANCHORS] = state[ANCHORS] + 1.0
    with pytest.raises(PolicyError) as refused:
        site.answer(coordinator.message(plan, state, request=coordinator.request(plan, state)))
    assert refused.value.rule == Rule.REPLAY
    assert len(site._ledger.events("main")) == 1


@pytest.mark.slow
def test_a_release_beyond_the_target_is_refused_before_anything_runs(
    home: SiteHome, foundation: Foundation, coordinator: Coordinator
) -> None:
    plan = plan_with(foundation, anchors=0.2)
    with pytest.raises(PlanBudgetExceededError):
        ask(home, coordinator, plan, 1, quiet())
    assert Site(home, foundation)._ledger.events("main") == ()


def test_a_plan_with_releases_runs_once(
    home: SiteHome, foundation: Foundation, coordinator: Coordinator
) -> None:
    """Or what a first run told decides between a second release and more steps of training.

    Each alone would keep the target; the choice does not (ADR 23).
    """
    plan = plan_with(foundation, anchors=1.0)
    site, state = Site(home, foundation, randomness=quiet()), coordinator.start(plan)
    state |= release_schema(plan, foundation)

    def ask_in(run: str, state: State) -> None:
        request = coordinator.request(plan, state, run_id=run)
        site.answer(coordinator.message(plan, state, request=request))

    home.approvals.approve(plan)
    ask_in("run-1", state)
    with pytest.raises(PolicyError, match="make a new plan"):
        home.approvals.approve(plan, runs_so_far=1)
    approval = home.approvals.all()[plan.hash].model_copy(update={"runs": 3})
    (home.path / "approved.json").write_text(
        json.dumps({plan.hash: approval.model_dump(mode="json")})
    )
    with pytest.raises(PolicyError, match="make a new plan") as refused:
        ask_in("run-2", state)
    assert refused.value.rule is Rule.RUN
    assert len(site._ledger.events("main")) == 1


def test_a_plan_with_releases_goes_on_after_its_approval_was_taken_back(
    home: SiteHome, foundation: Foundation, coordinator: Coordinator
) -> None:
    """With the run that it has begun, and no other."""
    plan = plan_with(foundation, anchors=1.0)
    home.approvals.approve(plan)
    ask(home, coordinator, plan, 1, quiet())
    home.approvals.take_back(plan.hash)
    home.approvals.approve(plan, runs_so_far=1)
    assert home.approvals.runs_of(plan) == 1
    ask(home, coordinator, plan, 1, quiet())  # what was sealed


def test_a_release_is_charged_once_whatever_became_of_it(
    home: SiteHome, foundation: Foundation, coordinator: Coordinator, monkeypatch
) -> None:
    """A second charge of it, from another adapter after a crash, would have no room of its own."""

    def killed(*_: object) -> Tensor:
        raise KeyboardInterrupt

    plan = plan_with(foundation, anchors=1.0)
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "vector_of", killed)
        with pytest.raises(KeyboardInterrupt):
            ask(home, coordinator, plan, 1, quiet())
    state = start_of(coordinator, foundation, plan)
    other = {name: value + 1 for name, value in state.items()}
    request = coordinator.request(plan, other)
    with pytest.raises(StageSpentError, match="stage anchors was charged 1 times"):
        Site(home, foundation).answer(coordinator.message(plan, other, request=request))
    assert ask(home, coordinator, plan, 1, quiet())
    assert len(Site(home, foundation)._ledger.events("main")) == 1


def test_a_release_that_fails_once_patients_were_drawn_is_charged_and_closed(
    home: SiteHome, foundation: Foundation, coordinator: Coordinator, plan: Plan, monkeypatch
) -> None:
    """As a round: why it failed may tell who was drawn, so it is not tried again."""

    def fails(*_: object) -> Tensor:
        raise OSError("a disk")

    monkeypatch.setattr(trainer, "vector_of", fails)
    with pytest.raises(TrainingError, match="charged and closed"):
        ask(home, coordinator, plan, 1, quiet())
    monkeypatch.undo()
    with pytest.raises(PolicyError) as refused:
        ask(home, coordinator, plan, 1, quiet())
    assert refused.value.rule == Rule.REPLAY
    entries = Site(home, foundation)._ledger.entries()[1:]
    assert [each.kind for each in entries] == [EntryKind.RESERVED, EntryKind.COMMITTED]
    assert entries[1].release_hash == REFUSED_RELEASE


def test_who_withdrew_is_not_told_of(
    tmp_path: Path, foundation: Foundation, coordinator: Coordinator, plan: Plan, home: SiteHome
) -> None:
    Site(home, foundation)  # enrols everybody
    PatientRegister(home.register_path).withdraw(f"patient{LAST}")
    without = write_home(tmp_path / "without", foundation, coordinator.public_key, range(LAST))
    for number, name in ((1, ANCHORS), (2, COLOUR)):
        told, expected = (
            ask(each, coordinator, plan, number, quiet())[name] for each in (home, without)
        )
        assert torch.equal(told, expected)


def test_a_tile_that_cannot_be_read_counts_as_if_it_were_not_there(
    foundation: Foundation, coordinator: Coordinator, plan: Plan, home: SiteHome
) -> None:
    """Of the last patient no pixel is left; of its embeddings one."""
    store = TileStore.open(home.tile_store_path)
    cache = LatentCache.open(store, foundation.manifest.hash)
    rows = store.tile_rows_of(LAST)
    (file,) = home.tile_store_path.glob("latents/*/tile_embeddings.f16")
    width = cache.tile_embeddings(rows).shape[1]
    kept = cache.tile_embeddings(rows[:1])
    array = np.memmap(file, dtype=np.float16, mode="r+", shape=(store.num_tiles, width))
    array[rows[1:]] = np.nan
    array.flush()
    told = ask(home, coordinator, plan, 1, quiet())[ANCHORS]
    others = vectors(home, foundation, ANCHORS)[:LAST]
    own = anchor_vector(kept, torch.tensor([0]), len(CAPTIONS))
    expected = sum(v / max(1.0, float(v.norm())) for v in [*others, own]) / DECLARED
    assert torch.allclose(told.flatten(), expected, atol=1e-5)

    clean = vectors(home, foundation, COLOUR)[:LAST]
    (shard,) = home.tile_store_path.glob("shards/*.tar")
    with shard.open("r+b") as stream:
        for row in rows:
            stream.seek(int(store._offset_N[row]))
            stream.write(b"\0" * 64)
    told = ask(home, coordinator, plan, 2, quiet())[COLOUR]
    expected = sum(v / max(1.0, float(v.norm())) for v in clean) / DECLARED
    assert torch.allclose(told.flatten(), expected, atol=1e-5)


def test_a_site_that_did_not_allow_releases_refuses_them(
    tmp_path: Path, foundation: Foundation, coordinator: Coordinator, plan: Plan
) -> None:
    home = make_site_home(tmp_path / "plain", foundation, coordinator.public_key)
    with pytest.raises(PolicyError, match="stage anchors is not allowed"):
        ask(home, coordinator, plan, 1, quiet())


@pytest.mark.slow
def test_the_sites_floor_of_noise_holds_for_releases(
    tmp_path: Path, foundation: Foundation, coordinator: Coordinator, plan: Plan
) -> None:
    home = write_home(
        tmp_path / "strict", foundation, coordinator.public_key, [0], min_noise_multiplier=4.5
    )
    with pytest.raises(PolicyError) as refused:
        ask(home, coordinator, plan, 1, quiet())
    assert refused.value.rule == Rule.NOISE
    assert ask(home, coordinator, plan, 2, quiet())[COLOUR].any()
    released = mechanisms_of(plan, declared_patients=DECLARED)[1:]
    assert [each.noise_multiplier for each in released] == [4.0, 5.0]


def judged(home: SiteHome, coordinator: Coordinator, plan: Plan) -> OfferedPlan:
    text = plan.to_json()
    signature = signing.sign(coordinator._key, text.encode())
    signed = SignedPlan(json=text, signature=signature, public_key=coordinator.public_key)
    return judge(home, signed)


def test_a_person_reads_what_leaves_before_training_and_what_it_costs(
    home: SiteHome, coordinator: Coordinator, plan: Plan
) -> None:
    text = " ".join(plan_words(home, plan, judged(home, coordinator, plan)))
    assert "asks for 2 rounds of 2 steps of pretraining, then" in text
    assert "mean embedding of the tiles of each of 3 captions" in text
    alone = epsilon([PrivacyEvent(noise_multiplier=4.0, sample_rate=1.0, steps=1)], 1e-3)
    assert f"epsilon {alone:.2f} of the plan's if it stood alone" in text


def test_a_person_reads_who_adds_the_noise(
    tmp_path: Path, foundation: Foundation, coordinator: Coordinator
) -> None:
    home = summing_home(tmp_path / "summing", foundation, coordinator, allowed_stages=ALL_STAGES)
    values = distributed_values(foundation.manifest.hash)
    study: dict[str, object] = {**values["study"], "captions": CAPTIONS}  # type: ignore[dict-item]
    told = [{"name": "anchors", "noise_multiplier": 8.0}, *values["stage"]]  # type: ignore[misc]
    plan = Plan.parse(values | {"study": study, "stage": told})
    text = " ".join(plan_words(home, plan, judged(home, coordinator, plan)))
    assert "over all hospitals' patients in one sum: the mean embedding" in text
    assert "its share of noise: all members of a sum but 1 add" in text


@pytest.mark.slow
def test_what_is_left_counts_releases_that_are_still_to_come(
    home: SiteHome, coordinator: Coordinator, plan: Plan, tmp_path: Path
) -> None:
    path = tmp_path / "plan.toml"
    path.write_text(commented_toml(plan))
    assert Plan.load(path).hash == plan.hash
    before = left_for(home, path)
    assert before["steps_left_of_this_plan"] == plan.total_steps
    ask(home, coordinator, plan, 1, quiet())
    assert left_for(home, path) == before


@pytest.mark.slow
def test_the_answer_of_a_release_waits_as_a_rounds_does(
    tmp_path: Path, foundation: Foundation, coordinator: Coordinator, plan: Plan, monkeypatch
) -> None:
    """Timed on public patients before anybody is drawn; no network runs."""
    home = write_home(tmp_path / "site", foundation, coordinator.public_key, range(2))
    home = replace(home, config=home.config.model_copy(update={"answer_every_s": "auto"}))
    paces: list[Pace] = []
    of = Pace.of
    monkeypatch.setattr(Pace, "of", lambda step, now: paces.append(of(step, now)) or paces[-1])
    for number in (1, 2):
        ask(home, coordinator, plan, number, Randomness.from_os())
    assert [pace.group_size for pace in paces] == [1, 1]
    assert all(pace.step_s > 0 for pace in paces)


def test_a_request_for_a_release_names_it(coordinator: Coordinator, plan: Plan) -> None:
    request = coordinator.request(plan, coordinator.start(plan))
    assert RoundRequest.from_scalars(request.to_scalars()).factor == "anchors"


def with_retrieval(plan: Plan, **keys: float) -> Plan:
    """The same with public steps between what is told and what is trained."""
    values = plan.model_dump(mode="json")
    values["study"]["pool"] = "b" * 64
    picks = {"name": "retrieval", "learning_rate": 0.01, "public_steps": 50_000} | keys
    values["stage"].insert(len(plan.releases), picks)
    return Plan.parse(values)


@pytest.mark.slow
def test_no_round_of_public_tiles_asks_a_patient(
    home: SiteHome, coordinator: Coordinator, plan: Plan
) -> None:
    """A policy need not name the stage, and no plan can have a site train in it."""
    public = with_retrieval(plan)
    with pytest.raises(PolicyError) as refused:
        ask(home, coordinator, public, 3, quiet())
    assert refused.value.rule is Rule.ROUND
    charged = {entry.plan_hash for entry in open_ledger(home).entries()}
    assert public.hash not in charged
    assert ask(home, coordinator, public, 4, quiet()), "the next round is one of the site's"


def test_a_person_reads_that_public_tiles_cost_nothing(
    home: SiteHome, coordinator: Coordinator, plan: Plan
) -> None:
    public = with_retrieval(plan)
    offered = judged(home, coordinator, public)
    assert offered.epsilon_after == judged(home, coordinator, plan).epsilon_after
    text = " ".join(plan_words(home, public, offered))
    assert "asks for 2 rounds of 2 steps of pretraining, then" in text
    assert f"picks at most 60 tiles a caption from public pool {'b' * 16}" in text
    assert "trains on them alone: nothing is asked of this site, and it costs no epsilon" in text
    aligned = with_retrieval(plan, lambda_align=0.1)
    text = " ".join(plan_words(home, aligned, judged(home, coordinator, aligned)))
    assert "each drawn nearer to what was told of its caption, with some more steps in" in text
