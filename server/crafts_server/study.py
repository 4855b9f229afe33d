"""Everything a run needs beside the sites."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from crafts_core.exchange import SignedPlan
from crafts_core.plan import Plan
from crafts_core.plan_sections import Factor
from crafts_core.releases import Decoded
from crafts_core.retrieval_record import Retrieval
from crafts_core.roster import Roster
from crafts_core.state import State
from crafts_server.aggregation import AggregationRule
from crafts_server.checkpoints import CheckpointStore
from crafts_server.collection import Members, Patience
from crafts_server.probe import ProbeOfRound
from crafts_server.registry import Registry


@dataclass(frozen=True, slots=True, kw_only=True)
class Retrieved:
    """What the coordinator made alone of what sites told."""

    state: State
    record: Retrieval


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """One run of one plan, and where it keeps what must last."""

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
    """Of the plan's training, below which no update is used."""
    agreed_patients: Callable[[], Mapping[str, int]]
    """Asked at each reply: a site may enrol, or be resized, while a round is open."""
    decode: Callable[[Factor, Tensor, float], Decoded]
    """What an aggregated release says, with noise of that deviation in each number."""
    retrieve: Callable[[State, Sequence[bool], Callable[[], None]], Retrieved]
    """Of a plan with stage retrieval: from the state that the releases ended with and the captions
    that no patients stand for. Calls back between steps, and stops where that raises."""
    roster: Callable[[], Roster]
    """Of a plan with secure aggregation: frozen, as its sites approved it."""
