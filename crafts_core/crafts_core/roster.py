"""The roster of a plan: which sites take part, and with how many patients each counts.

Both sides agreed on every number: the site said it, the coordinator approved it. The coordinator
signs the list, so every site can see with what weight the others come in; no update with another
number is used. A roster with the sites' own identity keys would be this one with a field more.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from crafts_core.errors import CraftsError
from crafts_core.plan import describe_first_error

MAX_PATIENTS = 2**31 - 1
"""What a registry's column holds."""


class RosterError(CraftsError):
    """A roster that is none."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class RosterSite(_Record):
    """One site of a roster."""

    site: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]
    declared_patients: Annotated[int, Field(ge=1, le=MAX_PATIENTS)]


class Roster(_Record):
    """``roster.json``, of one plan."""

    format: Literal["crafts-roster-v1"] = "crafts-roster-v1"
    plan_hash: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    sites: tuple[RosterSite, ...]
    """By name."""

    @model_validator(mode="after")
    def _each_site_once_and_in_order(self) -> Self:
        names = [entry.site for entry in self.sites]
        if names != sorted(set(names)):
            raise ValueError("the sites must be sorted by name, each once")
        return self

    @classmethod
    def of(cls, plan_hash: str, patients: Mapping[str, int]) -> Self:
        """The roster of a plan from what was agreed."""
        sites = tuple(
            RosterSite(site=name, declared_patients=patients[name]) for name in sorted(patients)
        )
        return cls(plan_hash=plan_hash, sites=sites)

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
    def patients(self) -> dict[str, int]:
        """Site to its agreed number."""
        return {entry.site: entry.declared_patients for entry in self.sites}
