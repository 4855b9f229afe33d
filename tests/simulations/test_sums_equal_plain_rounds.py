"""A sum of site trust is the weighted sum of what the same sites answer in plain rounds: exactly.

Coordinator and sites are the programs' own. Every round is asked for once more, of the same sites,
from the same adapter and on the same draws, by a plan without secure aggregation; the updates that
leave then are put on the grid here.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from crafts_client.outbox import Release
from crafts_client.site import Site
from crafts_core.plan import Plan
from crafts_core.releases import decoded
from crafts_core.state import State, add_delta, factor_names, release_name
from crafts_privacy.plan_noise import plan_noise_multiplier
from crafts_privacy.secure_aggregation import masking
from crafts_privacy.secure_aggregation.masking import Group
from crafts_privacy.secure_aggregation.updates import UpdateGrid
from crafts_server import sum_phases
from support.federations import Federation, Noted, randomness
from support.foundations import tiny_foundation
from support.sites import Coordinator, plan_values

STEPS = 2
CAPTIONS = ("tissue with glands", "tissue with sheets", "tissue with spindle cells")
TARGET = 150.0
"""Little noise, so that nine patients can be seen."""
RELEASES = {"anchors": 0.2, "colour": 0.15}
"""Noise of each."""
RELEASE_SHAPES = {"anchors": (len(CAPTIONS), -1), "colour": (1, -1)}


class Again:
    """The noise that a site drew, once more and step by step."""

    def __init__(self, noted: Noted) -> None:
        self._drawn = iter(noted.drawn)

    def add_(self, grid_sum_D: Tensor, _std: float) -> None:
        grid_sum_D += next(self._drawn)


def plans_of(
    foundation_hash: str, num_sites: int, *, rule: str, num_stages: int, tells: bool
) -> tuple[Plan, Plan]:
    """With sums and without them; alike in all that a site computes."""
    values = plan_values(foundation_hash)
    values["study"] |= {"captions": CAPTIONS}  # type: ignore[operator]
    stage = {
        "rounds": 2 if num_stages > 1 else 1,
        "local_steps": STEPS,
        "learning_rate": 0.05,
        "momentum": 0.6,
    }
    told = [{"name": name, "noise_multiplier": noise} for name, noise in RELEASES.items() if tells]
    trained = [
        {"name": "pretraining", **stage},
        {"name": "alignment", **stage, "lambda_align": 0.1, "lambda_drift": 0.1},
    ]
    values["stage"] = [*told, *trained[:num_stages]]
    few = {"tiles_per_patient": 2, "draws_per_tile": 1, "target_epsilon": TARGET if tells else 8.0}
    values["privacy"] |= few  # type: ignore[operator]
    aggregation = {"rule": rule, "min_sites": num_sites}
    plain = Plan.parse(values | {"aggregation": aggregation})
    summed = Plan.parse(values | {"aggregation": aggregation | {"secure_aggregation": True}})
    return summed, plain


def weights_of(rule: str, patients: Sequence[int]) -> list[float]:
    """By precision, with nobody near a cap, as the squares of the sizes."""
    scores = [n**2 if rule == "alignment_regularized" else n for n in patients]
    return [score / sum(scores) for score in scores]


def check(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    num_sites: int,
    *,
    rule: str,
    num_stages: int,
    tells: bool = False,
) -> None:
    foundation = tiny_foundation(tmp_path / "foundation")
    summed, plain = plans_of(
        foundation.manifest.hash, num_sites, rule=rule, num_stages=num_stages, tells=tells
    )
    asking = Coordinator(tmp_path, foundation)
    federation = Federation(
        *(tmp_path, foundation, num_sites),
        also_signs=asking.public_key,
        max_delta=5e-3,
        max_epsilon=2 * TARGET,
    )
    vectors: list[Group] = []

    def noted(total_D: Group, vector_D: Group) -> None:
        vectors.append(vector_D.copy())
        masking.add_up_(total_D, vector_D)

    monkeypatch.setattr(sum_phases, "add_up_", noted)
    chain = federation.run(summed)
    assert len(vectors) == num_sites * summed.num_rounds

    sites = {
        each.config.name: Site(
            each, foundation, randomness=randomness(Again(federation.noise[each.config.name]))
        )
        for each in federation.homes
    }
    patients = {each.config.name: each.config.declared_patients for each in federation.homes}
    stage_start: State = {}
    for planned in summed.rounds():
        state = chain[planned.round - 1].state()
        stage_start = state if planned.starts_stage else stage_start
        request = asking.request(plain, state, number=planned.round, stage_start=stage_start)
        message = asking.message(plain, state, request=request, stage_start=stage_start)
        noise = RELEASES.get(planned.stage.name, plan_noise_multiplier(summed))
        grid = UpdateGrid.of(summed, planned.stage, patients, noise_multiplier=noise)
        counts_by = "by_patients" if planned.stage.name in RELEASES else rule
        weights = dict(zip(patients, weights_of(counts_by, list(patients.values())), strict=True))
        assert grid.weights == pytest.approx(weights, rel=1e-6)
        mine = vectors[(planned.round - 1) * num_sites : planned.round * num_sites]
        expected_D = torch.zeros(len(mine[0]), dtype=torch.float64)
        for name, site in sites.items():
            update_D = flat(answer_of(site, message))
            expected_D += (update_D * (grid.weights[name] / grid.step)).round()
        opened_D = opened(mine)
        assert expected_D.any()
        assert float((opened_D - expected_D).abs().max()) == 0.0
        for vector_D in mine if len(mine[0]) > 100 else ():  # a few numbers may look like anything
            assert np.mean(np.abs(vector_D.view(np.int32).astype(float)) > 2**28) > 0.8, "masked"
        if planned.stage.name in RELEASES:
            told = decoded(
                planned.factor,
                (opened_D * grid.step).float().reshape(RELEASE_SHAPES[planned.stage.name]),
                math.sqrt(sum((weights[name] * noise / n) ** 2 for name, n in patients.items())),
                foundation,
                summed,
            )
            told_now = chain[planned.round].state()[release_name(planned.stage.name)]
            assert torch.equal(told_now, told.values)
            assert not any(told.is_public), "or nothing of any hospital was looked at"
            receipt = chain[planned.round].receipt().release
            assert receipt is not None
            assert receipt.signal == pytest.approx(told.signal, rel=1e-6)
        elif rule == "by_patients":  # which takes the step as it is
            names = sorted(factor_names(state, planned.factor))
            parts = (opened_D * grid.step).float().split([state[each].numel() for each in names])
            delta: State = {
                each: part.reshape(state[each].shape)
                for each, part in zip(names, parts, strict=True)
            }
            after = chain[planned.round].state()
            for each, tensor in add_delta(state, delta).items():
                assert torch.equal(after[each], tensor), each


def answer_of(site: Site, message: object) -> State:
    release = site.answer(message)  # type: ignore[arg-type]
    assert isinstance(release, Release)
    return release.delta


def flat(update: State) -> Tensor:
    return torch.cat([update[name].reshape(-1) for name in sorted(update)]).double()


def opened(vectors: Sequence[Group]) -> Tensor:
    """Modulo 2**32, in Python's integers' way of adding: no code of the program."""
    total = np.sum([vector.astype(np.uint64) for vector in vectors], axis=0) % 2**32
    return torch.from_numpy(total.astype(np.uint32).view(np.int32).astype(np.float64))


@pytest.mark.slow
def test_three_sites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(tmp_path, monkeypatch, 3, rule="by_patients", num_stages=1)


@pytest.mark.slow
def test_releases_in_sums(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted by patients under a rule that counts otherwise, and read with the sum's noise."""
    check(tmp_path, monkeypatch, 3, rule="alignment_regularized", num_stages=1, tells=True)


@pytest.mark.exhaustive
@pytest.mark.parametrize("rule", ["by_patients", "alignment_regularized"])
def test_ten_sites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rule: str) -> None:
    check(tmp_path, monkeypatch, 10, rule=rule, num_stages=2)
