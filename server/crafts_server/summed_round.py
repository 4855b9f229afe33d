"""A round of which the coordinator opens sums over sites, and nothing of any one of them.

What a plain round checks of each update is checked of the sum: that its length can come from the
declared clipping and noise. A sum that fails is not used; where none is left the round is committed
without a step, and its receipt names the members.

What a sum means depends on the plan's trust (``sum_readings``); the plan's rule goes on from there
with momentum, public alignment and acceptance.
"""

import math
from collections.abc import Iterator, Sequence

from crafts_privacy.secure_aggregation.shares import total_noise_multiplier
from crafts_server.aggregation import RoundState, ServerStep
from crafts_server.collection import Replies
from crafts_server.open_round import OpenRound, Outcome
from crafts_server.receipts import SiteReceipt, SumReceipt
from crafts_server.release_reading import read_release
from crafts_server.sum_phases import SumOfPart
from crafts_server.sum_readings import (
    SumReading,
    joined,
    optimizer_state,
    patients_of,
    reading_of,
    rule_state,
)
from crafts_server.sums import Collected, SumCollection


def summed_round(opened: OpenRound) -> Outcome:
    """Attempt the round's sum until it opens, and move.

    Raises:
        AggregationError: too few sites are ready.
        VoidSumsError: every attempt was void.
    """
    collected = SumCollection(opened).run()
    reading = reading_of(opened)
    sums = [_sum_receipt(part, reading) for part in collected.parts]
    complete = [part for part in collected.parts if not part.missing]
    good = [part for part, told in zip(collected.parts, sums, strict=True) if told.is_plausible]
    probe = opened.study.probe_of_round(opened.planned.round)
    start = opened.begin(probe, rule_state(opened))
    step, release = reading.step(good, start, probe) if good else _no_step(opened, start), None
    if opened.planned.stage.is_release:  # of no sum: public data stands in for what it would say
        step, release = read_release(opened, step, reading.noise_std(good) if good else math.inf)
    return Outcome(
        step=step,
        release=release,
        margin_before=start.margin,
        sites=tuple(_site_receipts(opened, reading, good or complete)),
        replies=_replies(collected, complete),
        sums=tuple(sums),
        left_out=tuple(sorted(collected.left_out)),
    )


def _no_step(opened: OpenRound, start: RoundState) -> ServerStep:
    return ServerStep(
        state=start.state,
        server_state=joined(start.server_state, optimizer_state(opened)),
        margin_after=start.margin,
        step_norm=0.0,
        trust_norm=0.0,
        step_scale=0.0,
    )


def _sum_receipt(part: SumOfPart, reading: SumReading) -> SumReceipt:
    noise = norm = lowest = highest = None
    if not part.missing:
        bounds = reading.bounds(part)
        noise = total_noise_multiplier(part.noise_multipliers.values())
        norm, lowest, highest = reading.norm(part), bounds.lowest, bounds.highest
    return SumReceipt(
        attempt=part.attempt,
        members=tuple(sorted(part.members)),
        missing=tuple(part.missing),
        noise_multiplier=noise,
        norm=norm,
        lowest=lowest,
        highest=highest,
    )


def _site_receipts(
    opened: OpenRound, reading: SumReading, parts: Sequence[SumOfPart]
) -> Iterator[SiteReceipt]:
    """Each member by name; of no sum nobody."""
    if not parts:
        return
    privacy, stage = opened.privacy, opened.planned.stage
    noise = {site: own for part in parts for site, own in part.noise_multipliers.items()}
    counted = reading.counted(parts)
    for site, patients in patients_of(parts).items():
        yield SiteReceipt(
            site=site,
            weight=counted[site].weight,
            max_weight=counted[site].max_weight,
            gain=None,
            update_norm=None,
            noise_multiplier=noise[site],
            max_grad_norm=privacy.max_grad_norm,
            sample_rate=privacy.sample_rate,
            steps=stage.local_steps,
            declared_patients=patients,
            declared_noise_variance=counted[site].noise_variance,
        )


def _replies(collected: Collected, complete: Sequence[SumOfPart]) -> Replies:
    return Replies(
        num_asked=collected.num_asked,
        num_accepted=sum(len(part.members) for part in complete),
        refused=tuple(collected.refused),
        missing=tuple(sorted(collected.missing)),
    )
