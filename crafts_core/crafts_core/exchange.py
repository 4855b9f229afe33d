"""What one round says in each direction, without saying how it travels.

Arrays are named float tensors whose names and shapes follow from the plan; everything else is one
of the two closed records below. Both sides check what they get before they use it.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)

from crafts_core.errors import CraftsError
from crafts_core.fields import Name, Sha256, describe_first_error
from crafts_core.plan_sections import Factor

if TYPE_CHECKING:
    from torch import Tensor

MAX_ANNOUNCEMENT_CHARS = 512 * 1024
"""More than a thousand members need."""
Scalars = dict[str, str | int | float | bool]

TOLD_OUT = "the site has told this release as often as it may"
"""A site's refusal of a release: its coordinator goes on with public data then."""


class ExchangeError(CraftsError):
    """A peer sent something that is not what the plan says it should be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SignedPlan:
    """A plan as it travels: exact bytes, and a signature of them (base64, Ed25519) to check."""

    json: str
    signature: str
    public_key: str


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def to_scalars(self) -> Scalars:
        """Flat name-to-scalar mapping, as message records carry it."""
        return self.model_dump(mode="json")

    @classmethod
    def from_scalars(cls, scalars: Mapping[str, object]) -> Self:
        try:
            return cls.model_validate(dict(scalars))
        except ValidationError as error:
            raise ExchangeError(f"{cls.__name__}: {describe_first_error(error)}") from error


class RoundRequest(_Record):
    """Coordinator to site: train this round from this checkpoint."""

    run_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    plan_hash: Sha256
    round: Annotated[int, Field(ge=1)]
    stage_index: Annotated[int, Field(ge=0)]
    factor: Factor
    checkpoint_hash: Sha256
    """Identity of the global adapter that comes along (``state_hash``)."""
    stage_start_hash: Sha256
    """Identity of the adapter that the stage began with (theta1 of stage alignment)."""
    attempt: Annotated[int, Field(ge=1, le=1_000_000)] = 1
    """At the round's sum. Everything that a site knows of an earlier attempt is void."""

    @model_serializer(mode="wrap")
    def _first_attempts_go_unsaid(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Rounds without sums have the bytes and hash that they always had."""
        values: dict[str, Any] = dump(self)
        if self.attempt == 1:
            values.pop("attempt", None)
        return values

    @property
    def hash(self) -> str:
        """SHA-256 of every word of it."""
        return hashlib.sha256(canonical_json(self.to_scalars()).encode()).hexdigest()


class RoundReply(_Record):
    """Site to coordinator: the declared mechanism of the delta that comes along.

    Nothing here is computed from patients: the norm is a function of the released delta, the rest
    is configuration.
    """

    site: Name
    run_id: str
    plan_hash: Sha256
    round: Annotated[int, Field(ge=1)]
    checkpoint_hash: Sha256
    schema_hash: Sha256
    noise_multiplier: Annotated[float, Field(ge=0)]
    max_grad_norm: Annotated[float, Field(gt=0)]
    steps: Annotated[int, Field(ge=1)]
    sample_rate: Annotated[float, Field(gt=0, le=1)]
    declared_patients: Annotated[int, Field(ge=1)]
    """The site's public, rounded size; sample_rate times it is the fixed divisor."""
    update_norm: Annotated[float, Field(ge=0)]


class ReadyReply(_Record):
    """Site to coordinator, and on to every member: this site holds a sum and would take part.

    Signed with the key that the roster names for the site (``secure_aggregation.members``).
    """

    site: Name
    request_hash: Sha256
    declared_patients: Annotated[int, Field(ge=1, le=2**31 - 1)]
    """The site's public, rounded size: what it adds to the sum's divisor."""
    noise_multiplier: Annotated[float, Field(gt=0)]
    """Standard deviation of the whole sum's noise, over max_grad_norm, as the site calibrated it
    from the plan."""
    key: Annotated[str, Field(pattern=r"^[A-Za-z0-9+/]{43}=$")]
    """X25519, base64, fresh for this request and good for one announcement."""
    signature: Annotated[str, Field(pattern=r"^[A-Za-z0-9+/]{86}==$")]


class Announcement(_Record):
    """Coordinator to every member of a sum: these are its members, and nobody else."""

    request_hash: Sha256
    members: Annotated[tuple[ReadyReply, ...], Field(min_length=2, max_length=1000)]
    """By name."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read what a coordinator sent; who the members are is not believed yet.

        Raises:
            ExchangeError: it is no announcement.
        """
        if len(text) > MAX_ANNOUNCEMENT_CHARS:
            raise ExchangeError(f"an announcement of {len(text)} characters is too long")
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise ExchangeError(f"announcement: {describe_first_error(error)}") from error

    def to_json(self) -> str:
        """Canonical JSON: what travels, and what every mask depends on."""
        return canonical_json(self.model_dump(mode="json"))


class MaskedReply(_Record):
    """Site to coordinator: whose sum the masked vector that comes along belongs to."""

    site: Name
    run_id: str
    plan_hash: Sha256
    round: Annotated[int, Field(ge=1)]
    request_hash: Sha256
    members_hash: Sha256
    schema_hash: Sha256
    own_noise_multiplier: Annotated[float, Field(gt=0)]
    """Standard deviation of the share of noise in the vector, over max_grad_norm."""


def canonical_json(values: object) -> str:
    """One text for one value: what is hashed and signed."""
    return json.dumps(values, sort_keys=True, separators=(",", ":"))


def schema_hash(tensors: "Mapping[str, Tensor]") -> str:
    """SHA-256 over sorted names and shapes."""
    schema = {name: list(tensors[name].shape) for name in sorted(tensors)}
    return hashlib.sha256(json.dumps(schema, separators=(",", ":")).encode()).hexdigest()


def state_hash(tensors: "Mapping[str, Tensor]") -> str:
    """SHA-256 over sorted names, shapes and float32 values."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().float().contiguous()
        digest.update(f"{name}{list(tensor.shape)}".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def global_norm(tensors: "Mapping[str, Tensor]") -> float:
    """L2 norm over all tensors together, in float64."""
    squares = [float(tensor.detach().double().square().sum()) for tensor in tensors.values()]
    return float(sum(squares) ** 0.5)


def inner_product(tensors: "Mapping[str, Tensor]", others: "Mapping[str, Tensor]") -> float:
    """Of all numbers of ``tensors`` with those of the same names in ``others``, in float64."""
    parts = [
        float((tensor.double() * others[name].double()).sum()) for name, tensor in tensors.items()
    ]
    return float(sum(parts))


def check_tensors(tensors: "Mapping[str, Tensor]", expected: "Mapping[str, Tensor]") -> None:
    """Refuse tensors whose names or shapes differ from ``expected``, or that are not finite.

    Raises:
        ExchangeError: names the first tensor that is missing, unknown, misshapen or not finite.
    """
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in tensors:
            raise ExchangeError(f"tensor {name} is missing")
        if name not in expected:
            raise ExchangeError(f"tensor {name} is not part of the adapter")
        if tensors[name].shape != expected[name].shape:
            raise ExchangeError(
                f"tensor {name}: expected shape {list(expected[name].shape)}, "
                f"got {list(tensors[name].shape)}"
            )
        if not tensors[name].isfinite().all():
            raise ExchangeError(f"tensor {name} holds NaN or infinity")
