"""A site's part in one sum over sites: its word that it is ready, then one masked vector.

What a round came to and the key of its masks are in memory only, for one request, and go when they
are used or something else is asked for. So a process that dies has nothing left that could leave,
and one put back from a backup has no key to use again.

::

    ready    reserve, train, hold the result, sign a fresh key      nothing of a patient has left
    masked   verify the members, add noise for exactly them, mask, seal, commit     one vector

Of distributed trust the result is a clipped sum, and its share of the noise is added for the
members. Of site trust it is an update with all the noise that the site's promise needs, which the
masks hide from the coordinator; to it and the ledger it is the update of a plain round.

For each attempt at most one vector is ever sealed, for one announcement; asked again, the same
bytes are sent again.
"""

import threading
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from torch import Tensor

from crafts_client.errors import NotReadyError
from crafts_client.outbox import Outbox, Release
from crafts_client.policy import Policy, PolicyError, Rule
from crafts_core.array_bytes import PACKED
from crafts_core.exchange import Announcement, MaskedReply, ReadyReply, RoundRequest, schema_hash
from crafts_core.plan import Plan
from crafts_core.plan_sections import RELEASES, StageConfig
from crafts_core.roster import Roster
from crafts_privacy.accounting import PrivacyEvent
from crafts_privacy.held_sum import HeldSum
from crafts_privacy.ledger import AloneLimit, Reservation, Share
from crafts_privacy.mechanism import Mechanism
from crafts_privacy.plan_noise import plan_noise_multiplier
from crafts_privacy.secure_aggregation.masking import MaskKey
from crafts_privacy.secure_aggregation.members import (
    Members,
    members_hash,
    sign_ready,
    verify_members,
)
from crafts_privacy.secure_aggregation.shares import own_noise_multiplier
from crafts_privacy.secure_aggregation.updates import MOST_WEIGHT, HeldUpdate, UpdateGrid

MAX_HELD_S = 7 * 24 * 3600.0
"""A sum without noise is in memory no longer, however long a plan lets a coordinator wait."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Held:
    """What waits in memory for an announcement."""

    request: RoundRequest
    mechanism: Mechanism
    schema_hash: str
    reservation: Reservation
    ready: ReadyReply
    key: MaskKey
    result: HeldSum | HeldUpdate
    timer: threading.Timer
    """Overwrites the result."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenUp:
    """What was reserved for a sum of which nothing left and nothing can."""

    unused: Reservation | None = None
    """Nothing was told of it at all: it may pay for what is asked for now."""
    spent: Reservation | None = None
    """To be closed, or the same request would be trained again under it: its word was late, or not
    held back, which told roughly how many patients were drawn; or the same is asked for again, once
    the sum has grown old; or it was for another run, or for another number of steps."""


class SiteSums:
    """What a site holds for a sum, if it holds anything."""

    def __init__(self, outbox: Outbox, noise: str) -> None:
        """``noise`` is the name of the source that shares are drawn from."""
        self._outbox = outbox
        self._noise = noise
        self._lock = threading.Lock()
        """Sums grow old in a thread of their own."""
        self._held: _Held | None = None
        self._open: Reservation | None = None
        """Of the last word, while no vector was made for it; also once the sum has grown old."""
        self._is_in_time = False
        """Whether that word left at its time."""

    def hold(
        self,
        request: RoundRequest,
        result: HeldSum | HeldUpdate,
        reservation: Reservation,
        *,
        mechanism: Mechanism,
        trained: Mapping[str, Tensor],
        identity: Ed25519PrivateKey,
        site: str,
        declared_patients: int,
        keep_s: float,
    ) -> ReadyReply:
        """Keep a result, with a fresh key for its masks; the site's word that it is ready.

        After ``keep_s`` seconds, or ``MAX_HELD_S``, it is overwritten.
        """
        key = MaskKey()
        ready = sign_ready(
            identity,
            site=site,
            request_hash=request.hash,
            declared_patients=declared_patients,
            noise_multiplier=mechanism.noise_multiplier,
            key=key.public_key,
        )
        timer = threading.Timer(min(keep_s, MAX_HELD_S), self._grow_old, [ready])
        timer.daemon = True
        held = _Held(
            request=request,
            mechanism=mechanism,
            schema_hash=schema_hash(trained),
            reservation=reservation,
            ready=ready,
            key=key,
            result=result,
            timer=timer,
        )
        with self._lock:
            timer.start()  # first: where no thread can begin, nothing is held
            self._held = held
        self._open, self._is_in_time = reservation, False
        return ready

    def _take(self, ready: ReadyReply | None = None) -> _Held | None:
        """What is held, or only what ``ready`` was said of; from here on it is not."""
        with self._lock:
            held = self._held
            if held is None or (ready is not None and held.ready != ready):
                return None
            self._held = None
            held.timer.cancel()  # or its thread would wait for as long as the sum could have
            return held

    def _grow_old(self, ready: ReadyReply) -> None:
        """Overwrite the sum. Nothing of it left, so its charge may still be carried."""
        if (held := self._take(ready)) is not None:
            held.result.forget()

    def word_for(self, request: RoundRequest) -> ReadyReply | None:
        """What the site said to exactly this request, while it holds the sum of it."""
        held = self._held
        return held.ready if held is not None and held.request == request else None

    def left_in_time(self) -> None:
        """The last word left at a time that no patient decided."""
        self._is_in_time = True

    def give_up(self, request: RoundRequest, event: PrivacyEvent, stage: str) -> GivenUp:
        """Forget the sum, as ``request`` asks for another of ``event``; what becomes of its charge.

        What was charged for a release pays for that alone, or of another one more could be told.

        Only of a sum that was whole is anything known here: of a round that failed, or of a process
        that died in one, nobody knows what its end has told, and its charge stays where it is.
        """
        charge, self._open = self._open, None
        if (held := self._take()) is not None:
            held.result.forget()
        if charge is None:
            return GivenUp()
        if not self._is_in_time or charge.request_hash == request.hash:
            return GivenUp(spent=charge)
        wanted = (request.plan_hash, request.run_id, event)
        is_of_release = charge.stage != stage and {charge.stage, stage} & set(RELEASES)
        if (charge.plan_hash, charge.run_id, charge.event) != wanted or is_of_release:
            return GivenUp(spent=charge)
        return GivenUp(unused=charge)

    def release(
        self,
        request: RoundRequest,
        announcement: Announcement,
        *,
        plan: Plan,
        policy: Policy,
        roster: Roster,
    ) -> tuple[Release, Reservation]:
        """Seal the masked vector for an announcement; the ledger must still commit it.

        Raises:
            NotReadyError: the sum of this request is not here.
            MembersError: the announcement is not one that this site adds to.
            PolicyError: rule ``noise``: a floor was raised since.
        """
        held = self._held
        if held is None or held.request != request:
            raise NotReadyError("this site holds no sum for what is announced")
        policy.check_noise(plan, held.mechanism)
        members = verify_members(
            announcement, roster, held.ready, min_members=fewest_members(plan, policy)
        )
        grid = None
        if isinstance(held.result, HeldUpdate):
            patients = {each.site: each.declared_patients for each in announcement.members}
            grid = grid_of(
                *(plan, plan.stage[request.stage_index], patients),
                site=held.ready.site,
                noise_multiplier=members.noise_multiplier,
            )
        pairs = held.key.pair_keys(held.ready.site, members)
        if self._take(held.ready) is None:
            raise NotReadyError("the sum for what is announced has just grown too old")
        self._open = None
        own, share = held.mechanism.noise_multiplier, None
        if isinstance(held.result, HeldSum):
            own = _own_noise(held, members, plan, policy)
            share = Share(
                own_noise_multiplier=own,
                members=len(members),
                colluding_sites=plan.privacy.colluding_sites or 0,
            )
            vector_D = held.result.release(own, pairs)
        else:
            assert grid is not None
            vector_D = held.result.release(grid, held.ready.site, pairs)
        release = self._outbox.seal(
            request,
            _reply(held, members, own),
            {PACKED: torch.from_numpy(vector_D.view(np.int32))},
            held.reservation,
            noise=self._noise,
            share=share,
        )
        return release, held.reservation


def _reply(held: _Held, members: Members, own: float) -> MaskedReply:
    request = held.request
    return MaskedReply(
        site=held.ready.site,
        run_id=request.run_id,
        plan_hash=request.plan_hash,
        round=request.round,
        request_hash=request.hash,
        members_hash=members.hash,
        schema_hash=held.schema_hash,
        own_noise_multiplier=own,
    )


def _own_noise(held: _Held, members: Members, plan: Plan, policy: Policy) -> float:
    """This site's share, and no less than its charge was admitted with."""
    least = held.reservation.own_noise_multiplier
    assert least is not None  # what is held was charged as a sum's
    # A larger roster that was approved since, or a lower floor, takes nothing from it.
    share = share_of(plan, policy, members.noise_multiplier, num_members=len(members))
    return max(share, least)


def grid_of(
    plan: Plan,
    stage: StageConfig,
    patients: Mapping[str, int],
    *,
    site: str,
    noise_multiplier: float,
) -> UpdateGrid:
    """How much each site's own update counts in their sum, from public numbers and the plan alone.

    Raises:
        PolicyError: rule ``members``: the sum would be little but this site's own update.
    """
    grid = UpdateGrid.of(plan, stage, patients, noise_multiplier=noise_multiplier)
    if grid.heaviest == site:
        raise PolicyError(
            Rule.MEMBERS,
            f"of a sum over {', '.join(sorted(patients))} this site would be "
            f"{grid.weights[site]:.2f}, at most {MOST_WEIGHT:g} is hidden by the others; ask for a "
            'plan with rule = "alignment_regularized" and its max_weight, or "uniform"'
            + (", and without stages anchors and colour" if stage.is_release else ""),
        )
    return grid


def check_weight(plan: Plan, roster: Roster, site: str) -> None:
    """Among all of the roster this site is not most of a sum, whatever caps the plan has.

    Raises:
        PolicyError: rule ``members``.
    """
    if plan.privacy.trust == "site":
        noise = plan_noise_multiplier(plan)
        for stage in plan.asked:
            of_stage = stage.noise_multiplier or noise
            grid_of(plan, stage, roster.patients, site=site, noise_multiplier=of_stage)


def check_answers(sealed: Release, announcement: Announcement) -> None:
    """A vector that was sealed is for one announcement.

    Raises:
        PolicyError: rule ``replay``: this is another.
    """
    asked_for = members_hash(announcement)
    if not isinstance(sealed.reply, MaskedReply) or sealed.reply.members_hash != asked_for:
        raise PolicyError(Rule.REPLAY, "this attempt was answered for another announcement")


def fewest_members(plan: Plan, policy: Policy) -> int:
    """Of a sum that this site adds to: the policy's, and the plan's, two honest ones among them."""
    return max(policy.min_members, plan.aggregation.min_sites)


def share_of(plan: Plan, policy: Policy, noise_multiplier: float, *, num_members: int) -> float:
    """The noise that this site adds to a sum of so many members, over max_grad_norm."""
    return own_noise_multiplier(
        noise_multiplier,
        num_members=num_members,
        colluding_sites=plan.privacy.colluding_sites or 0,
        floor=policy.min_own_noise_multiplier,
    )


def least_share(plan: Plan, policy: Policy, mechanism: Mechanism, roster: Roster) -> float:
    """The smallest that a sum may ask for: with all of the roster as members."""
    return share_of(plan, policy, mechanism.noise_multiplier, num_members=len(roster.sites))


def alone_limit(policy: Policy, share: float | None) -> AloneLimit | None:
    """What may be spent if all others work together; None where the policy names no limit.

    It counts every step, so every step is held to it, also one with all of its noise from here
    (``share`` None).
    """
    if policy.max_epsilon_alone is None:
        assert share is None  # allowed_trust needs the limit
        return None
    return AloneLimit(own_noise_multiplier=share, max_epsilon=policy.max_epsilon_alone)
