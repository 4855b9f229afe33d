"""Signed checkpoints of one run: a chain of directories, one per committed round.

``round-0007/`` holds ``adapter.safetensors``, ``momentum.safetensors`` (what the aggregation rule
carries from round to round), ``receipt.json``, ``manifest.json`` (SHA-256 of each of them and of
the parent's manifest) and ``manifest.sig``. The rename that puts the directory in place commits the
round: adapter, server state and receipt together or not at all. Round 0 is where the study starts
and has no receipt.
"""

import hashlib
import hmac
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError

from crafts_core.durable import write_directory
from crafts_core.exchange import state_hash
from crafts_core.fields import Sha256, describe_first_error
from crafts_privacy.signing import SignatureError, public_key_of, sign, verify
from crafts_server.errors import CheckpointError, StorageError
from crafts_server.receipts import RoundReceipt

if TYPE_CHECKING:
    from torch import Tensor

    from crafts_core.state import State

_ADAPTER, _RECEIPT = "adapter.safetensors", "receipt.json"
_SERVER_STATE = "momentum.safetensors"  # named when momentum was all that there was
_MANIFEST, _SIGNATURE = "manifest.json", "manifest.sig"
_NAME = re.compile(r"round-(\d{4,})")
RESTORE = "restore the checkpoints of this run from a copy"


class CheckpointManifest(BaseModel):
    """What a checkpoint is, and what it follows."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["crafts-checkpoint"] = "crafts-checkpoint"
    format_version: Literal[1] = 1
    run_id: str
    plan_hash: Sha256
    round: Annotated[int, Field(ge=0)]
    parent: Sha256 | None
    """SHA-256 of the manifest before; None at round 0."""
    state_hash: Sha256
    files: dict[str, Sha256]


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """One verified link of the chain. Tensors are read, and verified again, on demand."""

    path: Path
    manifest: CheckpointManifest
    hash: str
    """SHA-256 of the manifest's bytes."""

    @property
    def round(self) -> int:
        return self.manifest.round

    def state(self) -> "State":
        """The global adapter after this round (float32)."""
        state = self._tensors(_ADAPTER)
        if state_hash(state) != self.manifest.state_hash:
            raise CheckpointError(f"{self.path}: the adapter is not the signed one; {RESTORE}")
        return state

    def server_state(self) -> "State":
        """What the aggregation rule carries on, as it was; empty where it keeps nothing."""
        return self._tensors(_SERVER_STATE)

    def receipt(self) -> RoundReceipt:
        """What happened in this round.

        Raises:
            CheckpointError: this is round 0, or the receipt was altered.
        """
        if _RECEIPT not in self.manifest.files:
            raise CheckpointError(f"{self.path}: round {self.round} has no receipt")
        try:
            return _parsed_receipt(self._read(_RECEIPT))
        except ValidationError as error:
            raise CheckpointError(f"{self.path}: {describe_first_error(error)}") from error

    def check_files(self) -> None:
        """Compare every file with the manifest.

        Raises:
            CheckpointError: names the first that differs.
        """
        for name in self.manifest.files:
            self._read(name)

    def _tensors(self, name: str) -> "State":
        from safetensors.torch import load  # torch takes seconds; a chain is verified without

        try:
            return dict(load(self._read(name)))
        except SafetensorError as error:
            raise CheckpointError(f"{self.path / name}: {error}; {RESTORE}") from error

    def _read(self, name: str) -> bytes:
        content = _read(self.path / name)
        if not hmac.compare_digest(_sha256(content), self.manifest.files[name]):
            raise CheckpointError(f"{self.path / name} was altered; {RESTORE}")
        return content


class CheckpointStore:
    """The checkpoints of one run, in one directory, signed with one key."""

    def __init__(self, directory: Path, key: Ed25519PrivateKey) -> None:
        self._directory = directory
        self._key = key

    def write(
        self,
        *,
        run_id: str,
        plan_hash: str,
        parent: Checkpoint | None,
        state: "Mapping[str, Tensor]",
        server_state: "Mapping[str, Tensor]",
        receipt: RoundReceipt | None,
    ) -> Checkpoint:
        """Commit the round after ``parent`` (round 0 without one). Durable when it returns.

        Raises:
            CheckpointError: the round is committed already.
            StorageError: the disk refuses.
        """
        adapter = {name: tensor.float() for name, tensor in state.items()}
        files = {_ADAPTER: _bytes_of(adapter), _SERVER_STATE: _bytes_of(server_state)}
        if receipt is not None:
            files[_RECEIPT] = (receipt.model_dump_json(indent=1) + "\n").encode()
        manifest = CheckpointManifest(
            run_id=run_id,
            plan_hash=plan_hash,
            round=0 if parent is None else parent.round + 1,
            parent=None if parent is None else parent.hash,
            state_hash=state_hash(state),
            files={name: _sha256(content) for name, content in files.items()},
        )
        signed = (manifest.model_dump_json(indent=1) + "\n").encode()
        signature = sign(self._key, signed).encode()
        path = self._directory / f"round-{manifest.round:04d}"
        try:
            write_directory(path, {**files, _MANIFEST: signed, _SIGNATURE: signature})
        except FileExistsError as error:
            raise CheckpointError(f"cannot write {path}: it is committed already") from error
        except OSError as error:
            raise StorageError(
                f"cannot write checkpoint {path}: {error.strerror or error}; "
                "nothing is lost, make room and run the same command again"
            ) from error
        return Checkpoint(path=path, manifest=manifest, hash=_sha256(signed))

    def chain(self) -> list[Checkpoint]:
        """All checkpoints from round 0, each verified against its signature and its parent.

        Raises:
            CheckpointError: one is missing, altered, signed by another key, or out of place.
        """
        chain: list[Checkpoint] = []
        for number, path in enumerate(self._paths()):
            checkpoint = self._load(path)
            parent = chain[-1] if chain else None
            if checkpoint.round != number or path.name != f"round-{number:04d}":
                raise CheckpointError(
                    f"expected the checkpoint of round {number}, found {path}; {RESTORE}"
                )
            if checkpoint.manifest.parent != (parent.hash if parent else None):
                raise CheckpointError(f"{path} does not follow the checkpoint before it; {RESTORE}")
            chain.append(checkpoint)
        return chain

    def _paths(self) -> list[Path]:
        if not self._directory.is_dir():
            return []
        found = [path for path in self._directory.iterdir() if _NAME.fullmatch(path.name)]
        return sorted(found, key=lambda path: int(path.name.split("-")[1]))

    def _load(self, path: Path) -> Checkpoint:
        signed = _read(path / _MANIFEST)
        try:
            signature = _read(path / _SIGNATURE).decode("ascii")
            manifest = _verified(public_key_of(self._key), signed, signature)
        except (SignatureError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path} is not signed by this coordinator; {RESTORE}") from error
        except ValidationError as error:
            raise CheckpointError(f"{path / _MANIFEST}: {describe_first_error(error)}") from error
        return Checkpoint(path=path, manifest=manifest, hash=_sha256(signed))


# A page reads a run of hundreds of rounds every few seconds. What was checked is kept for the same
# bytes, and files are read and hashed each time.
@lru_cache(maxsize=4096)
def _verified(public_key: str, signed: bytes, signature: str) -> CheckpointManifest:
    verify(public_key, signed, signature)
    return CheckpointManifest.model_validate_json(signed)


@lru_cache(maxsize=4096)
def _parsed_receipt(content: bytes) -> RoundReceipt:
    return RoundReceipt.model_validate_json(content)


def _bytes_of(tensors: "Mapping[str, Tensor]") -> bytes:
    from safetensors.torch import save

    content: bytes = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    return content


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}; {RESTORE}") from error


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
