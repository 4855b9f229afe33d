"""A ledger's head with the site's signature: what others keep, and what nobody can make for it.

The head says how long the ledger is and, by its hash, all that is in it. Whoever holds one can show
later that a ledger is an older copy of itself, or that two copies went different ways.
"""

import json
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Annotated, Self

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import BaseModel, ConfigDict, Field

from crafts_core.fields import Name, Sha256
from crafts_privacy import signing
from crafts_privacy.witness import LedgerHead

_FORMAT = "crafts-ledger-head-1"
_Id = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]


class SignedHead(BaseModel):
    """A ledger's head as a site signed it. Public."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    site: Name
    ledger: _Id
    """Hash of the cohort's name: what the coordinator calls this ledger, too."""
    ledger_id: _Id
    sequence: Annotated[int, Field(ge=0, lt=2**31)]
    hash: Sha256
    signed_at: Annotated[int, Field(ge=0, lt=2**40)]
    """By the site's clock, in seconds since 1970."""
    public_key: Annotated[str, Field(pattern=r"^[A-Za-z0-9+/]{43}=$")]
    signature: Annotated[str, Field(pattern=r"^[A-Za-z0-9+/]{86}==$")]

    @classmethod
    def sign(cls, key: Ed25519PrivateKey, head: LedgerHead, *, site: str, ledger: str) -> Self:
        """Sign a head as it is now."""
        signed_at = int(datetime.now(UTC).timestamp())
        return cls(
            site=site,
            ledger=ledger,
            ledger_id=head.ledger_id,
            sequence=head.sequence,
            hash=head.hash,
            signed_at=signed_at,
            public_key=signing.public_key_of(key),
            signature=signing.sign(key, _payload(head, site, ledger, signed_at)),
        )

    @classmethod
    def of(cls, message: object) -> Self:
        """The same from an object with these fields, such as a message of the registrar.

        Raises:
            ValueError: a field is not what it should be.
        """
        return cls(**{name: getattr(message, name) for name in cls.model_fields})

    def check(self) -> None:
        """Accept only what the holder of ``public_key`` signed; whose key it is, the caller knows.

        Raises:
            SignatureError: somebody else made this, or changed it.
        """
        payload = _payload(self.head, self.site, self.ledger, self.signed_at)
        signing.verify(self.public_key, payload, self.signature)

    @property
    def head(self) -> LedgerHead:
        return LedgerHead(ledger_id=self.ledger_id, sequence=self.sequence, hash=self.hash)

    @property
    def fingerprint(self) -> str:
        """Of the key, for two people to compare."""
        return signing.fingerprint(self.public_key)

    def __str__(self) -> str:
        at = datetime.fromtimestamp(self.signed_at, UTC)
        return f"{self.site}: {self.sequence} entries, signed {at:%Y-%m-%d %H:%M} UTC"


def _payload(head: LedgerHead, site: str, ledger: str, signed_at: int) -> bytes:
    about = {"format": _FORMAT, "site": site, "ledger": ledger, "signed_at": signed_at}
    return json.dumps(asdict(head) | about, sort_keys=True).encode()
