"""What a site allows, whatever a plan or a message says. The gate in front of the trainer.

One rule is one function, so that each can be read, tested and explained alone. A rule sees public
values only: the plan, the request, the site's declared size and its own installed files. Nothing
in a message can loosen a policy, and what no rule knows is refused by the parsers before it.
"""

import tomllib
from collections.abc import Callable, Collection, Container, Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from crafts_client.errors import HomeError
from crafts_core.delta_text import delta_text
from crafts_core.errors import CraftsError
from crafts_core.fields import Name, Sha256, describe_first_error
from crafts_core.plan import Plan, RoundOfPlan
from crafts_core.plan_sections import StageName
from crafts_privacy.filters import FILTER_PATTERN, check_filters
from crafts_privacy.secure_aggregation.shares import MOST_OWN_NOISE, NOISE_TOLERANCE

if (
    TYPE_CHECKING
):  # torch and the accountants take seconds to import; `crafts-client status` should not
    from crafts_core.exchange import RoundRequest
    from crafts_privacy.lifetime import Lifetime
    from crafts_privacy.mechanism import Mechanism


class Rule(StrEnum):
    """The name of every rule. Public: a refusal says which one it was."""

    SIGNER = "signer"
    SIGNATURE = "signature"
    PLAN_HASH = "plan_hash"
    FOUNDATION = "foundation"
    PRIVATE = "private"
    EPSILON = "epsilon"
    DELTA = "delta"
    NOISE = "noise"
    SAMPLE_RATE = "sample_rate"
    PATIENTS = "patients"
    TILES = "tiles"
    DRAWS = "draws"
    STAGE = "stage"
    STEPS = "steps"
    ROUNDS = "rounds"
    SECURE_AGGREGATION = "secure_aggregation"
    ROUND = "round"
    FACTOR = "factor"
    REPLAY = "replay"
    UPDATE_NORM = "update_norm"
    ADAPTER_NORM = "adapter_norm"
    APPROVAL = "approval"
    RUN = "run"
    FOUNDATION_APPROVAL = "foundation_approval"
    TRUST = "trust"
    COLLUDING = "colluding"
    MEMBERS = "members"
    ROSTER = "roster"


class PolicyError(CraftsError):
    """The site's policy does not allow what was asked for."""

    def __init__(self, rule: Rule, message: str) -> None:
        super().__init__(f"policy rule {rule}: {message}")
        self.rule = rule


class Policy(BaseModel):
    """``policy.toml``: owned by the site, read by nobody else's code. Every limit is inclusive."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    allowed_signers: tuple[str, ...]
    """Ed25519 public keys, base64, of the coordinators whose plans this site reads."""
    allowed_stages: tuple[StageName, ...]
    max_epsilon: Annotated[float, Field(gt=0)]
    """Lifetime epsilon of the cohort over all studies together, at ``max_delta``."""
    max_delta: Annotated[float, Field(ge=1e-9, lt=1e-2)]
    """Where several filters share it, a share is what accountants resolve: 1e-10 or more."""
    lifetime_filters: Annotated[
        tuple[Annotated[str, Field(pattern=FILTER_PATTERN)], ...], Field(min_length=1)
    ]
    """How the lifetime is counted while plans are chosen along the way: ``sums`` of what plans
    declare, ``renyi:ORDER``, or several, each with an equal share of ``max_delta``. For good: the
    ledger holds a cohort to the filters of its first round."""
    min_noise_multiplier: Annotated[float, Field(ge=0)]
    max_sample_rate: Annotated[float, Field(gt=0, le=1)]
    min_patients: Annotated[int, Field(ge=1)]
    """Smallest declared cohort that may take part at all."""
    max_tiles_per_patient: Annotated[int, Field(ge=1)]
    max_draws_per_tile: Annotated[int, Field(ge=1)]
    max_local_steps: Annotated[int, Field(ge=1)]
    max_rounds: Annotated[int, Field(ge=1)]
    max_update_norm: Annotated[float, Field(gt=0)]
    max_adapter_norm: Annotated[float, Field(gt=0)]
    """Longest adapter that is trained from, whoever signed for it (L2 over all its numbers)."""
    allow_non_private: bool
    """Training without noise: for synthetic or public data only."""
    require_secure_aggregation: bool
    require_approval: bool
    """A person here reads every plan and approves it, before its first round."""
    allowed_trust: tuple[Literal["site", "distributed"], ...] = ("site",)
    """Who adds the noise: this site all of it, or all members of a sum a share each."""
    min_colluding_sites: Annotated[int, Field(ge=1)] = 1
    """Against how many other hospitals together with the coordinator a plan must hold."""
    min_members: Annotated[int, Field(ge=3)] = 3
    """Smallest sum that this site adds to."""
    max_epsilon_alone: Annotated[float, Field(gt=0)] | None = None
    """Lifetime epsilon, at ``max_delta``, if every other hospital and the coordinator work together
    against this one, so that only the noise that it added itself protects it: shares of sums, and
    all of it where ``trust`` is "site"."""
    min_own_noise_multiplier: Annotated[float, Field(ge=0)] = 0.0
    """Smallest share of noise that this site adds, whatever its part would be."""
    peers: dict[Name, Sha256] = {}
    """Fingerprints of other hospitals' keys that somebody here has checked for good."""

    @model_validator(mode="after")
    def _filters_leave_room(self) -> Self:
        check_filters(self.lifetime_filters, max_epsilon=self.max_epsilon, delta=self.max_delta)
        return self

    @model_validator(mode="after")
    def _distributed_trust_is_bounded(self) -> Self:
        if "distributed" in self.allowed_trust and self.max_epsilon_alone is None:
            raise ValueError(
                'allowed_trust with "distributed" needs max_epsilon_alone: what may be spent if '
                "everybody else works together against this hospital"
            )
        return self

    @property
    def lifetime(self) -> "Lifetime":
        """The limit on everything that the cohort is charged, for the ledger."""
        from crafts_privacy.lifetime import Lifetime

        return Lifetime(
            max_epsilon=self.max_epsilon, delta=self.max_delta, filters=self.lifetime_filters
        )

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read and check a ``policy.toml``.

        Raises:
            HomeError: with the first offending key and what it should be.
        """
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
            return cls.model_validate(values)
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise HomeError(f"cannot read policy {path}: {error}") from error
        except ValidationError as error:
            raise HomeError(f"policy {path}: {describe_first_error(error)}") from error

    def check_plan(self, plan: Plan, *, declared_patients: int) -> None:
        """Apply every rule about the plan as a whole.

        Raises:
            PolicyError: the first rule that says no.
        """
        for violation in self.violations(plan, declared_patients=declared_patients):
            raise violation

    def violations(self, plan: Plan, *, declared_patients: int) -> Iterator[PolicyError]:
        """Everything about the plan that this policy does not allow."""
        for rule in PLAN_RULES:
            try:
                rule(self, Asked(plan, declared_patients))
            except PolicyError as violation:
                yield violation

    def check_approved(self, plan: Plan, approved: Container[str]) -> None:
        """Somebody here said yes to exactly this plan, where the policy wants that.

        Args:
            plan: As it was signed.
            approved: Hashes of the approved plans.

        Raises:
            PolicyError: rule ``approval``.
        """
        if self.require_approval and plan.hash not in approved:
            raise PolicyError(
                Rule.APPROVAL,
                f"nobody here approved the plan; run crafts-client plan approve {plan.hash}",
            )

    def check_noise(self, plan: Plan, mechanism: "Mechanism") -> None:
        """The calibrated noise must not be weaker than the site's floor, nor a share too strong.

        A coordinator voids a sum with a larger share than it sized the sum for, and a void sum is
        charged to every member.

        Raises:
            PolicyError: rule ``noise``.
        """
        if mechanism.private and mechanism.noise_multiplier < self.min_noise_multiplier:
            raise PolicyError(
                Rule.NOISE,
                f"the plan leads to noise_multiplier {mechanism.noise_multiplier:g}, "
                f"the site's floor is {self.min_noise_multiplier:g}",
            )
        most = MOST_OWN_NOISE * (1 - NOISE_TOLERANCE) * mechanism.noise_multiplier
        if plan.privacy.trust == "distributed" and self.min_own_noise_multiplier > most:
            raise PolicyError(
                Rule.NOISE,
                f"the plan's sums take a share of at most {most:.4g}, the site's floor "
                f"min_own_noise_multiplier is {self.min_own_noise_multiplier:g}; lower it, or take "
                "part in plans of smaller epsilon",
            )

    def check_update_norm(self, update_norm: float) -> None:
        """A released update must not be longer than the site's limit.

        Raises:
            PolicyError: rule ``update_norm``.
        """
        if not update_norm <= self.max_update_norm:  # NaN must refuse too
            raise PolicyError(
                Rule.UPDATE_NORM,
                f"the update's norm {update_norm:g} passes {self.max_update_norm:g}",
            )

    def check_adapter_norm(self, adapter_norm: float) -> None:
        """What a coordinator sends to train from must be of a believable size.

        Raises:
            PolicyError: rule ``adapter_norm``.
        """
        if not adapter_norm <= self.max_adapter_norm:  # NaN must refuse too
            raise PolicyError(
                Rule.ADAPTER_NORM,
                f"the adapter's norm {adapter_norm:g} passes {self.max_adapter_norm:g}",
            )


class Asked(NamedTuple):
    """What a rule about a plan may look at."""

    plan: Plan
    declared_patients: int


PlanRule = Callable[[Policy, Asked], None]


def plan_is_private(policy: Policy, asked: Asked) -> None:
    """Training without privacy needs the site's explicit word."""
    if asked.plan.privacy.mechanism != "patient_dp" and not policy.allow_non_private:
        raise PolicyError(Rule.PRIVATE, "the plan trains without privacy, which is not allowed")


def epsilon_is_allowed(policy: Policy, asked: Asked) -> None:
    """One plan may not ask for more than the lifetime holds."""
    target = asked.plan.privacy.target_epsilon
    if target is not None and target > policy.max_epsilon:
        raise PolicyError(
            Rule.EPSILON, f"target_epsilon {target:g} passes max_epsilon {policy.max_epsilon:g}"
        )


def delta_is_allowed(policy: Policy, asked: Asked) -> None:
    """Delta is the chance that the promise says nothing."""
    delta = asked.plan.privacy.delta
    if delta is not None and delta > policy.max_delta:
        raise PolicyError(
            Rule.DELTA,
            f"delta {delta_text(delta)} passes max_delta {delta_text(policy.max_delta)}",
        )


def sample_rate_is_allowed(policy: Policy, asked: Asked) -> None:
    """Part of the cohort that one step may look at, in expectation."""
    if asked.plan.privacy.sample_rate > policy.max_sample_rate:
        raise PolicyError(
            Rule.SAMPLE_RATE,
            f"sample_rate {asked.plan.privacy.sample_rate:g} passes {policy.max_sample_rate:g}",
        )


def cohort_is_large_enough(policy: Policy, asked: Asked) -> None:
    """A tiny cohort gets mostly noise for its budget. Judged by the public, declared size."""
    if asked.declared_patients < policy.min_patients:
        raise PolicyError(
            Rule.PATIENTS,
            f"the site declares {asked.declared_patients} patients, its policy wants "
            f"{policy.min_patients}",
        )


def tiles_are_allowed(policy: Policy, asked: Asked) -> None:
    """Tiles of one patient in one step."""
    if asked.plan.privacy.tiles_per_patient > policy.max_tiles_per_patient:
        raise PolicyError(
            Rule.TILES,
            f"tiles_per_patient {asked.plan.privacy.tiles_per_patient} passes "
            f"{policy.max_tiles_per_patient}",
        )


def draws_are_allowed(policy: Policy, asked: Asked) -> None:
    """Draws of one tile in one step: with tiles and steps, how long one patient can take."""
    if asked.plan.privacy.draws_per_tile > policy.max_draws_per_tile:
        raise PolicyError(
            Rule.DRAWS,
            f"draws_per_tile {asked.plan.privacy.draws_per_tile} passes "
            f"{policy.max_draws_per_tile}",
        )


def stages_are_allowed(policy: Policy, asked: Asked) -> None:
    """Every stage that asks something of the site is one that it takes part in."""
    for stage in asked.plan.stage:
        if not stage.is_retrieval and stage.name not in policy.allowed_stages:
            raise PolicyError(Rule.STAGE, f"stage {stage.name} is not allowed")


def steps_are_allowed(policy: Policy, asked: Asked) -> None:
    """Local steps of one round: what keeps the site's machine busy."""
    for stage in asked.plan.stage:
        if stage.local_steps > policy.max_local_steps:
            raise PolicyError(
                Rule.STEPS,
                f"local_steps {stage.local_steps} passes {policy.max_local_steps}",
            )


def rounds_are_allowed(policy: Policy, asked: Asked) -> None:
    """Rounds of the whole plan."""
    if asked.plan.num_rounds > policy.max_rounds:
        raise PolicyError(
            Rule.ROUNDS,
            f"the plan has {asked.plan.num_rounds} rounds, allowed are {policy.max_rounds}",
        )


def aggregation_is_secure_enough(policy: Policy, asked: Asked) -> None:
    """Some sites show the coordinator nothing but the sum over sites."""
    if policy.require_secure_aggregation and not asked.plan.aggregation.secure_aggregation:
        raise PolicyError(Rule.SECURE_AGGREGATION, "the plan does not use secure aggregation")


def trust_is_allowed(policy: Policy, asked: Asked) -> None:
    """Whether a share of the noise is enough, with others' shares beside it."""
    trust = asked.plan.privacy.trust
    if trust not in policy.allowed_trust:
        raise PolicyError(Rule.TRUST, f"the plan's trust is {trust!r}, which is not allowed")


def enough_sites_may_collude(policy: Policy, asked: Asked) -> None:
    """The promise must hold against so many others together with the coordinator."""
    colluding = asked.plan.privacy.colluding_sites
    if colluding is not None and colluding < policy.min_colluding_sites:
        raise PolicyError(
            Rule.COLLUDING,
            f"the plan holds against {colluding} colluding sites, the policy wants "
            f"{policy.min_colluding_sites}",
        )


def sums_are_large_enough(policy: Policy, asked: Asked) -> None:
    """Members of the smallest sum that the plan takes a step with."""
    aggregation = asked.plan.aggregation
    if aggregation.secure_aggregation and aggregation.min_sites < policy.min_members:
        raise PolicyError(
            Rule.MEMBERS,
            f"the plan takes sums over {aggregation.min_sites} sites, the policy wants "
            f"{policy.min_members} members",
        )


PLAN_RULES: tuple[PlanRule, ...] = (
    plan_is_private,
    epsilon_is_allowed,
    delta_is_allowed,
    sample_rate_is_allowed,
    cohort_is_large_enough,
    tiles_are_allowed,
    draws_are_allowed,
    stages_are_allowed,
    steps_are_allowed,
    rounds_are_allowed,
    aggregation_is_secure_enough,
    trust_is_allowed,
    enough_sites_may_collude,
    sums_are_large_enough,
)


def check_request(plan: Plan, request: "RoundRequest", *, foundation_hash: str) -> RoundOfPlan:
    """The request asks for exactly one round of exactly this plan, on the installed foundation.

    Raises:
        PolicyError: it names another plan, a round beyond it, or another stage or factor; or it is
            another attempt at a round of which there is one.
    """
    if request.plan_hash != plan.hash:
        raise PolicyError(Rule.PLAN_HASH, "the request names another plan than the signed one")
    if plan.study.foundation != foundation_hash:
        raise PolicyError(Rule.FOUNDATION, "the plan starts from a foundation this site lacks")
    if request.attempt != 1 and not plan.aggregation.secure_aggregation:
        raise PolicyError(Rule.REPLAY, "only sums over sites are attempted again")
    if request.round > plan.num_rounds:
        raise PolicyError(
            Rule.ROUND, f"round {request.round} is beyond the plan's {plan.num_rounds}"
        )
    planned = next(entry for entry in plan.rounds() if entry.round == request.round)
    if planned.stage.is_retrieval:
        raise PolicyError(
            Rule.ROUND, f"round {request.round} is of public tiles alone and asks no site"
        )
    if request.stage_index != planned.stage_index:
        raise PolicyError(
            Rule.ROUND, f"round {request.round} belongs to stage {planned.stage_index}"
        )
    if request.factor != planned.factor:
        raise PolicyError(
            Rule.FACTOR, f"round {request.round} trains factor {planned.factor}, not another"
        )
    return planned


ONE_RUN = (
    "the plan has had its run, and one that tells something before training has no other; the "
    "coordinator has to make a new plan, which is charged beside this one"
)


def check_run(
    plan: Plan, request: "RoundRequest", known_runs: Collection[str], allowed_runs: int
) -> None:
    """A plan runs once. The coordinator chooses the ids of runs, so another one asks a person.

    Args:
        plan: What it runs.
        request: What the coordinator asks for.
        known_runs: Runs of this plan that the ledger has seen.
        allowed_runs: How many a person here has allowed.

    Raises:
        PolicyError: rule ``run``.
    """
    if request.run_id not in known_runs and len(known_runs) >= allowed_runs:
        if plan.releases:
            raise PolicyError(Rule.RUN, ONE_RUN)
        raise PolicyError(
            Rule.RUN,
            f"the plan has had {len(known_runs)} runs; to let another spend what is left of it, "
            f"run crafts-client plan approve {request.plan_hash} again",
        )


def check_not_replayed(
    request: "RoundRequest", last_released_round: int, last_attempt: int = 1
) -> None:
    """A round that this site released in this run, or an earlier one, is not trained again.

    Of a sum, another attempt at the last round is something new: what left for the one before it
    was charged, and so is this.

    Raises:
        PolicyError: rule ``replay``.
    """
    if request.round == last_released_round and request.attempt > last_attempt:
        return
    if request.round <= last_released_round:
        raise PolicyError(
            Rule.REPLAY,
            f"round {request.round} came after round {last_released_round} had been released",
        )
