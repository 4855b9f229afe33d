"""The rules against float64 loops over the formulas of design section 6."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
import torch

from crafts_core.exchange import RoundReply, global_norm
from crafts_core.plan_sections import AggregationConfig
from crafts_core.state import State, add_delta
from crafts_core.weighting import agreed_weights
from crafts_server import aggregation
from crafts_server.aggregation import (
    Aggregate,
    AggregationRule,
    RoundState,
    SiteEvidence,
    SiteUpdate,
    rule_of,
    weighted_sum,
    with_momentum,
)
from crafts_server.errors import AggregationError
from support.studies import QuadraticProbe, small_state

HASH = "0" * 64
NAMES = ("aachen", "bern", "coimbra")
VARIANCES = (1e-3, 4e-3, 1e-2)
PATIENTS = (100, 50, 10)


def config(rule: str = "alignment_regularized", **changes: object) -> AggregationConfig:
    values = {"rule": rule, "min_sites": 1, "precision_floor": 1e-3, "gate_temperature": 0.1}
    return AggregationConfig.model_validate(values | changes)


def update(index: int, delta: State) -> SiteUpdate:
    reply = RoundReply(
        site=NAMES[index],
        run_id="run",
        plan_hash=HASH,
        round=1,
        checkpoint_hash=HASH,
        schema_hash=HASH,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        steps=1,
        sample_rate=0.5,
        declared_patients=PATIENTS[index],
        update_norm=global_norm(delta),
    )
    return SiteUpdate.of(reply, VARIANCES[index], delta)


def aggregate(
    rule: AggregationRule,
    begin: RoundState,
    updates: list[SiteUpdate],
    probe: aggregation.PublicProbe,
    *,
    max_weight_per_share: float = 2.0,
) -> Aggregate:
    return aggregation.aggregate(
        rule, begin, updates, probe, max_weight_per_share=max_weight_per_share
    )


def deltas() -> list[State]:
    generator = torch.Generator().manual_seed(5)
    return [{"layer.second": torch.randn(4, 1, generator=generator) / 3} for _ in range(3)]


def start(momentum: State | None = None) -> RoundState:
    state = small_state()
    return RoundState(
        state=state,
        server_state=momentum or {},
        factor="second",
        margin=QuadraticProbe().margin(state),
    )


def run(config: AggregationConfig, momentum: State | None = None) -> Aggregate:
    updates = [update(index, delta) for index, delta in enumerate(deltas())]
    return aggregate(rule_of(config), start(momentum), updates, QuadraticProbe())


def oracle_weights() -> list[float]:
    """p_k a_k by hand, without logarithms; the cap is out of reach.

    The margin's slope is a difference quotient, exact for a quadratic: ``m(x + d) - m(x - d)`` is
    twice the part of a gain that is linear in d.
    """
    state, probe = small_state(), QuadraticProbe()
    gap = (state["layer.second"] - 1.0).flatten().tolist()
    scores = []
    for variance, delta in zip(VARIANCES, deltas(), strict=True):
        ahead, behind = (probe.margin(add_delta(state, delta, sign)) for sign in (1.0, -1.0))
        gain = (ahead - behind) / 2
        noise = math.sqrt(sum((x / 50) ** 2 for x in gap) * variance)
        scores.append(
            1 / (1e-3 + variance) / (1 + math.exp(-gain / math.sqrt(0.01 + 4 * noise**2)))
        )
    return [score / sum(scores) for score in scores]


def test_weights_are_precision_times_gate() -> None:
    result = run(config(max_weight=1.0))
    assert [result.weights[name] for name in NAMES] == pytest.approx(oracle_weights(), rel=1e-6)


def test_no_site_passes_the_cap() -> None:
    result = run(config(max_weight=0.4))
    assert max(result.weights.values()) == pytest.approx(0.4)
    assert math.fsum(result.weights.values()) == pytest.approx(1.0)


@pytest.mark.parametrize("rule", ["alignment_regularized", "uniform", "by_patients"])
@pytest.mark.parametrize("max_weight", [0.4, 1.0])
def test_without_a_gain_sites_can_compute_the_weights_themselves(
    rule: str, max_weight: float
) -> None:
    """To the last bit what a round weighs by in which nothing is measured, as in stage control."""
    settings = config(rule, max_weight=max_weight)
    begin = replace(start(), factor="nuclei")
    updates = [update(index, delta) for index, delta in enumerate(deltas())]
    result = aggregate(rule_of(settings), begin, updates, QuadraticProbe())
    agreed = agreed_weights(settings, PATIENTS, VARIANCES)
    assert agreed.weights == [result.weights[name] for name in NAMES]
    assert agreed.caps == [result.caps[name] for name in NAMES]


class Partial:
    """A rule from research that gives all the weight to the site that declares least noise."""

    needs_gain = False
    max_weight = 1.0

    def weights(self, evidence: Sequence[SiteEvidence]) -> list[float]:
        least = min(site.noise_variance for site in evidence)
        return [float(site.noise_variance == least) for site in evidence]

    move = aggregation.Uniform.move
    begin_stage = aggregation.Uniform.begin_stage


@pytest.mark.parametrize(("ratio", "expected"), [(1.0, 0.1), (2.0, 0.2), (5.0, 0.5)])
def test_no_rule_lets_a_site_count_more_than_its_share_allows(
    ratio: float, expected: float
) -> None:
    """Ten sites of 120 patients; 0.60 is what one of them had."""
    (delta, *_) = deltas()
    updates = [
        _of_ten(number, delta, variance=1e-9 if number == 7 else 1e-3) for number in range(10)
    ]
    result = aggregate(Partial(), start(), updates, QuadraticProbe(), max_weight_per_share=ratio)
    assert result.weights["site-7"] == pytest.approx(expected) == result.caps["site-7"]
    assert math.fsum(result.weights.values()) == pytest.approx(1.0)


def test_a_gate_that_closes_for_all_others_gives_one_site_twice_its_share() -> None:
    """Its update gains on the probe, which is public; theirs lose. All declare the same noise."""
    towards = {"layer.second": 0.2 * (1.0 - small_state()["layer.second"])}
    against = {"layer.second": -towards["layer.second"]}
    updates = [
        _of_ten(number, towards if number == 7 else against, variance=1e-3) for number in range(10)
    ]
    settings = config(gate_temperature=1e-4, margin_tolerance=10.0)
    result = aggregate(rule_of(settings), start(), updates, QuadraticProbe())
    assert result.weights["site-7"] == pytest.approx(0.2)
    without = aggregate(
        rule_of(settings), start(), updates, QuadraticProbe(), max_weight_per_share=100.0
    )
    assert without.weights["site-7"] == pytest.approx(0.6), "the attack is one"


def _of_ten(number: int, delta: State, *, variance: float) -> SiteUpdate:
    values = update(0, delta).reply.model_dump()
    reply = RoundReply.model_validate(values | {"site": f"site-{number}", "declared_patients": 120})
    return SiteUpdate.of(reply, variance, delta)


def test_the_whole_step_equals_the_formulas_coordinate_by_coordinate() -> None:
    """sum alpha delta -> beta m + Delta -> eta m -> alignment steps -> accept."""
    momentum = {"layer.second": torch.full((4, 1), 0.2), "layer.first": torch.ones(1, 4)}
    settings = config(
        max_weight=1.0, server_momentum=0.5, server_learning_rate=0.8, trust_radius=0.3,
        trust_steps=2, margin_tolerance=10.0,
    )  # fmt: skip
    result = run(settings, momentum)

    weights, parts = oracle_weights(), [d["layer.second"].double().flatten() for d in deltas()]
    base = small_state()["layer.second"].double().flatten()
    expected = []
    step = []
    for i in range(4):
        mean = sum(w * float(part[i]) for w, part in zip(weights, parts, strict=True))
        step.append(0.8 * (0.5 * 0.2 + mean))
    norm = math.sqrt(sum(d * d for d in step))
    trust = [0.0] * 4
    for _ in range(2):
        slope = [(float(base[i]) + step[i] + trust[i] - 1.0) / 50 for i in range(4)]
        size = math.sqrt(sum(g * g for g in slope))
        trust = [trust[i] - 0.3 * norm / 2 * slope[i] / size for i in range(4)]
        along = sum(trust[i] * step[i] for i in range(4))
        if along < 0:
            trust = [trust[i] - along / norm**2 * step[i] for i in range(4)]
    expected = [float(base[i]) + step[i] + trust[i] for i in range(4)]

    assert result.step.state["layer.second"].flatten().tolist() == pytest.approx(expected, abs=1e-6)
    assert result.step.step_norm == pytest.approx(norm, rel=1e-6)
    assert result.step.trust_norm <= 0.3 * norm * (1 + 1e-6)
    assert result.step.step_scale == 1.0


def test_the_factor_that_rests_keeps_its_values_and_its_momentum() -> None:
    momentum = {"layer.first": torch.ones(1, 4)}
    result = run(config(), momentum)
    assert torch.equal(result.step.state["layer.first"], small_state()["layer.first"])
    assert torch.equal(result.step.server_state["layer.first"], momentum["layer.first"])


def test_a_rejected_step_leaves_state_and_no_momentum() -> None:
    probe = QuadraticProbe()
    away = {"layer.second": 5.0 * (small_state()["layer.second"] - 1.0)}
    settings = config(margin_tolerance=0.0, trust_steps=0, max_halvings=2)
    result = aggregate(rule_of(settings), start(), [update(0, away)], probe)
    assert result.step.step_scale == 0.0
    assert torch.equal(result.step.state["layer.second"], small_state()["layer.second"])
    assert global_norm(result.step.server_state) == 0.0
    assert result.step.margin_after == result.margin_before


def test_a_halved_step_keeps_half_the_momentum() -> None:
    """From far away, one whole jump over the optimum is too much and half of it is right."""
    gap = small_state()["layer.second"] - 1.0
    jump = {"layer.second": -3.0 * gap}
    settings = config(margin_tolerance=0.0, trust_steps=0, server_momentum=0.9)
    result = aggregate(rule_of(settings), start(), [update(0, jump)], QuadraticProbe())
    assert result.step.step_scale == 0.5
    assert torch.allclose(result.step.server_state["layer.second"], 0.5 * jump["layer.second"])


def test_a_site_that_harms_alignment_counts_less() -> None:
    towards = {"layer.second": 0.5 * (1.0 - small_state()["layer.second"])}
    against = {"layer.second": -towards["layer.second"]}
    updates = [update(0, towards), update(1, against)]
    # Same declared noise, so that only the gate differs.
    updates[1] = SiteUpdate.of(updates[1].reply, VARIANCES[0], against)
    settings = config(gate_temperature=0.01, max_weight=1.0)
    result = aggregate(rule_of(settings), start(), updates, QuadraticProbe())
    assert result.gains["aachen"] > 0 > result.gains["bern"]
    assert result.weights["aachen"] > 0.7


def test_a_gain_that_its_noise_explains_moves_no_weight() -> None:
    """The same two updates, which only chance told apart, and which the gate must not."""
    towards = {"layer.second": 0.5 * (1.0 - small_state()["layer.second"])}
    against = {"layer.second": -towards["layer.second"]}
    settings = config(gate_temperature=1e-4, precision_floor=1.0)
    weights = []
    for variance in (1e-9, 1e6):
        updates = [update(0, towards), update(1, against)]
        noisy = [replace(each, noise_variance=variance) for each in updates]
        weights.append(aggregate(rule_of(settings), start(), noisy, QuadraticProbe()).weights)
    assert weights[0]["aachen"] == pytest.approx(0.6), (
        "without noise the gate is shut for the other"
    )
    assert weights[1]["aachen"] == pytest.approx(0.5, abs=1e-3)


def test_the_order_of_arrival_changes_nothing() -> None:
    updates = [update(index, delta) for index, delta in enumerate(deltas())]
    first = aggregate(rule_of(config()), start(), updates, QuadraticProbe())
    second = aggregate(rule_of(config()), start(), updates[::-1], QuadraticProbe())
    assert torch.equal(first.step.state["layer.second"], second.step.state["layer.second"])


def test_uniform_is_the_mean_of_the_updates() -> None:
    result = run(config("uniform"))
    mean = sum(d["layer.second"].double() for d in deltas()) / 3
    expected = small_state()["layer.second"] + mean.float()
    assert torch.allclose(result.step.state["layer.second"], expected)
    assert set(result.gains.values()) == {None}


def test_by_patients_is_federated_averaging() -> None:
    result = run(config("by_patients"))
    mean = sum(n * d["layer.second"].double() for n, d in zip(PATIENTS, deltas(), strict=True))
    expected = small_state()["layer.second"] + (mean / 160).float()
    assert torch.allclose(result.step.state["layer.second"], expected)
    assert result.weights["aachen"] == pytest.approx(100 / 160)


def test_a_margin_is_measured_for_the_aggregate_alone() -> None:
    """However many sites there are: what each of them gains follows from one gradient."""
    for rule, num_slopes in (("uniform", 0), ("alignment_regularized", 1)):
        probe = QuadraticProbe()
        updates = [update(index, delta) for index, delta in enumerate(deltas())]
        aggregate(rule_of(config(rule, margin_tolerance=10.0)), start(), updates, probe)
        assert (probe.num_margins, probe.num_slopes) == (1, num_slopes)


def test_weighted_sum_reads_one_delta_at_a_time() -> None:
    held: list[int] = []

    def reader(index: int) -> State:
        held.append(index)
        return {"layer.second": torch.full((4, 1), float(index))}

    total = weighted_sum((0.5, lambda k=k: reader(k)) for k in (1, 2))
    assert held == [1, 2]
    assert total["layer.second"].unique().tolist() == [1.5]


def test_momentum_starts_at_the_first_delta() -> None:
    delta = deltas()[0]
    first = with_momentum({}, delta, 0.5)
    second = with_momentum(first, delta, 0.5)
    assert torch.equal(first["layer.second"], delta["layer.second"])
    assert torch.allclose(second["layer.second"], 1.5 * delta["layer.second"])


def test_no_update_gives_no_round() -> None:
    with pytest.raises(AggregationError, match="at least one"):
        aggregate(rule_of(config()), start(), [], QuadraticProbe())


def test_a_control_round_is_weighed_by_precision_alone_and_takes_no_alignment_step() -> None:
    """Its updates leave the text alone: no gain, a neutral gate, no step on the probe."""
    name = "control.nuclei.stem.weight"
    generator = torch.Generator().manual_seed(6)
    moves = [{name: torch.randn(3, generator=generator)} for _ in range(3)]
    probe = _CountingProbe()
    state = small_state() | {name: torch.zeros(3)}
    begin = RoundState(state=state, server_state={}, factor="nuclei", margin=0.5)
    rule = rule_of(config(max_weight=0.9, server_momentum=0.0))
    result = aggregate(rule, begin, [update(i, d) for i, d in enumerate(moves)], probe)

    precision = [1 / (1e-3 + variance) for variance in VARIANCES]
    expected = [value / sum(precision) for value in precision]
    assert [result.weights[site] for site in NAMES] == pytest.approx(expected)
    assert set(result.gains.values()) == {None}
    assert probe.gradients == 0
    mean = sum(weight * move[name] for weight, move in zip(expected, moves, strict=True))
    torch.testing.assert_close(result.step.state[name], mean)
    assert (result.step.trust_norm, result.step.step_scale) == (0.0, 1.0)


class _CountingProbe:
    """A margin that only the generator's tensors could move."""

    def __init__(self) -> None:
        self.gradients = 0

    def margin(self, state: Mapping[str, torch.Tensor]) -> float:
        return 0.5

    def margin_gradient(self, state: Mapping[str, torch.Tensor], factor: str) -> State:
        raise AssertionError("nothing to measure in a control round")

    def alignment_gradient(self, state: Mapping[str, torch.Tensor], factor: str) -> State:
        self.gradients += 1
        return {}
