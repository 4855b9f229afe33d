"""Who the members of a sum are: a site's signed word that it is ready, and one verifier of all.

A coordinator collects the words and announces them. Each member checks the announcement against the
roster that people at its hospital approved, and against the word that it gave itself; then
``members_hash`` goes into every mask. Two members who were shown different announcements, or
answered different requests, have masks that do not cancel: the coordinator gets noise.
"""

import base64
import binascii
import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from crafts_core.exchange import Announcement, ReadyReply, canonical_json
from crafts_core.roster import Roster
from crafts_privacy import signing
from crafts_privacy.errors import PrivacyError
from crafts_privacy.secure_aggregation.shares import NOISE_TOLERANCE, is_same_noise

_READY, _MEMBERS = b"crafts-ready-v2", b"crafts-members-v2"


class MembersError(PrivacyError):
    """An announcement that a site must not add its vector to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Members:
    """The members of one sum, verified."""

    hash: str
    """SHA-256 of the announcement: request, names, sizes, keys and signatures."""
    keys: dict[str, str]
    """Site to the X25519 key that it made for this request, by name."""
    declared_patients: int
    """Of all of them together: times the sample rate it is the sum's divisor."""
    noise_multiplier: float
    """Of the whole sum: the largest that a member calibrated, so that it is enough for each."""

    def __len__(self) -> int:
        return len(self.keys)


def sign_ready(
    identity: Ed25519PrivateKey,
    *,
    site: str,
    request_hash: str,
    declared_patients: int,
    noise_multiplier: float,
    key: str,
) -> ReadyReply:
    """A site's word that it holds a sum for exactly this request."""
    unsigned = ReadyReply(
        site=site,
        request_hash=request_hash,
        declared_patients=declared_patients,
        noise_multiplier=noise_multiplier,
        key=key,
        signature=f"{'A' * 86}==",
    )
    signature = signing.sign(identity, _payload(unsigned))
    return unsigned.model_copy(update={"signature": signature})


def verify_ready(
    ready: ReadyReply,
    roster: Roster,
    *,
    noise_multiplier: float,
    tolerance: float = NOISE_TOLERANCE,
) -> None:
    """Accept only the word of a site of the roster, with the numbers that were agreed.

    Args:
        ready: The word.
        roster: Of the plan.
        noise_multiplier: As whoever asks has calibrated it.
        tolerance: How far the site's own may be from that.

    Raises:
        MembersError: it is no site's of the roster, another key signed it, it would add another
            plan's noise, or no mask can be made with its key.
    """
    identity = roster.identities.get(ready.site)
    if identity is None:
        raise MembersError(f"{ready.site} is not in the approved roster")
    if ready.declared_patients != roster.patients[ready.site]:
        raise MembersError(
            f"{ready.site} counts as {roster.patients[ready.site]} patients in the roster, not as "
            f"{ready.declared_patients}"
        )
    try:
        signing.verify(identity, _payload(ready), ready.signature)
    except signing.SignatureError as error:
        raise MembersError(f"{ready.site} did not sign what stands for it: {error}") from error
    if not is_same_noise(ready.noise_multiplier, noise_multiplier, tolerance):
        raise MembersError(
            f"{ready.site} calibrated the plan's noise to {ready.noise_multiplier:g}, here it is "
            f"{noise_multiplier:g}; compare the versions of the software"
        )
    try:
        X25519PrivateKey.generate().exchange(
            X25519PublicKey.from_public_bytes(base64.b64decode(ready.key, validate=True))
        )
    except (ValueError, binascii.Error) as error:  # of low order: everybody would know the mask
        raise MembersError(f"{ready.site} has no X25519 key") from error


def announce(members: Sequence[ReadyReply]) -> Announcement:
    """The announcement of these members.

    Raises:
        ValueError: there are none, or they answered different requests.
    """
    (request_hash,) = {ready.request_hash for ready in members}
    return Announcement(
        request_hash=request_hash, members=tuple(sorted(members, key=lambda ready: ready.site))
    )


def members_hash(announcement: Announcement) -> str:
    """SHA-256 of every word of an announcement."""
    members = [ready.to_scalars() for ready in announcement.members]
    text = canonical_json([announcement.request_hash, members])
    return hashlib.sha256(_MEMBERS + text.encode()).hexdigest()


def verify_members(
    announcement: Announcement, roster: Roster, own: ReadyReply, *, min_members: int
) -> Members:
    """The one way from an announcement to members that masks may be made for.

    Args:
        announcement: As it came.
        roster: The one that was approved at this site.
        own: What this site answered to the request, word for word.
        min_members: Fewer are refused.

    Raises:
        MembersError: what is wrong with it; no vector may leave.
    """
    if announcement.request_hash != own.request_hash:
        raise MembersError("the announcement is of another request than the site is ready for")
    names = [ready.site for ready in announcement.members]
    if names != sorted(set(names)):
        raise MembersError("the announcement's members must be sorted by name, each once")
    if len(names) < min_members:
        raise MembersError(f"{len(names)} members, this site wants {min_members} or more")
    if not any(_is_same(ready, own) for ready in announcement.members):
        raise MembersError("the announcement lacks this site's own word, or has another")
    for ready in announcement.members:
        if ready.request_hash != announcement.request_hash:
            raise MembersError(f"{ready.site} is ready for another request")
        verify_ready(ready, roster, noise_multiplier=own.noise_multiplier)
    keys = {ready.site: ready.key for ready in announcement.members}
    if len(set(keys.values())) != len(keys):
        raise MembersError("two members have one key")
    return Members(
        hash=members_hash(announcement),
        keys=keys,
        declared_patients=sum(ready.declared_patients for ready in announcement.members),
        noise_multiplier=max(ready.noise_multiplier for ready in announcement.members),
    )


def _is_same(one: ReadyReply, other: ReadyReply) -> bool:
    """Word for word, the signature among them."""
    left, right = (canonical_json(ready.to_scalars()).encode() for ready in (one, other))
    return hmac.compare_digest(left, right)


def _payload(ready: ReadyReply) -> bytes:
    values = ready.to_scalars()
    del values["signature"]
    return _READY + canonical_json(values).encode()
