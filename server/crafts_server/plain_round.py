"""A plain round: one phase, in which each site answers with its own update."""

import math
from collections.abc import Iterable

from flwr.app import Message

from crafts_server.aggregation import Aggregate, SiteUpdate, aggregate
from crafts_server.collection import Replies
from crafts_server.errors import UpdateRefusedError
from crafts_server.messages import read_reply
from crafts_server.open_round import OpenRound, Outcome
from crafts_server.receipts import SiteReceipt
from crafts_server.release_reading import read_release
from crafts_server.spool import UpdateSpool
from crafts_server.verification import Expectation, verify_update


def plain_round(opened: OpenRound) -> Outcome:
    """Collect updates, weigh them, move. A release is summed over the sites' patients, and read.

    Raises:
        AggregationError: too few good updates at the deadline.
        SitesRefuseError: the same, as sites refuse.
    """
    study = opened.study
    config = study.plan.aggregation
    spool = UpdateSpool(study.spool_path)
    phase = DeltaPhase(opened, spool)
    replies = opened.collect(phase, min_sites=config.min_sites, deadline_s=config.deadline_s)
    if replies.num_accepted < config.min_sites:
        raise replies.too_few(config.min_sites, _too_few(opened, phase, replies))
    probe = study.probe_of_round(opened.planned.round)
    result = aggregate(
        opened.rule,
        opened.begin(probe, opened.rule_state(opened.parent.server_state())),
        list(phase.updates.values()),
        probe,
        max_weight_per_share=config.max_weight_per_share,
    )
    spool.remove()
    step, release = result.step, None
    if opened.planned.stage.is_release:
        step, release = read_release(opened, step, _noise_std(result, phase.updates.values()))
    return Outcome(
        step=step,
        release=release,
        margin_before=result.margin_before,
        sites=tuple(_site_receipt(phase.updates[site], result) for site in sorted(phase.updates)),
        replies=replies,
    )


class DeltaPhase:
    """Every site trains and answers with its delta."""

    def __init__(self, opened: OpenRound, spool: UpdateSpool) -> None:
        self._opened = opened
        self._spool = spool
        self.updates: dict[str, SiteUpdate] = {}

    def compose(self, node_id: int) -> Message:
        """See :class:`Phase`."""
        return self._opened.ask(node_id, self._opened.request)

    def accept(self, node_id: int, message: Message) -> None:
        """Verify a reply and put its delta aside; see :class:`Phase`."""
        opened, study = self._opened, self._opened.study
        stage = opened.planned.stage
        reply, delta, num_bytes = read_reply(message, opened.schema)
        opened.bytes_up += num_bytes
        expected = Expectation(
            request=opened.request,
            stage=stage,
            privacy=opened.privacy,
            schema=opened.schema,
            noise_multiplier=opened.noise_multiplier,
            patients=study.agreed_patients(),
        )
        variance = verify_update(reply, delta, expected)
        if reply.site in self.updates:
            raise UpdateRefusedError(f"{reply.site} has delivered before")
        opened.take(node_id, reply.site)
        self.updates[reply.site] = SiteUpdate(
            reply=reply,
            noise_variance=variance,
            read_delta=self._spool.add(reply.site, delta),
        )


def _noise_std(result: Aggregate, updates: Iterable[SiteUpdate]) -> float:
    """Of each number of the aggregate."""
    return math.sqrt(
        math.fsum(result.weights[each.site] ** 2 * each.noise_variance for each in updates)
    )


def _too_few(opened: OpenRound, phase: DeltaPhase, replies: Replies) -> str:
    good = ", ".join(sorted(phase.updates)) or "none"
    missing = ", ".join(replies.missing) or "none"
    refused = "; ".join(f"{each.site} ({each.reason})" for each in replies.refused) or "none"
    return (
        f"round {opened.planned.round}: {replies.num_accepted} good updates, expected at least "
        f"{opened.study.plan.aggregation.min_sites}. Good: {good}. Missing: {missing}. "
        f"Refused: {refused}"
    )


def _site_receipt(update: SiteUpdate, result: Aggregate) -> SiteReceipt:
    reply = update.reply
    gain = result.gains[reply.site]
    return SiteReceipt(
        site=reply.site,
        weight=result.weights[reply.site],
        max_weight=result.caps[reply.site],
        gain=gain if gain is not None and math.isfinite(gain) else None,
        update_norm=reply.update_norm,
        noise_multiplier=reply.noise_multiplier,
        max_grad_norm=reply.max_grad_norm,
        sample_rate=reply.sample_rate,
        steps=reply.steps,
        declared_patients=reply.declared_patients,
        declared_noise_variance=update.noise_variance,
    )
