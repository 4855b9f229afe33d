"""What a coordinator is told when a site does not answer: a code and one public sentence.

The table is closed. Nothing of an exception's text leaves the site, because it may hold a path, a
number or a name.
"""

from dataclasses import dataclass

from crafts_client.errors import (
    EnrolmentError,
    HomeError,
    LateAnswerError,
    NotAgreedError,
    NotReadyError,
    OutboxError,
    TrainingError,
    WitnessError,
)
from crafts_client.policy import PolicyError, Rule
from crafts_client.site import StageStartMissingError
from crafts_core.exchange import TOLD_OUT, ExchangeError
from crafts_core.foundation import FoundationError
from crafts_core.plan import PlanError
from crafts_core.stages.objective import BatchCoupledLossError
from crafts_core.state import AdapterError
from crafts_core.tiles import TileStoreError
from crafts_privacy.errors import (
    AloneBudgetExceededError,
    BudgetExceededError,
    CalibrationError,
    LedgerError,
    LedgerPlaceError,
    PlanBudgetExceededError,
    RankError,
    StageSpentError,
)
from crafts_privacy.secure_aggregation.members import MembersError


@dataclass(frozen=True, slots=True)
class Refusal:
    """A code from 100 up (Flower's own are below) and its sentence."""

    code: int
    sentence: str


INTERNAL = Refusal(100, "the site could not train this round; its operator can see why")
STAGE_START_MISSING = Refusal(103, "the site needs the stage's first adapter once more")
NOT_SET_UP = Refusal(112, "the site is not set up")
"""Also where tiles are missing or damaged: what is wrong with them is the operator's to know."""

OF_ERROR: tuple[tuple[type[Exception], Refusal], ...] = (
    (StageStartMissingError, STAGE_START_MISSING),
    (ExchangeError, Refusal(101, "the message is not what the plan says it should be")),
    (PlanError, Refusal(102, "the plan cannot be read")),
    (StageSpentError, Refusal(153, TOLD_OUT)),
    (PlanBudgetExceededError, Refusal(117, "the plan has spent its own target epsilon here")),
    (
        AloneBudgetExceededError,
        Refusal(146, "the site's own shares of noise would protect its patients too little"),
    ),
    (BudgetExceededError, Refusal(104, "the cohort's lifetime privacy budget does not allow it")),
    (LedgerPlaceError, Refusal(150, "the site's ledger is bound to another place than this")),
    (LedgerError, Refusal(105, "the site's privacy ledger does not allow it")),
    (CalibrationError, Refusal(106, "no noise reaches the plan's target epsilon")),
    (AdapterError, Refusal(107, "the plan's adapter does not fit the foundation")),
    (BatchCoupledLossError, Refusal(108, "the loss has no per-patient sensitivity")),
    (TrainingError, Refusal(109, "training ended without a usable update")),
    (RankError, Refusal(114, "a device of the site failed")),
    (FoundationError, Refusal(110, "the site's foundation is missing or damaged")),
    (NotAgreedError, Refusal(118, "the site's number of patients is not the one that was agreed")),
    (EnrolmentError, Refusal(116, "the coordinator did not witness the site's ledger")),
    (WitnessError, Refusal(151, "a witness of the site's ledger is away")),
    (LateAnswerError, Refusal(152, "the site's answer would leave after the plan's deadline")),
    (NotReadyError, Refusal(119, "the site holds no sum for what is announced")),
    (MembersError, Refusal(145, "the announced members are not ones that the site adds to")),
    (HomeError, NOT_SET_UP),
    (TileStoreError, NOT_SET_UP),
    (OutboxError, Refusal(113, "the site cannot send its sealed answer again")),
)
"""The first type that fits."""

OF_RULE: dict[Rule, Refusal] = {
    Rule.SIGNER: Refusal(120, "policy: the plan's signer is not allowed here"),
    Rule.SIGNATURE: Refusal(121, "policy: the plan's signature is not valid"),
    Rule.PLAN_HASH: Refusal(122, "policy: the request names another plan than the signed one"),
    Rule.FOUNDATION: Refusal(123, "policy: the plan starts from another foundation"),
    Rule.PRIVATE: Refusal(124, "policy: training without privacy is not allowed"),
    Rule.EPSILON: Refusal(125, "policy: the target epsilon is too high"),
    Rule.DELTA: Refusal(126, "policy: delta is too high"),
    Rule.NOISE: Refusal(127, "policy: the plan leads to too little noise"),
    Rule.SAMPLE_RATE: Refusal(128, "policy: the sample rate is too high"),
    Rule.PATIENTS: Refusal(129, "policy: the cohort is too small to take part"),
    Rule.TILES: Refusal(130, "policy: too many tiles of one patient"),
    Rule.DRAWS: Refusal(147, "policy: too many draws of one tile"),
    Rule.STAGE: Refusal(131, "policy: a stage of the plan is not allowed"),
    Rule.STEPS: Refusal(132, "policy: too many local steps"),
    Rule.ROUNDS: Refusal(133, "policy: the plan has too many rounds"),
    Rule.SECURE_AGGREGATION: Refusal(134, "policy: secure aggregation is required"),
    Rule.ROUND: Refusal(135, "policy: the plan has no such round"),
    Rule.FACTOR: Refusal(136, "policy: the round trains another factor"),
    Rule.REPLAY: Refusal(137, "policy: the round was answered before, from another checkpoint"),
    Rule.UPDATE_NORM: Refusal(138, "policy: the update is longer than the site lets out"),
    Rule.APPROVAL: Refusal(139, "policy: nobody at the site has approved the plan yet"),
    Rule.ADAPTER_NORM: Refusal(148, "policy: the adapter is longer than the site trains from"),
    Rule.RUN: Refusal(140, "policy: the plan has had its run here; its operator can allow another"),
    Rule.FOUNDATION_APPROVAL: Refusal(
        149, "policy: nobody at the site has approved the foundation yet"
    ),
    Rule.ROSTER: Refusal(141, "policy: nobody at the site has approved this roster"),
    Rule.TRUST: Refusal(142, "policy: the plan's trust is not allowed"),
    Rule.COLLUDING: Refusal(143, "policy: the plan holds against too few colluding sites"),
    Rule.MEMBERS: Refusal(144, "policy: the plan takes sums over too few sites"),
}


def refusal_of(error: Exception) -> Refusal:
    """The public face of an error; what the table does not know is ``INTERNAL``."""
    if isinstance(error, PolicyError):
        return OF_RULE[error.rule]
    for kind, refusal in OF_ERROR:
        if isinstance(error, kind):
            return refusal
    return INTERNAL
