"""The round loop of a study, on Flower's public ``Grid``.

A round: ask every site, verify what comes, aggregate, commit a signed checkpoint, index it. The
commit is one rename, so whatever kills the process, the next start goes on after the last
committed round and reaches the same adapter as if nothing had happened: a round depends only on
the checkpoint before it, the plan, and the replies, and sites answer a repeated request with the
same sealed reply.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from flwr.app import Message
from flwr.serverapp import Grid
from torch import Tensor

from crafts_core.adapters import State, factor_names
from crafts_core.exchange import RoundRequest, state_hash
from crafts_core.plan import Plan, RoundOfPlan
from crafts_server.aggregation import (
    Aggregate,
    AggregationRule,
    RoundState,
    SiteUpdate,
    aggregate,
)
from crafts_server.checkpoints import Checkpoint, CheckpointStore
from crafts_server.collection import Collection, Members, Patience, Replies, SiteDirectory
from crafts_server.errors import AggregationError, CheckpointError, DivergedError
from crafts_server.messages import (
    SignedPlan,
    WireState,
    as_travelled,
    encode,
    read_reply,
    request_message,
)
from crafts_server.probe import ProbeOfRound
from crafts_server.receipts import RoundReceipt, SiteReceipt
from crafts_server.registry import CheckpointRecord, Registry, RunStatus
from crafts_server.spool import UpdateSpool
from crafts_server.verification import Expectation, verify_update
from crafts_server.weight_watch import WeightWatch

OnRound = Callable[[RoundReceipt], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """Everything a run needs beside the sites."""

    plan: Plan
    signed_plan: SignedPlan
    run_id: str
    store: CheckpointStore
    registry: Registry
    rule: AggregationRule
    probe_of_round: ProbeOfRound
    spool_path: Path
    patience: Patience
    members: Members
    noise_multiplier: float
    """The plan's, below which no update is used."""
    agreed_patients: Callable[[], Mapping[str, int]]
    """Asked at each reply: a site may enrol, or be resized, while a round is open."""


def run_rounds(
    grid: Grid,
    study: Study,
    *,
    initial_state: Callable[[], State],
    on_round: OnRound,
) -> Checkpoint:
    """Run what is left of the plan; nothing if it has finished.

    Args:
        grid: Where the sites are.
        study: The run; a run that was interrupted goes on.
        initial_state: Called once, when the run has no checkpoint yet.
        on_round: Called after each committed round.

    Returns:
        The last checkpoint.

    Raises:
        AggregationError: too few good updates at a round's deadline. Committed rounds stay.
        CheckpointError: the checkpoints are not what was committed.
        DivergedError: a round's result is not finite; it is not committed, and would be the same
            again.
    """
    chain = recover(study.store, study.registry, run_id=study.run_id, plan_hash=study.plan.hash)
    if not chain:
        chain = [_commit(study, None, state=initial_state(), momentum={}, receipt=None)]
    if chain[-1].round == study.plan.num_rounds:
        return chain[-1]
    study.registry.set_status(study.run_id, RunStatus.RUNNING)
    sites = SiteDirectory(members=study.members)
    watch = WeightWatch(checkpoint.receipt() for checkpoint in chain[1:])
    for planned in study.plan.rounds():
        if planned.round < len(chain):
            continue
        stage_start = chain[_first_round(study.plan, planned) - 1].state()
        checkpoint = _Round(grid, study, sites, planned, chain[-1], stage_start, watch).run()
        chain.append(checkpoint)
        watch.note(checkpoint.receipt())
        on_round(checkpoint.receipt())
    study.registry.set_status(study.run_id, RunStatus.FINISHED)
    return chain[-1]


def recover(
    store: CheckpointStore, registry: Registry, *, run_id: str, plan_hash: str
) -> list[Checkpoint]:
    """The verified checkpoints of a run, compared with the registry and indexed where it lags.

    Raises:
        CheckpointError: a committed checkpoint is missing or another one is in its place, or the
            chain belongs to another run or plan.
    """
    chain = store.chain()
    known = registry.checkpoints(run_id)
    for record in known:
        if record.round >= len(chain) or chain[record.round].hash != record.manifest_hash:
            raise CheckpointError(
                f"run {run_id}: the committed checkpoint of round {record.round} is missing "
                "or was replaced; restore the checkpoints from a copy"
            )
    for checkpoint in chain:
        manifest = checkpoint.manifest
        if (manifest.run_id, manifest.plan_hash) != (run_id, plan_hash):
            raise CheckpointError(f"{checkpoint.path} belongs to run {manifest.run_id}")
    for checkpoint in chain[len(known) :]:
        _index(registry, checkpoint)
    if chain:
        chain[-1].check_files()
    return chain


class _Round:
    """One round of one run."""

    def __init__(
        self,
        grid: Grid,
        study: Study,
        sites: SiteDirectory,
        planned: RoundOfPlan,
        parent: Checkpoint,
        stage_start: State,
        watch: WeightWatch,
    ) -> None:
        self._grid = grid
        self._watch = watch
        self._study = study
        self._sites = sites
        self._planned = planned
        self._parent = parent
        self._state = parent.state()
        # The next stage minimises something else; a push from the last one would be noise.
        self._momentum = {} if planned.starts_stage else parent.momentum()
        self._wire_dtype = study.plan.transport.wire_dtype
        self._stage_start = stage_start
        self._request = self._make_request()
        names = factor_names(self._state, planned.factor)
        self._schema: Mapping[str, Tensor] = {name: self._state[name] for name in names}
        self._spool = UpdateSpool(study.spool_path)
        self._updates: dict[str, SiteUpdate] = {}
        self._bytes_down = 0
        self._bytes_up = 0

    def run(self) -> Checkpoint:
        """Collect, aggregate, commit, index."""
        started = time.monotonic()
        replies = self._collect()
        probe = self._study.probe_of_round(self._planned.round)
        start = RoundState(
            state=self._state,
            momentum=self._momentum,
            factor=self._planned.factor,
            margin=probe.margin(self._state),
        )
        result = aggregate(
            *(self._study.rule, start, list(self._updates.values()), probe),
            max_weight_per_share=self._study.plan.aggregation.max_weight_per_share,
        )
        self._check_finite(result)
        checkpoint = _commit(
            self._study,
            self._parent,
            state=result.step.state,
            momentum=result.step.momentum,
            receipt=self._receipt(result, replies, time.monotonic() - started),
        )
        self._spool.remove()
        return checkpoint

    def _make_request(self) -> RoundRequest:
        return RoundRequest(
            run_id=self._study.run_id,
            plan_hash=self._study.plan.hash,
            round=self._planned.round,
            stage_index=self._planned.stage_index,
            factor=self._planned.factor,
            checkpoint_hash=state_hash(as_travelled(self._state, self._wire_dtype)),
            stage_start_hash=state_hash(as_travelled(self._stage_start, self._wire_dtype)),
        )

    def _collect(self) -> Replies:
        config = self._study.plan.aggregation
        adapter = encode(self._state, self._wire_dtype)
        stage_start = encode(self._stage_start, self._wire_dtype)

        def compose(node_id: int) -> Message:
            return self._message(node_id, adapter, stage_start)

        collection = Collection(
            self._grid,
            self._sites,
            compose=compose,
            accept=self._accept,
            patience=self._study.patience,
        )
        replies = collection.run(min_sites=config.min_sites, deadline_s=config.deadline_s)
        if replies.num_accepted < config.min_sites:
            raise AggregationError(self._too_few(replies))
        return replies

    def _message(self, node_id: int, adapter: WireState, stage_start: WireState) -> Message:
        """The request for one site, with the stage's first adapter where it needs it."""
        request = self._request
        needs_start = (
            self._planned.stage.lambda_drift > 0
            and request.stage_start_hash != request.checkpoint_hash
            and self._sites.holders.get(node_id) != request.stage_start_hash
        )
        self._bytes_down += adapter.num_bytes + (stage_start.num_bytes if needs_start else 0)
        return request_message(
            request,
            self._study.signed_plan,
            node_id=node_id,
            adapter=adapter,
            stage_start=stage_start if needs_start else None,
            ttl_s=self._study.plan.aggregation.deadline_s,
        )

    def _accept(self, node_id: int, message: Message) -> None:
        """Verify a reply and put its delta aside.

        Raises:
            ExchangeError: it cannot be parsed.
            UpdateRefusedError: it is not what this round asked for.
        """
        reply, delta, num_bytes = read_reply(message, self._schema)
        self._bytes_up += num_bytes
        expected = Expectation(
            request=self._request,
            stage=self._planned.stage,
            privacy=self._study.plan.privacy,
            schema=self._schema,
            noise_multiplier=self._study.noise_multiplier,
            patients=self._study.agreed_patients(),
        )
        variance = verify_update(reply, delta, expected)
        self._sites.bind(node_id, reply.site)
        self._updates[reply.site] = SiteUpdate(
            reply=reply,
            noise_variance=variance,
            read_delta=self._spool.add(reply.site, delta),
        )
        self._sites.holders[node_id] = self._request.stage_start_hash

    def _too_few(self, replies: Replies) -> str:
        good = ", ".join(sorted(self._updates)) or "none"
        missing = ", ".join(replies.missing) or "none"
        refused = "; ".join(f"{each.site} ({each.reason})" for each in replies.refused) or "none"
        return (
            f"round {self._planned.round}: {replies.num_accepted} good updates, expected at least "
            f"{self._study.plan.aggregation.min_sites}. Good: {good}. Missing: {missing}. "
            f"Refused: {refused}. Committed rounds are kept; run again when the sites are back"
        )

    def _check_finite(self, result: Aggregate) -> None:
        """Refuse to commit an adapter under which the generator no longer computes."""
        for margin in (result.margin_before, result.step.margin_after):
            if not math.isfinite(margin):
                raise DivergedError(
                    f"round {self._planned.round}: the alignment margin is {margin}, so training "
                    "has diverged; use a plan with a smaller learning_rate or max_grad_norm"
                )

    def _receipt(self, result: Aggregate, replies: Replies, seconds: float) -> RoundReceipt:
        step, planned = result.step, self._planned
        sites = tuple(_site_receipt(self._updates[site], result) for site in sorted(self._updates))
        max_rise = self._study.plan.aggregation.max_weight_rise
        return RoundReceipt(
            run_id=self._study.run_id,
            round=planned.round,
            stage=planned.stage.name,
            stage_index=planned.stage_index,
            factor=planned.factor,
            sites=sites,
            refused=replies.refused,
            missing=replies.missing,
            rises=self._watch.rises(planned.stage_index, sites, max_rise=max_rise),
            margin_before=result.margin_before,
            margin_after=step.margin_after,
            step_norm=step.step_norm,
            trust_norm=step.trust_norm,
            step_scale=step.step_scale,
            bytes_down=self._bytes_down,
            bytes_up=self._bytes_up,
            seconds=seconds,
            finished_at=datetime.now(UTC),
            sent_hash=self._request.checkpoint_hash,
            state_hash=state_hash(step.state),
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


def _first_round(plan: Plan, planned: RoundOfPlan) -> int:
    """Number of the first round of the stage that ``planned`` belongs to."""
    return 1 + sum(stage.rounds for stage in plan.stage[: planned.stage_index])


def _commit(
    study: Study,
    parent: Checkpoint | None,
    *,
    state: State,
    momentum: State,
    receipt: RoundReceipt | None,
) -> Checkpoint:
    """Checkpoint first, index second: a crash in between leaves nothing to lose."""
    checkpoint = study.store.write(
        run_id=study.run_id,
        plan_hash=study.plan.hash,
        parent=parent,
        state=state,
        momentum=momentum,
        receipt=receipt,
    )
    _index(study.registry, checkpoint)
    return checkpoint


def _index(registry: Registry, checkpoint: Checkpoint) -> None:
    record = CheckpointRecord(
        round=checkpoint.round,
        manifest_hash=checkpoint.hash,
        state_hash=checkpoint.manifest.state_hash,
    )
    receipt = checkpoint.receipt() if checkpoint.round > 0 else None
    registry.record(checkpoint.manifest.run_id, record, receipt)
