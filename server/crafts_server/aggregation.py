"""From the sites' updates to one new global adapter: design section 6, and the plain baselines.

A rule answers two questions: how much each site counts, from public scalars alone, and what to do
with the weighted sum. The sum itself is the same for every rule, linear in the deltas, and holds
one delta at a time. That is also what secure aggregation needs: weights first, then only
``sum alpha_k delta_k`` is ever seen.

To try another rule, write a class with the interface of ``AggregationRule`` and give it a name in
``RULES``, both here: plans, scenarios and sweeps may name it then. Everything here is
post-processing of private outputs plus public data.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

from torch import Tensor

from crafts_core.exchange import RoundReply, global_norm, inner_product
from crafts_core.plan import PlanError
from crafts_core.plan_sections import MODALITIES, AggregationConfig, Factor
from crafts_core.state import State, add_delta
from crafts_core.weighting import (
    capped,
    equal_weights,
    log_gate,
    log_precision,
    normalised,
    share_caps,
    weights_by_patients,
)
from crafts_server.errors import AggregationError
from crafts_server.trust_region import accept_or_halve, alignment_steps


class PublicProbe(Protocol):
    """What may be measured and improved without a patient. Same state, same answer."""

    def margin(self, state: Mapping[str, Tensor]) -> float:
        """Alignment margin: matched minus mismatched captions, same noise and timesteps."""
        ...

    def margin_gradient(self, state: Mapping[str, Tensor], factor: Factor) -> State:
        """Gradient of the margin, for the tensors of ``factor``."""
        ...

    def alignment_gradient(self, state: Mapping[str, Tensor], factor: Factor) -> State:
        """Gradient of the public alignment loss, for the tensors of ``factor``."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteUpdate:
    """One verified update. The delta is read when it is needed, so that many sites fit."""

    reply: RoundReply
    noise_variance: float
    """v_k per coordinate, from the declared mechanism."""
    read_delta: Callable[[], State]

    @property
    def site(self) -> str:
        return self.reply.site

    @classmethod
    def of(cls, reply: RoundReply, noise_variance: float, delta: State) -> Self:
        """An update that is in memory anyway."""
        return cls(reply=reply, noise_variance=noise_variance, read_delta=lambda: delta)


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteEvidence:
    """All that a rule may weigh a site by.

    ``gain`` is None unless the rule asks for it, and in rounds of stage control: they leave the
    generator's text alone, and no public tile has a condition to measure them on.
    """

    site: str
    noise_variance: float
    declared_patients: int
    gain: float | None
    """In alignment margin, to first order: what the update adds for as much as it counts."""
    gain_noise: float
    """Standard deviation that the declared noise gives the gain; 0 where there is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerStep:
    """What a rule made of the weighted sum."""

    state: State
    server_state: State
    """What the rule carries into the next round; in the checkpoint, and read by nobody else."""
    margin_after: float
    step_norm: float
    """Length of the sites' step before the trust region and before halving."""
    trust_norm: float
    step_scale: float
    """1 accepted whole, 1/2, 1/4 ... halved, 0 rejected."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Aggregate:
    """The new global adapter and how it came about."""

    step: ServerStep
    weights: dict[str, float]
    caps: dict[str, float]
    """The most that each could have counted."""
    gains: dict[str, float | None]
    margin_before: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundState:
    """Where a round starts."""

    state: State
    server_state: State
    """The rule's own, from the round before."""
    factor: Factor
    margin: float

    @property
    def moves_text(self) -> bool:
        """Whether the round's updates can change how the generator follows its text."""
        return self.factor not in MODALITIES


class AggregationRule(Protocol):
    """The seam for research on aggregation."""

    needs_gain: bool
    """Whether each site's update is measured on the probe."""
    max_weight: float
    """No site counts more, unless all must."""

    def weights(self, evidence: Sequence[SiteEvidence]) -> list[float]:
        """Non-negative, summing to one, in the order of ``evidence``.

        A proposal: ``aggregate`` lets no site count more than its share allows, whatever the rule.
        """
        ...

    def move(self, start: RoundState, delta: State, probe: PublicProbe) -> ServerStep:
        """Turn the weighted sum into the next global adapter."""
        ...

    def begin_stage(self, server_state: State) -> State:
        """What of the last stage's state the next one starts with."""
        ...


def aggregate(
    rule: AggregationRule,
    start: RoundState,
    updates: Sequence[SiteUpdate],
    probe: PublicProbe,
    *,
    max_weight_per_share: float,
) -> Aggregate:
    """One round's new global adapter. The order in which updates arrived does not matter.

    Args:
        rule: How sites are weighed and what is made of the sum.
        start: Where the round starts.
        updates: Verified; their patients are the agreed ones.
        probe: The round's.
        max_weight_per_share: The plan's, for ``share_caps``.

    Raises:
        AggregationError: there is no update.
    """
    if not updates:
        raise AggregationError("expected at least one site update, got none")
    updates = sorted(updates, key=lambda update: update.site)
    is_measured = rule.needs_gain and start.moves_text
    slope = probe.margin_gradient(start.state, start.factor) if is_measured else None
    evidence = [_evidence(update, slope) for update in updates]
    caps = share_caps(
        [site.declared_patients for site in evidence],
        max_weight=rule.max_weight,
        max_weight_per_share=max_weight_per_share,
    )
    weights = capped(rule.weights(evidence), caps)
    delta = weighted_sum(
        (weight, update.read_delta) for weight, update in zip(weights, updates, strict=True)
    )
    return Aggregate(
        step=rule.move(start, delta, probe),
        weights={site.site: weight for site, weight in zip(evidence, weights, strict=True)},
        caps={site.site: cap for site, cap in zip(evidence, caps, strict=True)},
        gains={site.site: site.gain for site in evidence},
        margin_before=start.margin,
    )


def weighted_sum(terms: Iterable[tuple[float, Callable[[], State]]]) -> State:
    """``sum alpha_k delta_k`` in float64, one delta in memory at a time; float32 comes back."""
    total: State = {}
    for weight, read_delta in terms:
        for name, tensor in read_delta().items():
            part = weight * tensor.double()
            total[name] = total[name] + part if name in total else part
    return {name: tensor.float() for name, tensor in total.items()}


class AlignmentRegularized:
    """Alignment-regularized aggregation.

    ``alpha_k`` proportional to ``p_k a_k`` (precision times alignment gate), capped, where the gate
    is ``sigmoid(<g, delta_k> / sqrt(T^2 + 4 |g|^2 v_k))`` with the margin's gradient g;
    ``m <- beta m + sum alpha_k delta_k``; the step is ``eta m`` plus public alignment inside the
    trust region, accepted or halved. The momentum keeps the share of the step that was taken, so
    that a rejected direction does not come back by itself. With alternating factors each factor
    keeps its own momentum. In stage control the gate is neutral and no alignment step is taken:
    precision, cap and momentum remain.
    """

    needs_gain = True

    def __init__(self, config: AggregationConfig) -> None:
        self._config = config
        self.max_weight = config.max_weight

    def weights(self, evidence: Sequence[SiteEvidence]) -> list[float]:
        """Precision of the noise times the gate of what an update does to alignment, normalised."""
        config = self._config
        scores = [
            log_precision(site.noise_variance, config.precision_floor)
            + (0.0 if site.gain is None else self._log_gate(site.gain, site.gain_noise))
            for site in evidence
        ]
        return normalised(scores)

    def _log_gate(self, gain: float, gain_noise: float) -> float:
        """As soft at least as twice the noise in the gain, by which nobody should be weighed."""
        return log_gate(gain, math.hypot(self._config.gate_temperature, 2.0 * gain_noise))

    def move(self, start: RoundState, delta: State, probe: PublicProbe) -> ServerStep:
        """Momentum, alignment steps within the trust region, then accepted or halved."""
        config = self._config
        velocity = with_momentum(start.server_state, delta, config.server_momentum)
        step = {name: config.server_learning_rate * tensor for name, tensor in velocity.items()}
        trust = alignment_steps(
            start.state,
            step,
            lambda state: probe.alignment_gradient(state, start.factor),
            trust_radius=config.trust_radius,
            num_steps=config.trust_steps if start.moves_text else 0,
        )
        taken = accept_or_halve(
            start.state,
            add_delta(step, trust),
            probe.margin,
            margin_before=start.margin,
            tolerance=config.margin_tolerance,
            max_halvings=config.max_halvings,
        )
        kept = {name: taken.scale * tensor for name, tensor in velocity.items()}
        return ServerStep(
            state=taken.state,
            server_state={**start.server_state, **kept},
            margin_after=taken.margin,
            step_norm=global_norm(step),
            trust_norm=global_norm(trust),
            step_scale=taken.scale,
        )

    def begin_stage(self, server_state: State) -> State:  # noqa: ARG002
        """The next stage minimises something else; a push from the last one would be noise."""
        return {}


class Uniform:
    """Plain averaging: every site counts the same, no momentum, every step is taken."""

    needs_gain = False
    max_weight = 1.0

    def weights(self, evidence: Sequence[SiteEvidence]) -> list[float]:
        return equal_weights(len(evidence))

    def move(self, start: RoundState, delta: State, probe: PublicProbe) -> ServerStep:
        return _plain_step(start, delta, probe)

    def begin_stage(self, server_state: State) -> State:
        return server_state


class ByPatients:
    """Federated averaging: a site counts as much as the patients it declares."""

    needs_gain = False
    max_weight = 1.0

    def weights(self, evidence: Sequence[SiteEvidence]) -> list[float]:
        return weights_by_patients([site.declared_patients for site in evidence])

    def move(self, start: RoundState, delta: State, probe: PublicProbe) -> ServerStep:
        return _plain_step(start, delta, probe)

    def begin_stage(self, server_state: State) -> State:
        return server_state


RULES: Mapping[str, Callable[[AggregationConfig], AggregationRule]] = {
    "alignment_regularized": AlignmentRegularized,
    "uniform": lambda _: Uniform(),
    "by_patients": lambda _: ByPatients(),
}
"""By the name that a plan says."""


def rule_of(config: AggregationConfig) -> AggregationRule:
    """The rule that a plan names.

    Raises:
        PlanError: there is none of this name here.
    """
    if config.rule not in RULES:
        raise PlanError(f"aggregation.rule: expected one of {', '.join(RULES)}, got {config.rule}")
    return RULES[config.rule](config)


def with_momentum(momentum: Mapping[str, Tensor], delta: State, beta: float) -> State:
    """``beta m + Delta`` for the tensors of ``delta``; a tensor without history starts at Delta."""
    return {
        name: beta * momentum[name] + tensor if name in momentum else tensor.clone()
        for name, tensor in delta.items()
    }


def _plain_step(start: RoundState, delta: State, probe: PublicProbe) -> ServerStep:
    state = add_delta(start.state, delta)
    return ServerStep(
        state=state,
        server_state={},
        margin_after=probe.margin(state),
        step_norm=global_norm(delta),
        trust_norm=0.0,
        step_scale=1.0,
    )


def _evidence(update: SiteUpdate, slope: State | None) -> SiteEvidence:
    """``slope`` is the margin's where the round starts."""
    gain, gain_noise = None, 0.0
    if slope is not None:
        gain = inner_product(slope, update.read_delta())
        gain_noise = global_norm(slope) * math.sqrt(update.noise_variance)
    return SiteEvidence(
        site=update.site,
        noise_variance=update.noise_variance,
        declared_patients=update.reply.declared_patients,
        gain=gain,
        gain_noise=gain_noise,
    )
