"""A round that is open: where it starts, what it asks for, and what it has cost so far.

The same for every phase of the round, and for every attempt at one.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from flwr.app import Message
from flwr.serverapp import Grid
from torch import Tensor

from crafts_core.exchange import RoundRequest, state_hash
from crafts_core.plan import RoundOfPlan
from crafts_core.plan_sections import PrivacyConfig
from crafts_core.retrieval_record import Retrieval
from crafts_core.state import State, factor_names
from crafts_server.aggregation import (
    AggregationRule,
    ByPatients,
    PublicProbe,
    RoundState,
    ServerStep,
)
from crafts_server.checkpoints import Checkpoint
from crafts_server.collection import Collection, Phase, Replies, SiteDirectory
from crafts_server.messages import as_travelled, encode, request_message
from crafts_server.receipts import ReleaseReceipt, SiteReceipt, SumReceipt
from crafts_server.study import Study


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What the sites' answers came to."""

    step: ServerStep
    margin_before: float
    sites: tuple[SiteReceipt, ...]
    """By name."""
    replies: Replies
    sums: tuple[SumReceipt, ...] = ()
    left_out: tuple[str, ...] = ()
    release: ReleaseReceipt | None = None
    retrieval: Retrieval | None = None


def _everybody(_node_id: int) -> bool:
    return True


class OpenRound:
    """One round of one run, until it is committed."""

    def __init__(
        self,
        grid: Grid,
        study: Study,
        sites: SiteDirectory,
        planned: RoundOfPlan,
        chain: Sequence[Checkpoint],
        stage_start: State,
    ) -> None:
        self.study = study
        self.sites = sites
        self.planned = planned
        self.chain = chain
        self.parent = chain[-1]
        self.state = self.parent.state()
        names = factor_names(self.state, planned.factor)
        self.schema: Mapping[str, Tensor] = {name: self.state[name] for name in names}
        self.bytes_down = 0
        self.bytes_up = 0
        self._grid = grid
        wire_dtype = study.plan.transport.wire_dtype
        self._adapter = encode(self.state, wire_dtype)
        self._stage_start = encode(stage_start, wire_dtype)
        self.request = RoundRequest(
            run_id=study.run_id,
            plan_hash=study.plan.hash,
            round=planned.round,
            stage_index=planned.stage_index,
            factor=planned.factor,
            checkpoint_hash=state_hash(as_travelled(self.state, wire_dtype)),
            stage_start_hash=state_hash(as_travelled(stage_start, wire_dtype)),
        )

    def collect(
        self,
        phase: Phase,
        *,
        deadline_s: float,
        min_sites: int = 0,
        expected: int = 0,
        only: Callable[[int], bool] = _everybody,
    ) -> Replies:
        """Ask and listen until the phase may close; see :class:`Collection`."""
        collection = Collection(
            self._grid, self.sites, phase, patience=self.study.patience, only=only
        )
        return collection.run(min_sites=min_sites, expected=expected, deadline_s=deadline_s)

    def ask(self, node_id: int, request: RoundRequest) -> Message:
        """The request for one site, with the stage's first adapter where it needs it."""
        needs_start = (
            self.planned.stage.lambda_drift > 0
            and request.stage_start_hash != request.checkpoint_hash
            and self.sites.holders.get(node_id) != request.stage_start_hash
        )
        stage_start = self._stage_start if needs_start else None
        self.bytes_down += self._adapter.num_bytes + (stage_start.num_bytes if stage_start else 0)
        return request_message(
            request,
            self.study.signed_plan,
            node_id=node_id,
            adapter=self._adapter,
            stage_start=stage_start,
            ttl_s=self.study.plan.aggregation.deadline_s,
        )

    def take(self, node_id: int, site: str) -> None:
        """A site's answer to ``ask`` is good: it is who it says, and holds the stage's start.

        Raises:
            UpdateRefusedError: the node is another site.
        """
        self.sites.bind(node_id, site)
        self.sites.holders[node_id] = self.request.stage_start_hash

    @property
    def privacy(self) -> PrivacyConfig:
        """Sampling and clipping of the round."""
        return self.study.plan.privacy_of(self.planned.stage)

    @property
    def noise_multiplier(self) -> float:
        """What the plan asks of the round, be it of a site alone or of a whole sum."""
        return self.planned.stage.noise_multiplier or self.study.noise_multiplier

    @property
    def rule(self) -> AggregationRule:
        """What is made of the round: a release is summed over patients, and no step of training."""
        return ByPatients() if self.planned.stage.is_release else self.study.rule

    def rule_state(self, kept: State) -> State:
        """What the rule goes on with, of what it kept in the round before."""
        return self.study.rule.begin_stage(kept) if self.planned.starts_stage else kept

    def begin(self, probe: PublicProbe, server_state: State) -> RoundState:
        """Where the rule starts from, measured on the round's probe."""
        return RoundState(
            state=self.state,
            server_state=server_state,
            factor=self.planned.factor,
            margin=probe.margin(self.state),
        )
