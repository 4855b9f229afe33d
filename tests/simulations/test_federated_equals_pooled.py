"""A distributed study by real sites ends where one engine over all their patients ends: to the bit.

Coordinator and sites are the programs' own, over the local grid. The reference is the engine of a
single site that holds everybody's patients and is given the noise that the sites drew.
"""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from crafts_client.errors import NotReadyError
from crafts_client.messages import AnnouncementMessage, RoundMessage
from crafts_client.outbox import Release
from crafts_client.patients import PatientTiles
from crafts_client.site import Site
from crafts_client.speed import Speed
from crafts_client.trainer import Trainer
from crafts_client.training_task import TrainingTask
from crafts_core.foundation import Foundation
from crafts_core.plan import Plan
from crafts_core.releases import Decoded, decoded, release_schema
from crafts_core.stages.batch import TileBatch
from crafts_core.starting_point import initial_state
from crafts_core.state import State, release_name
from crafts_core.tiles import TileStore
from crafts_core.tiles.latents import LatentCache
from crafts_privacy import accounting
from crafts_privacy.errors import StageSpentError
from crafts_privacy.ledger import Ledger
from crafts_privacy.mechanism import Mechanism
from crafts_privacy.optimizers import Optimizer, optimizer_of
from crafts_privacy.patient_sgd import PatientSGD
from crafts_privacy.plan_noise import stage_noise_multiplier
from crafts_privacy.ranks import Ranks
from crafts_privacy.sampling import PatientSampler
from crafts_privacy.secure_aggregation.shares import own_noise_multiplier, total_noise_multiplier
from support.federations import Federation, Noted, randomness
from support.foundations import tiny_foundation
from support.sites import plan_values

CAPTIONS = ("tissue with glands", "tissue with sheets", "tissue with spindle cells")


class Given:
    """The noise of all sites together, round by round."""

    def __init__(self, sites: Sequence[Noted]) -> None:
        self._rounds = iter(zip(*(site.drawn for site in sites), strict=True))

    def add_(self, grid_sum_D: Tensor, _std: float) -> None:
        grid_sum_D += torch.stack(next(self._rounds)).sum(dim=0)


class Pooled(PatientTiles):
    """The patients of all sites, site after site."""

    def __init__(self, sites: Sequence[PatientTiles]) -> None:
        self._all = [(site, place) for site in sites for place in range(site.num_patients)]

    def leave_out(self, withdrawn: Collection[str]) -> None:
        assert not withdrawn

    def of_rank(self, ranks: Ranks) -> Sequence[int]:
        assert ranks.count == 1
        return range(len(self._all))

    def pseudonym(self, patient: int) -> str:
        site, place = self._all[patient]
        return site.pseudonym(place)

    def batch(self, patient: int, **options: object) -> TileBatch:
        site, place = self._all[patient]
        return site.batch(place, **options)  # type: ignore[arg-type]

    def classes_of(self, captions: tuple[str, ...]) -> Tensor:
        return torch.cat([site.classes_of(captions) for site, _ in self._all])

    def embeddings(self, patient: int, **options: object) -> tuple[Tensor, Tensor]:
        site, place = self._all[patient]
        return site.embeddings(place, **options)  # type: ignore[arg-type]

    def images(self, patient: int, **options: object) -> npt.NDArray[np.uint8]:
        site, place = self._all[patient]
        return site.images(place, **options)  # type: ignore[arg-type]


class PooledTrainer(Trainer):
    """Goes on with one optimizer, on the grid of sums."""

    optimizer: Optimizer
    grid_bits: int

    def _sgd(
        self,
        task: TrainingTask,
        parameters: Mapping[str, nn.Parameter],
        sampler: PatientSampler,
        ranks: Ranks | None = None,
    ) -> PatientSGD:
        return PatientSGD(
            dict(sorted(parameters.items())),
            task.mechanism,
            learning_rate=task.stage.learning_rate,
            optimizer=self.optimizer,
            noise=self._randomness.noise,
            sampler=sampler,
            ranks=ranks,
            grid_bits=self.grid_bits,
        )


def plan_of(
    foundation: Foundation,
    num_sites: int,
    stages: list[dict[str, object]],
    target_epsilon: float,
) -> Plan:
    values = plan_values(foundation.manifest.hash)
    values["adapter"] |= {"schedule": "second_only"}  # type: ignore[operator]
    values["stage"] = stages
    values["study"] |= {"captions": CAPTIONS}  # type: ignore[operator]
    values["privacy"] |= {  # type: ignore[operator]
        "tiles_per_patient": 2,
        "draws_per_tile": 1,
        "target_epsilon": target_epsilon,
        "trust": "distributed",
        "colluding_sites": max(1, num_sites // 5),
        "sum_grid_bits": 17,
    }
    values["aggregation"] = {
        "rule": "uniform",
        "min_sites": num_sites,
        "secure_aggregation": True,
    }
    return Plan.parse(values)


def stage_of(name: str, optimizer: str, **more: object) -> dict[str, object]:
    settings = {"sgd": {"momentum": 0.6}, "adam": {"momentum": 0.9, "second_moment_decay": 0.99}}
    return {
        "name": name,
        "rounds": 2,
        "local_steps": 1,
        "learning_rate": 0.05,
        "optimizer": optimizer,
        **settings[optimizer],
        **more,
    }


def check(
    tmp_path: Path,
    num_sites: int,
    stages: list[dict[str, object]],
    *,
    target_epsilon: float = 8.0,
    **home: int,
) -> None:
    foundation = tiny_foundation(tmp_path / "foundation")
    plan = plan_of(foundation, num_sites, stages, target_epsilon)
    federation = Federation(
        *(tmp_path, foundation, num_sites),
        max_epsilon=2 * target_epsilon,
        allowed_trust=("distributed",),
        max_epsilon_alone=1e6,
        **home,
    )
    homes, noise = federation.homes, federation.noise
    chain = federation.run(plan)
    federated = chain[-1].state()

    patients = [
        PatientTiles(store, LatentCache.open(store, foundation.manifest.hash), foundation)
        for store in (TileStore.open(each.tile_store_path) for each in homes)
    ]
    total = sum(each.config.declared_patients for each in homes)
    expected, releases = _train_pooled(
        plan, foundation, Pooled(patients), Given(list(noise.values())), num_sites, total
    )
    start = initial_state(foundation, plan.adapter, plan.study.seed, plan.parts)
    assert any(not torch.equal(federated[name], start[name]) for name in start)
    for checkpoint, told in zip(chain[1:], releases, strict=False):
        receipt = checkpoint.receipt().release
        assert receipt is not None
        assert receipt.signal == pytest.approx(told.signal, rel=1e-6)
        assert not any(receipt.is_public), "or nothing of any hospital was looked at"
    for name in expected:
        assert torch.equal(federated[name], expected[name]), name


def _train_pooled(
    plan: Plan,
    foundation: Foundation,
    patients: Pooled,
    noise: Given,
    num_sites: int,
    declared_patients: int,
) -> tuple[State, list[Decoded]]:
    """The plan's steps by one engine. Nothing of server or sums."""
    releases = []
    trainer = PooledTrainer(
        foundation,
        plan.adapter,
        patients,
        parts=plan.parts,
        randomness=randomness(noise),
        speed=Speed(microbatch_tiles=64),
    )
    trainer.grid_bits = plan.privacy.sum_grid_bits or 0
    colluding = plan.privacy.colluding_sites or 0
    state = initial_state(foundation, plan.adapter, plan.study.seed, plan.parts)
    state |= release_schema(plan, foundation)
    for planned in plan.rounds():
        privacy = plan.privacy_of(planned.stage)
        share = own_noise_multiplier(
            stage_noise_multiplier(plan, planned.stage),
            num_members=num_sites,
            colluding_sites=colluding,
        )
        mechanism = Mechanism(
            noise_multiplier=total_noise_multiplier([share] * num_sites),
            max_grad_norm=privacy.max_grad_norm,
            sample_rate=privacy.sample_rate,
            expected_patients=privacy.sample_rate * declared_patients,
        )
        if planned.starts_stage:
            stage_start = state
            trainer.optimizer = optimizer_of(planned.stage)
        task = TrainingTask(
            stage=planned.stage,
            factor=planned.factor,
            privacy=privacy,
            mechanism=mechanism,
            charged=mechanism.event(1),
            state=state,
            stage_start=stage_start if planned.stage.lambda_drift > 0 else None,
            captions=plan.captions_of(planned.stage),
        )
        update = trainer.train(task)
        if planned.stage.is_release:
            ((name, mean),) = update.items()
            noise_std = mechanism.noise_multiplier / declared_patients
            releases.append(decoded(planned.factor, mean, noise_std, foundation, plan))
            state |= {name: releases[-1].values}
            continue
        state = {name: state[name] for name in state.keys() - trainer.schema().keys()}
        state |= trainer.schema()
    return state, releases


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", [pytest.param("sgd", marks=pytest.mark.exhaustive), "adam"])
def test_three_sites_equal_pooled_training(tmp_path: Path, optimizer: str) -> None:
    check(
        tmp_path,
        3,
        [
            stage_of("pretraining", optimizer),
            stage_of("alignment", optimizer, lambda_align=0.1, lambda_drift=0.1),
        ],
    )


@pytest.mark.slow
def test_stage_control_equals_pooled_training(tmp_path: Path) -> None:
    check(tmp_path, 3, [stage_of("control", "sgd", modality="nuclei")], num_steered=2)


@pytest.mark.slow
def test_releases_equal_pooled_ones(tmp_path: Path) -> None:
    """Nor do they count every hospital's noise: one sum has the noise that one promise needs."""
    told = [{"name": name, "noise_multiplier": 0.3} for name in ("anchors", "colour")]
    stages = [*told, stage_of("alignment", "sgd", lambda_align=0.3, alignment_loss="contrast")]
    check(tmp_path, 3, stages, target_epsilon=150.0)


def telling(tmp_path: Path, *names: str) -> tuple[Federation, Plan]:
    """Three sites that tell first, with little noise, so that nine patients can be seen."""
    foundation = tiny_foundation(tmp_path / "foundation")
    told: list[dict[str, object]] = [{"name": name, "noise_multiplier": 0.3} for name in names]
    plan = plan_of(foundation, 3, [*told, stage_of("pretraining", "sgd")], 150.0)
    federation = Federation(
        *(tmp_path, foundation, 3),
        max_epsilon=300.0,
        allowed_trust=("distributed",),
        max_epsilon_alone=1e6,
    )
    return federation, plan


class Flooding(Noted):
    """Far more than its share: the sum is longer than its members declare."""

    def add_(self, grid_sum_D: Tensor, std: float) -> None:
        super().add_(grid_sum_D, 1e4 * std)


@pytest.mark.slow
def test_of_a_release_that_nobody_can_use_public_data_stands_in(tmp_path: Path) -> None:
    federation, plan = telling(tmp_path, "anchors", "colour")
    federation.noise["site-02"] = Flooding(7)
    chain = federation.run(plan)
    for checkpoint, name in zip(chain[1:3], ("anchors", "colour"), strict=True):
        receipt = checkpoint.receipt()
        assert receipt.release is not None
        assert all(receipt.release.is_public)
        (total,) = receipt.sums
        assert total.norm is not None
        assert total.highest is not None
        assert total.norm > total.highest
        assert torch.isfinite(checkpoint.state()[release_name(name)]).all()
    text_KD = federation.foundation.aligner.embed_captions(list(CAPTIONS))
    assert torch.allclose(chain[1].state()[release_name("anchors")], text_KD, atol=1e-6)


@pytest.mark.slow
def test_a_release_that_stays_closed_gives_way_to_public_data_and_the_study_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One site never delivers colour: two attempts, all charged, and no third is asked for."""
    federation, plan = telling(tmp_path, "colour")
    add, asked = Site.add_to_sum, []

    def silent(site: Site, message: AnnouncementMessage) -> Release:
        release = add(site, message)
        if message.request.round == 1 and release.reply.site == "site-02":
            asked.append(message.request.attempt)
            raise NotReadyError("lost on the way")
        return release

    monkeypatch.setattr(Site, "add_to_sum", silent)
    chain = federation.run(plan)
    assert asked == [1, 2]
    receipt = chain[1].receipt()
    assert receipt.release is not None
    assert receipt.release.is_public == (True,)
    assert [each.missing for each in receipt.sums] == [("site-02",)] * 2
    assert (receipt.sites, len(chain)) == ((), 1 + plan.num_rounds)
    for home in federation.homes:
        events = Ledger(home.ledger_path).events("main")
        assert [event.noise_multiplier for event in events[:2]] == [0.3, 0.3]
        assert accounting.epsilon(events, 1e-3) <= 150.0


@pytest.mark.slow
def test_a_site_that_may_tell_no_more_does_not_hold_the_study_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was charged for attempts that the coordinator never announced."""
    federation, plan = telling(tmp_path, "colour")
    answer = Site.answer

    def spent(site: Site, message: RoundMessage) -> object:
        if message.request.round == 1 and site._home.config.name == "site-02":
            raise StageSpentError(plan_hash=plan.hash, stage="colour", times=2)
        return answer(site, message)

    monkeypatch.setattr(Site, "answer", spent)
    chain = federation.run(plan)
    release = chain[1].receipt().release
    assert release is not None
    assert release.is_public == (True,)
    assert len(chain) == 1 + plan.num_rounds


@pytest.mark.exhaustive
@pytest.mark.parametrize("num_sites", [10, 30])
def test_many_sites_equal_pooled_training(tmp_path: Path, num_sites: int) -> None:
    check(tmp_path, num_sites, [stage_of("pretraining", "sgd")])
