"""The two questions of a sum: who is ready, and, once it is settled who the members are, theirs.

Masked vectors are added as they arrive, one in memory at a time. A part of a sum is nothing but
noise that no one can remove, so a set of which one member is missing is thrown away.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from flwr.app import Message

from crafts_core.exchange import Announcement, MaskedReply, ReadyReply, RoundRequest, schema_hash
from crafts_core.plan_sections import PrivacyConfig
from crafts_core.roster import Roster
from crafts_privacy.secure_aggregation.fixed_point import from_group
from crafts_privacy.secure_aggregation.masking import Group, add_up_
from crafts_privacy.secure_aggregation.members import MembersError, members_hash, verify_ready
from crafts_privacy.secure_aggregation.shares import (
    MOST_OWN_NOISE,
    NOISE_TOLERANCE,
    own_noise_multiplier,
    total_noise_multiplier,
)
from crafts_server.errors import UpdateRefusedError
from crafts_server.messages import announcement_message, read_masked, read_ready
from crafts_server.open_round import OpenRound
from crafts_server.sum_of_sites import OpenedSum
from crafts_server.verification import LEAST_NOISE


class ReadyPhase:
    """Every site trains, keeps its sum to itself, and says that it is ready."""

    def __init__(self, opened: OpenRound, request: RoundRequest, roster: Roster) -> None:
        self._opened = opened
        self._request = request
        self._roster = roster
        self.ready: dict[str, ReadyReply] = {}

    def compose(self, node_id: int) -> Message:
        """See :class:`Phase`."""
        return self._opened.ask(node_id, self._request)

    def accept(self, node_id: int, message: Message) -> None:
        """See :class:`Phase`. What the members will refuse is refused here, so that it is named."""
        ready = read_ready(message)
        if ready.request_hash != self._request.hash:
            raise UpdateRefusedError("request_hash: the site is ready for another request")
        try:
            # Half as far from here, so that no two of the members are too far from each other.
            verify_ready(
                ready,
                self._roster,
                noise_multiplier=self._opened.noise_multiplier,
                tolerance=NOISE_TOLERANCE / 2,
            )
        except MembersError as error:
            raise UpdateRefusedError(str(error)) from error
        keys = {other.key for site, other in self.ready.items() if site != ready.site}
        if ready.key in keys:
            raise UpdateRefusedError("key: another site has this one")
        self._opened.take(node_id, ready.site)
        self.ready[ready.site] = ready


@dataclass(slots=True)
class SumOfPart:
    """One announced set, while its vectors come in."""

    attempt: int
    announcement: Announcement
    total_D: Group
    members: dict[str, ReadyReply] = field(init=False)
    members_hash: str = field(init=False)
    text: str = field(init=False)
    noise_multipliers: dict[str, float] = field(init=False, default_factory=dict)
    """Of who has delivered."""

    def __post_init__(self) -> None:
        self.members = {ready.site: ready for ready in self.announcement.members}
        self.members_hash = members_hash(self.announcement)
        self.text = self.announcement.to_json()

    @property
    def missing(self) -> list[str]:
        """Who has not delivered, by name."""
        return sorted(self.members.keys() - self.noise_multipliers.keys())

    def opened(self) -> OpenedSum:
        """The sum. Only of a part that nobody is missing from."""
        assert not self.missing
        return OpenedSum(
            sum_D=from_group(self.total_D),
            declared_patients=sum(ready.declared_patients for ready in self.members.values()),
            noise_multiplier=total_noise_multiplier(self.noise_multipliers.values()),
        )


class MaskedPhase:
    """The members of each announced set deliver their masked vectors."""

    def __init__(
        self,
        opened: OpenRound,
        request: RoundRequest,
        announcements: Sequence[Announcement],
        *,
        is_resumed: bool,
    ) -> None:
        """Prepare.

        Args:
            opened: The round.
            request: Of the attempt.
            announcements: Of the attempt; no site is in two.
            is_resumed: Another process heard who was ready, so a node that nobody has named yet
                may be a member.
        """
        self._opened = opened
        self._is_resumed = is_resumed
        self._request = request
        self._num_values = sum(tensor.numel() for tensor in opened.schema.values())
        self._schema_hash = schema_hash(opened.schema)
        self.parts = [
            SumOfPart(request.attempt, announcement, np.zeros(self._num_values, dtype=np.uint32))
            for announcement in announcements
        ]

    def asks(self, node_id: int) -> bool:
        """Whether a node is, or may be, one of the members."""
        return self._part(self._opened.sites.name(node_id)) is not None

    def compose(self, node_id: int) -> Message:
        """See :class:`Phase`."""
        part = self._part(self._opened.sites.name(node_id))
        assert part is not None
        self._opened.bytes_down += len(part.text)
        study = self._opened.study
        return announcement_message(
            self._request,
            study.signed_plan,
            part.text,
            node_id=node_id,
            ttl_s=study.plan.aggregation.masked_deadline_s,
        )

    def accept(self, node_id: int, message: Message) -> None:
        """See :class:`Phase`. A vector is added once, to the sum that its masks were made for."""
        reply, vector_D, num_bytes = read_masked(message, self._num_values)
        self._opened.bytes_up += num_bytes
        part = self._part(reply.site)
        if part is None or reply.site not in part.members:
            raise UpdateRefusedError(f"{reply.site} is no member of this sum")
        self._check(reply, part)
        self._opened.sites.bind(node_id, reply.site)
        part.noise_multipliers[reply.site] = reply.own_noise_multiplier
        add_up_(part.total_D, vector_D)

    def _check(self, reply: MaskedReply, part: SumOfPart) -> None:
        request = self._request
        wanted_of = {
            "run_id": request.run_id,
            "plan_hash": request.plan_hash,
            "round": request.round,
            "request_hash": request.hash,
            "members_hash": part.members_hash,
            "schema_hash": self._schema_hash,
        }
        for name, wanted in wanted_of.items():
            got = getattr(reply, name)
            if got != wanted:
                raise UpdateRefusedError(
                    f"{name}: expected {str(wanted)[:16]}, got {str(got)[:16]}"
                )
        if reply.site in part.noise_multipliers:
            raise UpdateRefusedError(f"{reply.site} has delivered before")
        noise = self._opened.noise_multiplier
        share = share_of(self._opened.privacy, noise, len(part.members))
        if not share * LEAST_NOISE <= reply.own_noise_multiplier:
            raise UpdateRefusedError(
                f"own_noise_multiplier: expected at least this member's share of {share:g}, got "
                f"{reply.own_noise_multiplier:g}"
            )
        if reply.own_noise_multiplier > noise * MOST_OWN_NOISE:
            raise UpdateRefusedError(
                f"own_noise_multiplier: expected at most {MOST_OWN_NOISE:g} times the plan's "
                f"{noise:g}, got {reply.own_noise_multiplier:g}"
            )

    def _part(self, site: str | None) -> SumOfPart | None:
        """The part of a site; of a node that nobody has named, the only one there is."""
        if site is None:
            return self.parts[0] if self._is_resumed and len(self.parts) == 1 else None
        return next((part for part in self.parts if site in part.members), None)


def share_of(privacy: PrivacyConfig, noise_multiplier: float, num_members: int) -> float:
    """The noise that the plan asks of each of so many members: of site trust all of it."""
    if privacy.trust == "site":
        return noise_multiplier
    assert privacy.colluding_sites is not None
    return own_noise_multiplier(
        noise_multiplier, num_members=num_members, colluding_sites=privacy.colluding_sites
    )
