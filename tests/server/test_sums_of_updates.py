"""Rounds of sums to which every site adds its own private update, weighted."""

from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Error, RecordDict

from crafts_core.exchange import RoundRequest
from crafts_core.state import State
from crafts_privacy.secure_aggregation.masking import Group
from crafts_server.checkpoints import Checkpoint
from crafts_server.errors import AggregationError, VoidSumsError
from crafts_server.receipts import RoundReceipt
from crafts_server.rounds import run_rounds
from support.fake_grid import FakeGrid
from support.studies import small_state, small_study
from support.summing_sites import (
    SummingSite,
    UpdatingSite,
    plan_of_updates,
    roster_of,
    summing_sites,
)

PATIENTS = [30, 40, 50]


def updating_sites(
    num_sites: int = 3, kinds: dict[int, type[SummingSite]] | None = None, **plan: object
) -> dict[int, SummingSite]:
    everybody = dict.fromkeys(range(num_sites), UpdatingSite)
    return summing_sites(
        plan_of_updates(**plan),  # type: ignore[arg-type]
        num_sites,
        kinds={**everybody, **(kinds or {})},
    )


def quiet(sites: dict[int, SummingSite]) -> dict[int, SummingSite]:
    for site in sites.values():
        site.noise = lambda _own, num: torch.zeros(num, dtype=torch.float64)  # type: ignore[method-assign]
    return sites


def run(home: Path, sites: dict[int, SummingSite]) -> tuple[list[Checkpoint], list[RoundReceipt]]:
    site = sites[min(sites)]
    study = small_study(home, plan=site.plan, roster=site.roster)
    receipts: list[RoundReceipt] = []
    try:
        run_rounds(FakeGrid(sites), study, initial_state=small_state, on_round=receipts.append)
        return study.store.chain(), receipts
    finally:
        study.registry.close()


def moved(start: State, factor: str, weights: list[float]) -> State:
    """What the plain rule without momentum makes of quiet sites' updates."""
    return {
        name: tensor
        + sum(w * (goal - tensor) / 1000.0 for goal, w in enumerate(weights))
        * name.endswith(f".{factor}")
        for name, tensor in start.items()
    }


@pytest.mark.parametrize(
    ("rule", "weights"),
    [
        ("by_patients", [30 / 120, 40 / 120, 50 / 120]),
        ("uniform", [1 / 3] * 3),
        ("alignment_regularized", [9 / 50, 16 / 50, 25 / 50]),
    ],
)
def test_a_study_moves_by_the_weighted_sum_and_says_how(
    tmp_path: Path, rule: str, weights: list[float]
) -> None:
    """Precision goes with the square of the size, and the gate of every site is neutral."""
    chain, receipts = run(tmp_path / "home", quiet(updating_sites(rule=rule)))
    assert len(receipts) == 4
    for receipt in receipts:
        (told,) = receipt.sums
        assert (told.attempt, told.missing, told.is_plausible) == (1, (), True)
        assert [site.weight for site in receipt.sites] == pytest.approx(weights, rel=1e-6)
        assert [site.declared_patients for site in receipt.sites] == PATIENTS
        assert {site.steps for site in receipt.sites} == {3}
        assert all((site.gain, site.update_norm) == (None, None) for site in receipt.sites)
    if rule != "alignment_regularized":  # it goes on from the sum as in a plain round
        expected = moved(chain[0].state(), "second", weights)
        for name, tensor in chain[1].state().items():
            assert torch.allclose(tensor, expected[name], atol=1e-6)


def test_every_site_adds_all_of_its_noise(tmp_path: Path) -> None:
    sites = updating_sites()
    _, receipts = run(tmp_path / "home", sites)
    sigma = sites[10].noise_multiplier
    for receipt in receipts:
        assert [site.noise_multiplier for site in receipt.sites] == [sigma] * 3
        assert receipt.sums[0].noise_multiplier == pytest.approx(sigma * 3**0.5)


class Sharing(UpdatingSite):
    """Says that it added a share, as others add noise too."""

    def reply(self, *args: object, **changes: object) -> RecordDict:
        share = self.noise_multiplier / 2**0.5
        return super().reply(*args, **{"own_noise_multiplier": share, **changes})  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_share_of_the_noise_is_not_enough(tmp_path: Path) -> None:
    sites = updating_sites(kinds={1: Sharing}, rounds=1, max_attempts=1)
    with pytest.raises(VoidSumsError, match="at least this member's share"):
        run(tmp_path / "home", sites)


class GarbageAtFirst(UpdatingSite):
    """Made up in round 1, which casts suspicion on everybody; good from then on."""

    last = 1

    def vector(self, request: RoundRequest, *rest: object) -> tuple[float, Group]:
        own, vector_D = super().vector(request, *rest)  # type: ignore[arg-type]
        if request.round <= self.last:
            made_up = np.random.default_rng(1)
            vector_D = made_up.integers(0, 2**32, len(vector_D), dtype=np.uint32)
        return own, vector_D


class Garbage(GarbageAtFirst):
    last = 100


@pytest.mark.slow
def test_a_sum_that_cannot_come_from_the_mechanism_moves_nothing(tmp_path: Path) -> None:
    chain, receipts = run(tmp_path / "home", updating_sites(kinds={1: Garbage}, rounds=1))
    for name, tensor in chain[-1].state().items():
        assert torch.equal(tensor, small_state()[name])
    for receipt in receipts:
        assert (receipt.step_scale, receipt.sums[0].is_plausible) == (0.0, False)


@pytest.mark.slow
def test_two_good_halves_are_one_weighted_sum(tmp_path: Path) -> None:
    """Each half has weights and a grid of its own, and counts as its patients say."""
    sites = quiet(
        updating_sites(8, {5: GarbageAtFirst}, rule="by_patients", rounds=2, diagnose_after=1)
    )
    chain, receipts = run(tmp_path / "home", sites)
    halves = receipts[1]
    assert [each.is_plausible for each in halves.sums] == [True, True]
    total = sum(site.patients for site in sites.values())
    weights = [site.patients / total for site in sites.values()]
    assert [site.weight for site in halves.sites] == pytest.approx(weights)
    expected = moved(chain[1].state(), halves.factor, weights)
    for name, tensor in chain[2].state().items():
        assert torch.allclose(tensor, expected[name], atol=1e-6)


@pytest.mark.slow
def test_a_site_that_spoils_every_sum_is_found_by_halves(tmp_path: Path) -> None:
    sites = updating_sites(8, {5: Garbage}, rounds=6, diagnose_after=1)
    _, receipts = run(tmp_path / "home", sites)
    halves = [receipt for receipt in receipts if len(receipt.sums) == 2]
    assert 1 <= len(halves) <= 4
    for receipt in halves:
        assert receipt.step_scale == 1.0, "the good half counts"
        assert sum(site.weight for site in receipt.sites) == pytest.approx(1.0)
    assert receipts[-1].left_out == ("fulda",)


class LateInRound(UpdatingSite):
    """Not there when round 2 asks who is ready."""

    def ready(self, request: RoundRequest, state: State) -> RecordDict | Error | None:
        return None if request.round == 2 else super().ready(request, state)


def test_a_sum_that_is_little_but_one_update_is_announced_to_nobody(tmp_path: Path) -> None:
    """Its site would refuse, and all pay for a void sum: of 270 patients 150, then of 230."""
    sites = updating_sites(4, {1: LateInRound}, rule="by_patients", rounds=2, deadline_s=0.05)
    sites[13].patients = 150
    roster = roster_of(sites[13].plan, sites)
    for site in sites.values():
        site.roster = roster
    with pytest.raises(AggregationError, match=r"round 2: .* dresden would be more than 0\.6"):
        run(tmp_path / "home", sites)
    assert {number for site in sites.values() for number, _, _ in site.sent} == {1}


@pytest.mark.slow
def test_halves_of_which_one_site_is_most_are_not_announced(tmp_path: Path) -> None:
    """While a bad site is looked for all stay together; no half is left to itself."""
    sites = updating_sites(8, {5: Garbage}, rule="by_patients", rounds=3, diagnose_after=1)
    sites[17].patients = 600
    roster = roster_of(sites[17].plan, sites)
    for site in sites.values():
        site.roster = roster
    _, receipts = run(tmp_path / "home", sites)
    assert {len(receipt.sums) for receipt in receipts} == {1}
