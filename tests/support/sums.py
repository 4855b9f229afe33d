"""Sites of a sum: keys, a roster, words that they are ready."""

import base64
from collections.abc import Mapping, Sequence

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from crafts_core.exchange import Announcement, ReadyReply
from crafts_core.roster import Roster
from crafts_privacy import signing
from crafts_privacy.secure_aggregation.masking import MaskKey
from crafts_privacy.secure_aggregation.members import Members, announce, sign_ready, verify_members

PLAN, REQUEST, NOISE = "a" * 64, "1" * 64, 3.25


class SumSite:
    """One site's keys and its word."""

    def __init__(
        self,
        name: str,
        number: int,
        *,
        declared_patients: int = 50,
        request: str = REQUEST,
        noise_multiplier: float = NOISE,
    ) -> None:
        """Keys are fixed by ``number``."""
        self.name, self.declared_patients = name, declared_patients
        self.noise_multiplier = noise_multiplier
        self.identity = Ed25519PrivateKey.from_private_bytes(bytes([0x40 + number]) * 32)
        self.mask_key = MaskKey(X25519PrivateKey.from_private_bytes(bytes([number]) * 32))
        self.ready = self.word(request)

    def word(self, request: str = REQUEST, key: str | None = None) -> ReadyReply:
        """Signed by this site, for another request or with another key if wanted."""
        return sign_ready(
            self.identity,
            site=self.name,
            request_hash=request,
            declared_patients=self.declared_patients,
            noise_multiplier=self.noise_multiplier,
            key=key or self.mask_key.public_key,
        )


def sum_sites(num_sites: int, *, request: str = REQUEST) -> dict[str, SumSite]:
    """By name; each declares another number of patients."""
    names = [f"site-{number:02d}" for number in range(1, num_sites + 1)]
    return {
        name: SumSite(name, number, declared_patients=20 + number, request=request)
        for number, name in enumerate(names, start=1)
    }


def roster_of(sites: Mapping[str, SumSite]) -> Roster:
    return Roster.of(
        PLAN,
        {name: site.declared_patients for name, site in sites.items()},
        {name: signing.public_key_of(site.identity) for name, site in sites.items()},
    )


def announcement_of(sites: Mapping[str, SumSite], names: Sequence[str]) -> Announcement:
    return announce([sites[name].ready for name in names])


def members_of(
    sites: Mapping[str, SumSite], names: Sequence[str], own: str, *, min_members: int = 2
) -> Members:
    """As ``own`` verifies them."""
    return verify_members(
        announcement_of(sites, names), roster_of(sites), sites[own].ready, min_members=min_members
    )


def flipped(text: str, place: int) -> str:
    """Base64 with one bit of one byte changed."""
    raw = bytearray(base64.b64decode(text))
    raw[place] ^= 1
    return base64.b64encode(raw).decode()
