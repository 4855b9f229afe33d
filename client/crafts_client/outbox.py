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
from typing import TYPE_CHECKING, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError

from crafts_client.errors import OutboxError
from crafts_core.durable import append_line, write_file
from crafts_core.exchange import MaskedReply, RoundReply, RoundRequest
from crafts_privacy.ledger import Reservation, Share

if TYPE_CHECKING:
    from torch import Tensor

    from crafts_core.state import State

_SEAL = "seal"
_RECORDS = "releases.jsonl"

REFUSED_RELEASE = hashlib.sha256(b"refused: nothing was released").hexdigest()
"""Committed where a trained update must not leave. Its cost stays: the refusal itself tells
something about the update."""


class Payment(NamedTuple):
    """The ledger's reserving entry that paid for a release."""

    reservation: int
    entry_hash: str


class _Seal(BaseModel):
    """What a sealed file says about itself."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    reservation: int = Field(ge=1)
    entry_hash: str
    request: RoundRequest
    reply: RoundReply | MaskedReply
    noise: str
    """Where the noise of privacy came from."""
    share: Share | None = None
    """Of a masked vector."""


class ReleaseRecord(BaseModel):
    """What stays known of a release when its file is gone."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    hash: str
    """SHA-256 of the sealed file, as in the ledger."""
    reservation: int = Field(ge=1)
    entry_hash: str
    num_bytes: int
    """Of the tensors' numbers."""
    tensors: tuple[str, ...]
    noise: str
    """Where the noise of privacy came from."""
    share: Share | None = None
    """Of a masked vector: this site's part in the sum's noise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """One reply, sealed."""

    payment: Payment
    reply: RoundReply | MaskedReply
    delta: "State"
    """What leaves: an update, or one masked vector, whose words are kept as int32."""
    noise: str
    share: Share | None
    hash: str
    """SHA-256 of the sealed file: what the ledger commits."""


class Outbox:
    """A folder of sealed releases, one file per request."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def seal(
        self,
        request: RoundRequest,
        reply: RoundReply | MaskedReply,
        delta: "Mapping[str, Tensor]",
        reservation: Reservation,
        *,
        noise: str,
        share: Share | None = None,
    ) -> Release:
        """Write a release durably. Nothing has left yet, and nothing may before the commit."""
        from safetensors.torch import save  # torch takes seconds; to look at payments needs none

        payment = Payment(reservation.sequence, reservation.entry_hash)
        seal = _Seal(**payment._asdict(), request=request, reply=reply, noise=noise, share=share)
        tensors = {name: tensor.contiguous() for name, tensor in delta.items()}
        data = save(tensors, metadata={_SEAL: seal.model_dump_json(exclude_none=True)})
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_file(self._path(request), data, mode=0o600)
        digest = hashlib.sha256(data).hexdigest()
        release = Release(
            payment=payment, reply=reply, delta=tensors, hash=digest, noise=noise, share=share
        )
        self._remember(release)
        return release

    def remember(self, release: Release) -> None:
        """Make sure of the record of a release that was found: a crash may have come before it."""
        if release.hash not in self.records():
            self._remember(release)

    def remember_all(self) -> None:
        """Make sure of a record of every sealed file: a crash or a full disk may have come before.

        Raises:
            OutboxError: a sealed file is not what was sealed.
        """
        known = self._recorded_payments()
        for path in self._folder.glob("*.safetensors"):
            seal = _read_seal(path)
            if Payment(seal.reservation, seal.entry_hash) not in known:
                self._remember(_read_release(path, seal))

    def _remember(self, release: Release) -> None:
        record = ReleaseRecord(
            **release.payment._asdict(),
            hash=release.hash,
            num_bytes=sum(tensor.nbytes for tensor in release.delta.values()),
            tensors=tuple(sorted(release.delta)),
            noise=release.noise,
            share=release.share,
        )
        line = record.model_dump_json(exclude_none=True)
        append_line(self._folder / _RECORDS, line, mode=0o600)

    def payments(self) -> set[Payment]:
        """What paid for everything that was ever sealed here, as far as is still known.

        Raises:
            OutboxError: a sealed file is not what was sealed.
        """
        known = self._recorded_payments()
        for path in self._folder.glob("*.safetensors"):
            with suppress(FileNotFoundError):  # dropped meanwhile
                seal = _read_seal(path)
                known.add(Payment(seal.reservation, seal.entry_hash))
        return known

    def _recorded_payments(self) -> set[Payment]:
        return {Payment(each.reservation, each.entry_hash) for each in self.records().values()}

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
        if not path.exists():
            return None
        seal = _read_seal(path)
        if seal.request != request:
            raise OutboxError(f"{path} answers another request; it was moved or altered")
        return _read_release(path, seal)

    def drop_before(self, run_id: str, round: int) -> None:
        """Forget releases of earlier rounds: the coordinator has moved on."""
        for path in self._folder.glob(f"{run_id}.*.safetensors"):
            if int(path.name.split(".")[1]) < round:
                path.unlink(missing_ok=True)

    def _path(self, request: RoundRequest) -> Path:
        """A run's id has no dot and no slash, so it cannot lead elsewhere."""
        name = f"{request.run_id}.{request.round:05d}.{request.hash[:32]}.safetensors"
        return self._folder / name


def _read_seal(path: Path) -> _Seal:
    """Of a sealed file, without reading its numbers."""
    try:
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        return _Seal.model_validate_json(header["__metadata__"][_SEAL])
    except (ValueError, KeyError, TypeError, ValidationError, OverflowError) as error:
        raise OutboxError(f"{path} is not a sealed release; it was altered") from error


def _read_release(path: Path, seal: _Seal) -> Release:
    """All of a sealed file."""
    from safetensors.torch import load

    data = path.read_bytes()
    try:
        delta = load(data)
    except SafetensorError as error:
        raise OutboxError(f"{path} is not a sealed release; it was altered") from error
    return Release(
        payment=Payment(seal.reservation, seal.entry_hash),
        reply=seal.reply,
        delta=delta,
        hash=hashlib.sha256(data).hexdigest(),
        noise=seal.noise,
        share=seal.share,
    )
