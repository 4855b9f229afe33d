"""What one round says in each direction, without saying how it travels.

Arrays are named float tensors whose names and shapes follow from the plan; everything else is one
of the two closed records below. Both sides check what they get before they use it.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from crafts_core.errors import CraftsError
from crafts_core.plan import Factor, describe_first_error

Scalars = dict[str, str | int | float | bool]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class ExchangeError(CraftsError):
    """A peer sent something that is not what the plan says it should be."""


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

    @property
    def hash(self) -> str:
        """SHA-256 of every word of it."""
        canonical = json.dumps(self.to_scalars(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


class RoundReply(_Record):
    """Site to coordinator: the declared mechanism of the delta that comes along.

    Nothing here is computed from patients: the norm is a function of the released delta, the rest
    is configuration.
    """

    site: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]
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


def schema_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over sorted names and shapes."""
    schema = {name: list(tensors[name].shape) for name in sorted(tensors)}
    return hashlib.sha256(json.dumps(schema, separators=(",", ":")).encode()).hexdigest()


def state_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over sorted names, shapes and float32 values."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{name}{list(tensor.shape)}".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def global_norm(tensors: Mapping[str, Tensor]) -> float:
    """L2 norm over all tensors together, in float64."""
    squares = [float(tensor.detach().double().square().sum()) for tensor in tensors.values()]
    return float(sum(squares) ** 0.5)


def check_tensors(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
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
