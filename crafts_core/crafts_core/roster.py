"""The roster of a plan: which sites take part, and with how many patients each counts.

Both sides agreed on every number: the site said it, the coordinator approved it. The coordinator
signs the list, so every site can see with what weight the others come in; no update with another
number is used.

For sums of distributed trust it names each site's identity key as well. Who is a hospital is then
decided by the hospitals: each approves the roster once all have read its phrase to each other. The
coordinator's signature is not enough, as it could enrol sites that do not exist.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from crafts_core.errors import CraftsError
from crafts_core.fields import Name, Sha256, describe_first_error

MAX_PATIENTS = 2**31 - 1
"""What a registry's column holds."""


def identity_words(site: str) -> bytes:
    """What a key signs to show that it is the site's own; no ledger's head or roster reads so."""
    return f"crafts-federated: this key signs for {site}".encode()


class RosterError(CraftsError):
    """A roster that is none."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class RosterSite(_Record):
    """One site of a roster."""

    site: Name
    declared_patients: Annotated[int, Field(ge=1, le=MAX_PATIENTS)]
    identity: Annotated[str, Field(pattern=r"^[A-Za-z0-9+/]{43}=$")] | None = None
    """Ed25519, base64: the key that signs for the site in sums."""

    @model_serializer(mode="wrap")
    def _without_what_is_not_named(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A roster without identities has the bytes and hash that it always had."""
        values: dict[str, Any] = dump(self)
        if self.identity is None:
            values.pop("identity", None)
        return values


class Roster(_Record):
    """``roster.json``, of one plan."""

    format: Literal["crafts-roster-v1"] = "crafts-roster-v1"
    plan_hash: Sha256
    sites: tuple[RosterSite, ...]
    """By name."""

    @model_validator(mode="after")
    def _each_site_once_and_in_order(self) -> Self:
        names = [entry.site for entry in self.sites]
        if names != sorted(set(names)):
            raise ValueError("the sites must be sorted by name, each once")
        identities = [entry.identity for entry in self.sites]
        if not (set(identities) <= {None} or len(set(identities) - {None}) == len(identities)):
            raise ValueError("every site must name an identity of its own, or none any")
        return self

    @classmethod
    def of(
        cls,
        plan_hash: str,
        patients: Mapping[str, int],
        identities: Mapping[str, str] | None = None,
    ) -> Self:
        """The roster of a plan from what was agreed, and for sums from who signs for each site.

        Raises:
            RosterError: a site lacks an identity, or two share one.
        """
        keys = {} if identities is None else identities
        missing = sorted(patients.keys() - keys.keys())
        if identities is not None and missing:
            raise RosterError(
                f"roster: no identity key of {', '.join(missing)}; ask there for crafts-client "
                "identity"
            )
        try:
            sites = tuple(
                RosterSite(site=name, declared_patients=patients[name], identity=keys.get(name))
                for name in sorted(patients)
            )
            return cls(plan_hash=plan_hash, sites=sites)
        except ValidationError as error:
            raise RosterError(f"roster: {describe_first_error(error)}") from error

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read what a coordinator sent.

        Raises:
            RosterError: it is no roster.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise RosterError(f"roster: {describe_first_error(error)}") from error

    def to_json(self) -> str:
        """Canonical JSON: what is hashed and signed."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))

    @property
    def hash(self) -> str:
        """SHA-256 of the canonical JSON."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @property
    def phrase(self) -> str:
        """The first 200 bits of the hash as twelve groups of five digits, to be read aloud.

        Whoever hears the same phrase has the same names, numbers and keys.
        """
        number = int(self.hash[:50], 16) % 10**60
        digits = f"{number:060d}"
        return " ".join(digits[start : start + 5] for start in range(0, 60, 5))

    @property
    def identities(self) -> dict[str, str]:
        """Site to the key that signs for it; empty where the roster names none."""
        return {entry.site: entry.identity for entry in self.sites if entry.identity is not None}

    @property
    def patients(self) -> dict[str, int]:
        """Site to its agreed number."""
        return {entry.site: entry.declared_patients for entry in self.sites}
