"""A study of sums with one real site, peers that hold nothing but keys, and any coordinator."""

from pathlib import Path

import numpy as np
from flwr.app import ConfigRecord, RecordDict
from torch import Tensor

from crafts_client.home import POLICY_NAME, SiteHome, to_toml
from crafts_client.messages import AnnouncementMessage, RoundMessage, read_announcement
from crafts_client.outbox import Release
from crafts_client.site import Site
from crafts_client.site_key import site_key
from crafts_core.array_bytes import PACKED
from crafts_core.exchange import Announcement, ReadyReply, RoundRequest
from crafts_core.foundation import Foundation
from crafts_core.plan import Plan
from crafts_core.releases import release_schema
from crafts_core.roster import Roster
from crafts_core.state import State
from crafts_privacy import signing
from crafts_privacy.ledger import Ledger
from crafts_privacy.plan_noise import stage_noise_multiplier
from crafts_privacy.secure_aggregation.fixed_point import from_group
from crafts_privacy.secure_aggregation.masking import add_masks_, add_up_
from crafts_privacy.secure_aggregation.members import announce, verify_members
from support.sites import Coordinator, flower_message, make_site_home, plan_values
from support.sums import SumSite


def distributed_values(foundation_hash: str, **stage: object) -> dict[str, object]:
    """As little training as there can be, as steps over all sites' patients."""
    values = plan_values(foundation_hash)
    values["adapter"] |= {"targets": ["to_q"]}  # type: ignore[operator]
    first = {"name": "pretraining", "rounds": 4, "local_steps": 1, "learning_rate": 0.05}
    values["stage"] = [first | stage]
    values["privacy"] |= {  # type: ignore[operator]
        "trust": "distributed",
        "colluding_sites": 1,
        "sum_grid_bits": 18,
        "spare_steps": 4,
        "target_epsilon": 1.0,
        "tiles_per_patient": 1,
        "draws_per_tile": 1,
    }
    values["aggregation"] |= {"min_sites": 3, "secure_aggregation": True}  # type: ignore[operator]
    return values


STAGES = ("anchors", "colour", "pretraining", "alignment")


def telling_plan(foundation: Foundation, *, noise_multiplier: float = 16.0) -> Plan:
    """``distributed_values`` after a release of colour."""
    values = distributed_values(foundation.manifest.hash)
    told = {"name": "colour", "noise_multiplier": noise_multiplier}
    return Plan.parse(values | {"stage": [told, *values["stage"]]})  # type: ignore[misc]


def values_of_updates(foundation_hash: str, **stage: object) -> dict[str, object]:
    """The same with all noise at each site, and two steps in a round."""
    values = distributed_values(foundation_hash, **({"local_steps": 2} | stage))
    privacy = dict(values["privacy"])  # type: ignore[call-overload]
    for key in ("colluding_sites", "sum_grid_bits"):
        del privacy[key]
    values["privacy"] = privacy | {"trust": "site", "spare_steps": 8}
    values["aggregation"] |= {"rule": "by_patients"}  # type: ignore[operator]
    return values


def summing_home(
    path: Path, foundation: Foundation, coordinator: Coordinator, **policy: object
) -> SiteHome:
    """A home whose policy allows sums; its budget has room for a plain study beside one."""
    generous = {
        "allowed_trust": ("site", "distributed"),
        "max_epsilon_alone": 60.0,
        "max_delta": 5e-3,
    }
    return make_site_home(path, foundation, coordinator.public_key, **(generous | policy))


class SumStudy:
    """One real site, peers that hold nothing but keys, and a coordinator that may lie."""

    def __init__(
        self,
        coordinator: Coordinator,
        foundation: Foundation,
        home: SiteHome,
        plan: Plan | None = None,
    ) -> None:
        """The roster is approved, unless a test takes that back. Peers join in the first stage."""
        self.coordinator, self.home = coordinator, home
        self.plan = plan or Plan.parse(distributed_values(foundation.manifest.hash))
        self.state = coordinator.start(self.plan) | release_schema(self.plan, foundation)
        self.identity = site_key(home, None)
        home.roster_approvals.approve(self.roster())

    def roster(self, **changes: str) -> Roster:
        """With the site's own key, or another site's key changed."""
        peers = self.peers("0" * 64)
        keys = {name: signing.public_key_of(peer.identity) for name, peer in peers.items()}
        patients = {name: peer.declared_patients for name, peer in peers.items()}
        own = self.home.config.name
        return Roster.of(
            self.plan.hash,
            patients | {own: self.home.config.declared_patients},
            keys | {own: signing.public_key_of(self.identity)} | changes,
        )

    def peers(self, request_hash: str) -> dict[str, SumSite]:
        return {
            name: self.peer(name, number, request_hash)
            for number, name in enumerate(("east", "south"), start=2)
        }

    def peer(self, name: str, number: int, request_hash: str) -> SumSite:
        return SumSite(
            name,
            number,
            declared_patients=30 + number,
            request=request_hash,
            noise_multiplier=stage_noise_multiplier(self.plan, self.plan.stage[0]),
        )

    def request(
        self, number: int = 1, attempt: int = 1, state: State | None = None
    ) -> RoundRequest:
        return self.coordinator.request(
            self.plan, state or self.state, number=number, attempt=attempt
        )

    def ask(self, request: RoundRequest, state: State | None = None) -> RoundMessage:
        return self.coordinator.message(self.plan, state or self.state, request=request)

    def announcement(self, request: RoundRequest, ready: ReadyReply) -> Announcement:
        peers = self.peers(request.hash).values()
        return announce([ready, *(peer.ready for peer in peers)])

    def told(self, request: RoundRequest, announcement: Announcement) -> RecordDict:
        """The content of an announcement's message."""
        content = self.coordinator.content(self.plan, self.state, request)
        del content["adapter"]
        content["announcement"] = ConfigRecord({"json": announcement.to_json()})
        return content

    def tell(self, request: RoundRequest, announcement: Announcement) -> AnnouncementMessage:
        content = self.told(request, announcement)
        return read_announcement(flower_message(content, message_type="train.masked"))

    def ready(self, site: Site, number: int = 1, attempt: int = 1) -> ReadyReply:
        answer = site.answer(self.ask(self.request(number, attempt)))
        assert isinstance(answer, ReadyReply)
        return answer

    def add(self, site: Site, number: int = 1, attempt: int = 1) -> Release:
        """Both messages of an honest coordinator."""
        request = self.request(number, attempt)
        return site.add_to_sum(
            self.tell(request, self.announcement(request, self.ready(site, number, attempt)))
        )

    def opened(self, release: Release, announcement: Announcement) -> Tensor:
        """The sum, once peers who have no patients and add no noise have added their masks."""
        total = release.delta[PACKED].numpy().view(np.uint32).copy()
        for name, peer in self.peers(announcement.request_hash).items():
            members = verify_members(announcement, self.roster(), peer.ready, min_members=2)
            vector = np.zeros_like(total)
            add_masks_(vector, peer.mask_key.pair_keys(name, members))
            add_up_(total, vector)
        return from_group(total)


def kinds(home: SiteHome) -> list[str]:
    """Of the ledger's entries about rounds."""
    return [str(e.kind) for e in Ledger(home.ledger_path).entries() if e.kind != "placed"]


def set_policy(home: SiteHome, **changes: object) -> None:
    policy = home.policy.model_copy(update=changes)
    (home.path / POLICY_NAME).write_text(to_toml(policy))
