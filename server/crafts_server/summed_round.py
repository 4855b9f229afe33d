"""A round of which the coordinator opens sums over sites, and nothing of any one of them.

What a plain round checks of each update is checked of the sum: that its length can come from the
declared clipping and noise. A sum that fails is not used; where none is left the round is committed
without a step, and its receipt names the members.

The step is the one that a single site with everybody's patients would have taken, and the plan's
rule goes on from there with momentum, public alignment and acceptance. Weights and gate need single
updates and have no part here: every patient counts the same.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from crafts_core.plan import PrivacyConfig
from crafts_core.state import State
from crafts_server.aggregation import PublicProbe, RoundState, ServerStep
from crafts_server.collection import Replies
from crafts_server.open_round import OpenRound, Outcome
from crafts_server.receipts import SiteReceipt, SumReceipt
from crafts_server.sum_of_sites import added, bounds_of, descend, norm_of
from crafts_server.sum_phases import SumOfPart
from crafts_server.sums import Collected, SumCollection

_OPTIMIZER = "optimizer."
"""Begins the names of the server state that are the optimizer's; the others are the rule's."""


def summed_round(opened: OpenRound) -> Outcome:
    """Attempt the round's sum until it opens, and move.

    Raises:
        AggregationError: too few sites are ready.
        VoidSumsError: every attempt was void.
    """
    collected = SumCollection(opened).run()
    privacy = opened.study.plan.privacy
    sums = [_sum_receipt(part, privacy) for part in collected.parts]
    complete = [part for part in collected.parts if not part.missing]
    good = [part for part, told in zip(collected.parts, sums, strict=True) if told.is_plausible]
    probe = opened.study.probe_of_round(opened.planned.round)
    start = opened.begin(probe, _rule_state(opened))
    step = _step(opened, good, start, probe) if good else _no_step(opened, start)
    return Outcome(
        step=step,
        margin_before=start.margin,
        sites=tuple(_site_receipts(opened, good or complete)),
        replies=_replies(collected, complete),
        sums=tuple(sums),
        left_out=tuple(sorted(collected.left_out)),
    )


def _step(
    opened: OpenRound, good: Sequence[SumOfPart], start: RoundState, probe: PublicProbe
) -> ServerStep:
    """Down the members' mean, as the plan's rule takes a step."""
    factor = opened.planned.factor
    kept = _optimizer_state(opened)
    descent = descend(
        opened.schema,
        added([part.opened() for part in good]),
        opened.study.plan.privacy,
        opened.planned.stage,
        {name.split(".", 1)[1]: kept[name] for name in kept if name.startswith(f"{factor}.")},
    )
    step = opened.study.rule.move(start, descent.delta, probe)
    moved = {f"{factor}.{name}": tensor for name, tensor in descent.optimizer_state.items()}
    return replace(step, server_state=_joined(step.server_state, kept | moved))


def _no_step(opened: OpenRound, start: RoundState) -> ServerStep:
    return ServerStep(
        state=start.state,
        server_state=_joined(start.server_state, _optimizer_state(opened)),
        margin_after=start.margin,
        step_norm=0.0,
        trust_norm=0.0,
        step_scale=0.0,
    )


def _rule_state(opened: OpenRound) -> State:
    kept = opened.parent.server_state()
    return opened.rule_state(
        {name: tensor for name, tensor in kept.items() if not name.startswith(_OPTIMIZER)}
    )


def _optimizer_state(opened: OpenRound) -> State:
    """Per factor, as each has steps of its own; every stage begins afresh."""
    if opened.planned.starts_stage:
        return {}
    kept = opened.parent.server_state()
    return {
        name.removeprefix(_OPTIMIZER): tensor
        for name, tensor in kept.items()
        if name.startswith(_OPTIMIZER)
    }


def _joined(rule_state: Mapping[str, Tensor], optimizer_state: Mapping[str, Tensor]) -> State:
    mine = {_OPTIMIZER + name: tensor for name, tensor in optimizer_state.items()}
    return {**rule_state, **mine}


def _sum_receipt(part: SumOfPart, privacy: PrivacyConfig) -> SumReceipt:
    noise = norm = lowest = highest = None
    if not part.missing:
        opened = part.opened()
        bounds = bounds_of(opened, privacy)
        noise, norm = opened.noise_multiplier, norm_of(opened, privacy)
        lowest, highest = bounds.lowest, bounds.highest
    return SumReceipt(
        attempt=part.attempt,
        members=tuple(sorted(part.members)),
        missing=tuple(part.missing),
        noise_multiplier=noise,
        norm=norm,
        lowest=lowest,
        highest=highest,
    )


def _site_receipts(opened: OpenRound, parts: Sequence[SumOfPart]) -> Iterator[SiteReceipt]:
    """Each member by name; it counts as its patients say."""
    privacy, stage = opened.study.plan.privacy, opened.planned.stage
    patients = {
        site: ready.declared_patients for part in parts for site, ready in part.members.items()
    }
    noise = {site: own for part in parts for site, own in part.noise_multipliers.items()}
    total = sum(patients.values())
    for site in sorted(patients):
        share = patients[site] / total
        deviation = noise[site] * privacy.max_grad_norm / (privacy.sample_rate * total)
        yield SiteReceipt(
            site=site,
            weight=share,
            max_weight=share,
            gain=None,
            update_norm=None,
            noise_multiplier=noise[site],
            max_grad_norm=privacy.max_grad_norm,
            sample_rate=privacy.sample_rate,
            steps=1,
            declared_patients=patients[site],
            declared_noise_variance=(stage.learning_rate * deviation) ** 2,
        )


def _replies(collected: Collected, complete: Sequence[SumOfPart]) -> Replies:
    return Replies(
        num_asked=collected.num_asked,
        num_accepted=sum(len(part.members) for part in complete),
        refused=tuple(collected.refused),
        missing=tuple(sorted(collected.missing)),
    )
