"""The round loop of a study, on Flower's public ``Grid``.

A round: ask every site, verify what comes, aggregate, commit a signed checkpoint, index it. The
commit is one rename, so whatever kills the process, the next start goes on after the last
committed round and reaches the same adapter as if nothing had happened: a round depends only on
the checkpoint before it, the plan, and the replies, and sites answer a repeated request with the
same sealed reply.
"""

import math
import time
from collections.abc import Callable
from datetime import UTC, datetime

from flwr.serverapp import Grid

from crafts_core.exchange import state_hash
from crafts_core.plan import Plan, RoundOfPlan
from crafts_core.state import State
from crafts_server.checkpoints import Checkpoint, CheckpointStore
from crafts_server.collection import SiteDirectory
from crafts_server.errors import CheckpointError, DivergedError
from crafts_server.open_round import OpenRound, Outcome
from crafts_server.plain_round import plain_round
from crafts_server.public_round import public_round
from crafts_server.receipts import RoundReceipt
from crafts_server.registry import CheckpointRecord, Registry, RunStatus
from crafts_server.study import Study
from crafts_server.summed_round import summed_round
from crafts_server.weight_watch import WeightWatch

OnRound = Callable[[RoundReceipt], None]


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
        VoidSumsError: sites did not deliver to sums that they were ready for.
        DivergedError: a round's result is not finite; it is not committed, and would be the same
            again.
    """
    chain = recover(study.store, study.registry, run_id=study.run_id, plan_hash=study.plan.hash)
    if not chain:
        chain = [_commit(study, None, state=initial_state(), server_state={}, receipt=None)]
    if chain[-1].round == study.plan.num_rounds:
        return chain[-1]
    study.registry.set_status(study.run_id, RunStatus.RUNNING)
    sites = SiteDirectory(members=study.members)
    watch = WeightWatch(checkpoint.receipt() for checkpoint in chain[1:])
    for planned in study.plan.rounds():
        if planned.round < len(chain):
            continue
        stage_start = chain[_first_round(study.plan, planned) - 1].state()
        opened = OpenRound(grid, study, sites, planned, chain, stage_start)
        checkpoint = _play(opened, watch)
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


def _play(opened: OpenRound, watch: WeightWatch) -> Checkpoint:
    """Ask the sites, move, commit, index."""
    started = time.monotonic()
    outcome = _kind_of(opened)(opened)
    _check_finite(opened.planned, outcome)
    return _commit(
        opened.study,
        opened.parent,
        state=outcome.step.state,
        server_state=outcome.step.server_state,
        receipt=_receipt(opened, outcome, watch, time.monotonic() - started),
    )


def _kind_of(opened: OpenRound) -> Callable[[OpenRound], Outcome]:
    if opened.planned.stage.is_retrieval:
        return public_round
    return summed_round if opened.study.plan.aggregation.secure_aggregation else plain_round


def _check_finite(planned: RoundOfPlan, outcome: Outcome) -> None:
    """Refuse to commit an adapter under which the generator no longer computes."""
    for margin in (outcome.margin_before, outcome.step.margin_after):
        if not math.isfinite(margin):
            raise DivergedError(
                f"round {planned.round}: the alignment margin is {margin}, so training "
                "has diverged; use a plan with a smaller learning_rate or max_grad_norm"
            )


def _receipt(
    opened: OpenRound, outcome: Outcome, watch: WeightWatch, seconds: float
) -> RoundReceipt:
    step, planned = outcome.step, opened.planned
    max_rise = opened.study.plan.aggregation.max_weight_rise
    return RoundReceipt(
        run_id=opened.study.run_id,
        round=planned.round,
        stage=planned.stage.name,
        stage_index=planned.stage_index,
        factor=planned.factor,
        sites=outcome.sites,
        refused=outcome.replies.refused,
        missing=outcome.replies.missing,
        rises=watch.rises(planned.stage_index, outcome.sites, max_rise=max_rise),
        sums=outcome.sums,
        left_out=outcome.left_out,
        release=outcome.release,
        retrieval=outcome.retrieval,
        margin_before=outcome.margin_before,
        margin_after=step.margin_after,
        step_norm=step.step_norm,
        trust_norm=step.trust_norm,
        step_scale=step.step_scale,
        bytes_down=opened.bytes_down,
        bytes_up=opened.bytes_up,
        seconds=seconds,
        finished_at=datetime.now(UTC),
        sent_hash=opened.request.checkpoint_hash,
        state_hash=state_hash(step.state),
    )


def _first_round(plan: Plan, planned: RoundOfPlan) -> int:
    """Number of the first round of the stage that ``planned`` belongs to."""
    return 1 + sum(stage.rounds for stage in plan.stage[: planned.stage_index])


def _commit(
    study: Study,
    parent: Checkpoint | None,
    *,
    state: State,
    server_state: State,
    receipt: RoundReceipt | None,
) -> Checkpoint:
    """Checkpoint first, index second: a crash in between leaves nothing to lose."""
    checkpoint = study.store.write(
        run_id=study.run_id,
        plan_hash=study.plan.hash,
        parent=parent,
        state=state,
        server_state=server_state,
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
