"""Sites of a sum on a grid in this process: real keys and masks, gradients from a formula.

A hostile peer is one of these with a method replaced.
"""

from collections.abc import Mapping

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, RecordDict
from torch import Tensor

from crafts_core.array_bytes import PACKED
from crafts_core.exchange import Announcement, MaskedReply, RoundRequest, schema_hash
from crafts_core.plan import Plan
from crafts_core.roster import Roster
from crafts_core.state import State
from crafts_privacy import signing
from crafts_privacy.plan_noise import plan_noise_multiplier
from crafts_privacy.secure_aggregation.fixed_point import to_group
from crafts_privacy.secure_aggregation.masking import Group, MaskKey, add_masks_
from crafts_privacy.secure_aggregation.members import (
    Members,
    MembersError,
    sign_ready,
    verify_members,
)
from crafts_privacy.secure_aggregation.shares import own_noise_multiplier
from crafts_privacy.secure_aggregation.updates import UpdateGrid
from crafts_server.sum_of_sites import step_of
from support.studies import received, small_plan, small_state

NAMES = ("aachen", "bern", "coimbra", "dresden", "essen", "fulda", "gera", "halle")


def summed_plan(*, rounds: int = 2, colluding_sites: int = 1, **aggregation: object) -> Plan:
    """``small_plan`` as one step a round over all patients."""
    values = small_plan(rounds=rounds).model_dump(mode="json")
    for stage in values["stage"]:
        stage["local_steps"] = 1
    values["privacy"] |= {
        "mechanism": "patient_dp",
        "target_epsilon": 8.0,
        "delta": 1e-3,
        "trust": "distributed",
        "colluding_sites": colluding_sites,
        "sum_grid_bits": 18,
    }
    values["aggregation"] = {
        "rule": "uniform",
        "min_sites": 3,
        "secure_aggregation": True,
        **aggregation,
    }
    return Plan.parse(values)


def plan_of_updates(
    *, rounds: int = 2, stage: Mapping[str, object] | None = None, **aggregation: object
) -> Plan:
    """``summed_plan`` with all noise at each site, and the local steps of ``small_plan``."""
    values = summed_plan(rounds=rounds, **aggregation).model_dump(mode="json")
    values["stage"] = [each | {"local_steps": 3} | dict(stage or {}) for each in values["stage"]]
    for key in ("colluding_sites", "sum_grid_bits"):
        del values["privacy"][key]
    values["privacy"]["trust"] = "site"
    return Plan.parse(values)


class SummingSite:
    """Draws all its patients; each has the same gradient of norm at most one."""

    def __init__(self, name: str, plan: Plan, *, patients: int = 40, goal: float = 1.0) -> None:
        self.name, self.plan, self.patients, self.goal = name, plan, patients, goal
        self.noise_multiplier = plan_noise_multiplier(plan)
        self.identity = Ed25519PrivateKey.generate()
        self.held: dict[str, tuple[MaskKey, Tensor]] = {}
        self.sealed: dict[str, RecordDict] = {}
        self.sent: list[tuple[int, int, str]] = []
        """Round, attempt and members_hash of every vector that left."""

    def __call__(self, content: RecordDict) -> RecordDict | Error | None:
        request = RoundRequest.from_scalars(dict(content["request"]))
        if "announcement" in content:
            text = content["announcement"]["json"]
            assert isinstance(text, str)
            return self.masked(request, Announcement.parse(text))
        return self.ready(request, received(content["adapter"]))

    def ready(self, request: RoundRequest, state: State) -> RecordDict | Error | None:
        trained = {name: state[name] for name in factor_names_of(request, state)}
        flat_D = torch.cat([trained[name].reshape(-1) for name in sorted(trained)])
        key = MaskKey()
        word = sign_ready(
            self.identity,
            site=self.name,
            request_hash=request.hash,
            declared_patients=self.patients,
            noise_multiplier=self.noise_multiplier,
            key=key.public_key,
        )
        self.held[request.hash] = (key, self.sum_of(flat_D))
        self.word = word
        return RecordDict({"ready": ConfigRecord(dict(word.to_scalars()))})

    def sum_of(self, flat_D: Tensor) -> Tensor:
        """Whole grid steps: every patient pulls towards the goal."""
        gradient_D = (flat_D.double() - self.goal) / 10.0
        gradient_D /= max(1.0, float(torch.linalg.vector_norm(gradient_D)))
        return (gradient_D / step_of(self.plan.privacy)).trunc() * self.patients

    def noise(self, own: float, num_values: int) -> Tensor:
        """Drawn anew for every vector."""
        deviation = own * self.plan.privacy.max_grad_norm / step_of(self.plan.privacy)
        return (torch.randn(num_values, dtype=torch.float64) * deviation).round()

    def masked(
        self, request: RoundRequest, announcement: Announcement
    ) -> RecordDict | Error | None:
        if request.hash in self.sealed:
            return self.sealed[request.hash]
        if request.hash not in self.held:
            return Error(119, "this site is not ready for this round")
        key, sum_D = self.held.pop(request.hash)
        try:
            members = verify_members(announcement, self.roster, self.word, min_members=3)
        except MembersError:
            return Error(141, "the announced members are not what this site approved")
        own, vector_D = self.vector(request, members, announcement, sum_D)
        add_masks_(vector_D, key.pair_keys(self.name, members))
        self.sealed[request.hash] = self.reply(request, members.hash, vector_D, own)
        self.sent.append((request.round, request.attempt, members.hash))
        return self.sealed[request.hash]

    def vector(
        self,
        _request: RoundRequest,
        members: Members,
        _announcement: Announcement,
        sum_D: Tensor,
    ) -> tuple[float, Group]:
        """The noise that was added, and the vector before masks."""
        own = own_noise_multiplier(
            members.noise_multiplier,
            num_members=len(members),
            colluding_sites=self.plan.privacy.colluding_sites or 0,
        )
        return own, to_group(sum_D + self.noise(own, len(sum_D)))

    def reply(
        self,
        request: RoundRequest,
        members_hash: str,
        vector_D: Group,
        own: float,
        **changes: object,
    ) -> RecordDict:
        values = {
            "site": self.name,
            "run_id": request.run_id,
            "plan_hash": request.plan_hash,
            "round": request.round,
            "request_hash": request.hash,
            "members_hash": members_hash,
            "schema_hash": schema_hash(factor_of(request)),
            "own_noise_multiplier": own,
        }
        reply = MaskedReply.from_scalars(values | changes)
        return RecordDict(
            {
                "masked": ConfigRecord(dict(reply.to_scalars())),
                "sum": ArrayRecord({PACKED: Array.from_numpy_ndarray(vector_D)}),
            }
        )

    roster: Roster
    """Set once all sites are there."""


class UpdatingSite(SummingSite):
    """Of site trust: goes a part of the way to its goal, with the noise of its own promise."""

    def sum_of(self, flat_D: Tensor) -> Tensor:
        """The update, before its noise."""
        return (self.goal - flat_D.double()) / 1000.0

    def noise(self, own: float, num_values: int) -> Tensor:
        """Of one step without momentum, so a little less than what is declared for three."""
        privacy, (stage, *_) = self.plan.privacy, self.plan.stage
        deviation = own * privacy.max_grad_norm / (privacy.sample_rate * self.patients)
        return torch.randn(num_values, dtype=torch.float64) * deviation * stage.learning_rate

    def vector(
        self, request: RoundRequest, members: Members, announcement: Announcement, sum_D: Tensor
    ) -> tuple[float, Group]:
        grid = UpdateGrid.of(
            self.plan,
            self.plan.stage[request.stage_index],
            {ready.site: ready.declared_patients for ready in announcement.members},
            noise_multiplier=members.noise_multiplier,
        )
        update_D = sum_D + self.noise(self.noise_multiplier, len(sum_D))
        return self.noise_multiplier, grid.part_of(self.name, update_D)


def summing_sites(
    plan: Plan, num_sites: int = 3, *, kinds: Mapping[int, type[SummingSite]] | None = None
) -> dict[int, SummingSite]:
    """By node from 10 up, with another number of patients each, and all of one roster.

    ``kinds`` says which are of another kind, counted from 0.
    """
    sites = {
        10 + number: (kinds or {}).get(number, SummingSite)(
            name, plan, patients=30 + 10 * number, goal=float(number)
        )
        for number, name in enumerate(NAMES[:num_sites])
    }
    roster = roster_of(plan, sites)
    for site in sites.values():
        site.roster = roster
    return sites


def roster_of(plan: Plan, sites: Mapping[int, SummingSite]) -> Roster:
    return Roster.of(
        plan.hash,
        {site.name: site.patients for site in sites.values()},
        {site.name: signing.public_key_of(site.identity) for site in sites.values()},
    )


def factor_of(request: RoundRequest) -> State:
    state = small_state()
    return {name: state[name] for name in factor_names_of(request, state)}


def factor_names_of(request: RoundRequest, state: State) -> list[str]:
    return [name for name in sorted(state) if name.endswith(f".{request.factor}")]
