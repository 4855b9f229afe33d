"""What may leave, on disk before it leaves. Asked again, the site sends the same bytes again.

A release is sealed first, then committed to the ledger by its hash, then sent. So a crash or a
lost reply costs no privacy twice: the same request gets the same sealed file, and a file that the
ledger did not commit, or that changed since, is never sent.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from crafts_client.errors import OutboxError
from crafts_core.adapters import State
from crafts_core.durable import write_file
from crafts_core.exchange import RoundReply, RoundRequest

_SEAL = "seal"


class _Seal(BaseModel):
    """What a sealed file says about itself."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    reservation: int = Field(ge=1)
    request: RoundRequest
    reply: RoundReply


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """One reply, sealed."""

    reservation: int
    """The ledger's entry that pays for it."""
    reply: RoundReply
    delta: State
    hash: str
    """SHA-256 of the sealed file: what the ledger commits."""


class Outbox:
    """A folder of sealed releases, one file per request."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def seal(
        self,
        request: RoundRequest,
        reply: RoundReply,
        delta: Mapping[str, Tensor],
        reservation: int,
    ) -> Release:
        """Write a release durably. Nothing has left yet, and nothing may before the commit."""
        seal = _Seal(reservation=reservation, request=request, reply=reply)
        tensors = {name: tensor.contiguous() for name, tensor in delta.items()}
        data = save(tensors, metadata={_SEAL: seal.model_dump_json()})
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_file(self._path(request), data, mode=0o600)
        return Release(
            reservation=reservation,
            reply=reply,
            delta=dict(delta),
            hash=hashlib.sha256(data).hexdigest(),
        )

    def find(self, request: RoundRequest) -> Release | None:
        """The sealed answer to exactly this request, if there is one.

        Raises:
            OutboxError: there is a file, and it is not what was sealed for this request.
        """
        path = self._path(request)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        try:
            num_header_bytes = int.from_bytes(data[:8], "little")
            header = json.loads(data[8 : 8 + num_header_bytes])
            seal = _Seal.model_validate_json(header["__metadata__"][_SEAL])
            delta = load(data)
        except (ValueError, KeyError, TypeError, ValidationError, SafetensorError) as error:
            raise OutboxError(f"{path} is not a sealed release; it was altered") from error
        if seal.request != request:
            raise OutboxError(f"{path} answers another request; it was moved or altered")
        return Release(
            reservation=seal.reservation,
            reply=seal.reply,
            delta=delta,
            hash=hashlib.sha256(data).hexdigest(),
        )

    def drop_before(self, run_id: str, round: int) -> None:
        """Forget releases of earlier rounds: the coordinator has moved on."""
        for path in self._folder.glob(f"{run_id}.*.safetensors"):
            if int(path.name.split(".")[1]) < round:
                path.unlink(missing_ok=True)

    def _path(self, request: RoundRequest) -> Path:
        """A run's id has no dot and no slash, so it cannot lead elsewhere."""
        canonical = json.dumps(request.to_scalars(), sort_keys=True, separators=(",", ":"))
        identity = hashlib.sha256(canonical.encode()).hexdigest()[:32]
        return self._folder / f"{request.run_id}.{request.round:05d}.{identity}.safetensors"
