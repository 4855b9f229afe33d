"""What may leave, on disk before it leaves. Asked again, the site sends the same bytes again.

A release is sealed first, then committed to the ledger by its hash, then sent. So a crash or a
lost reply costs no privacy twice: the same request gets the same sealed file, and a file that the
ledger did not commit, or that changed since, is never sent.
"""

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from crafts_client.errors import OutboxError
from crafts_core.adapters import State
from crafts_core.durable import append_line, write_file
from crafts_core.exchange import RoundReply, RoundRequest

_SEAL = "seal"
_RECORDS = "releases.jsonl"

REFUSED_RELEASE = hashlib.sha256(b"refused: nothing was released").hexdigest()
"""Committed where a trained update must not leave. Its cost stays: the refusal itself tells
something about the update."""


class _Seal(BaseModel):
    """What a sealed file says about itself."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    reservation: int = Field(ge=1)
    request: RoundRequest
    reply: RoundReply


class ReleaseRecord(BaseModel):
    """What stays known of a release when its file is gone."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    hash: str
    """SHA-256 of the sealed file, as in the ledger."""
    num_bytes: int
    """Of the tensors' numbers."""
    tensors: tuple[str, ...]
    noise: str = "not recorded"
    """Where the noise of privacy came from."""


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
        *,
        noise: str = "not recorded",
    ) -> Release:
        """Write a release durably. Nothing has left yet, and nothing may before the commit."""
        seal = _Seal(reservation=reservation, request=request, reply=reply)
        tensors = {name: tensor.contiguous() for name, tensor in delta.items()}
        data = save(tensors, metadata={_SEAL: seal.model_dump_json()})
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_file(self._path(request), data, mode=0o600)
        digest = hashlib.sha256(data).hexdigest()
        record = ReleaseRecord(
            hash=digest,
            num_bytes=sum(tensor.nbytes for tensor in tensors.values()),
            tensors=tuple(sorted(tensors)),
            noise=noise,
        )
        append_line(self._folder / _RECORDS, record.model_dump_json(), mode=0o600)
        return Release(reservation=reservation, reply=reply, delta=dict(delta), hash=digest)

    def records(self) -> dict[str, ReleaseRecord]:
        """Everything ever sealed here, by hash; whether it left is in the ledger."""
        try:
            lines = (self._folder / _RECORDS).read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return {}
        found: dict[str, ReleaseRecord] = {}
        for line in lines:
            with suppress(ValidationError):  # a line that a crash tore was never committed
                record = ReleaseRecord.model_validate_json(line)
                found[record.hash] = record
        return found

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
