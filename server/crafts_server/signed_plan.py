"""A plan as it is handed out: who signed it, and what exactly."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class SignedPlan:
    """A plan as sites get it: its canonical JSON and who signed it (base64, Ed25519)."""

    json: str
    signature: str
    public_key: str
