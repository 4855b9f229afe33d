"""What the stated adversary saw of this site: every update, and the adapter that it answered.

The outbox forgets a release once the coordinator has moved on. Whoever attacks does not, so an
attack of one's own needs them all: they are kept in the home, the owner's alone, the newest that
fit in a bound. An update left with its noise; nothing more private than that is kept.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from crafts_client.errors import HomeError
from crafts_core.durable import write_file
from crafts_core.exchange import RoundRequest
from crafts_core.plan import Plan
from crafts_core.plan_sections import StageConfig
from crafts_core.state import State

MOST_BYTES = 1 << 30
"""Of all: hundreds of rounds of a small adapter, not one of a large model's full weights."""
_ABOUT, _RECEIVED, _DELTA = "about", "received/", "delta/"


class _About(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    hash: str
    """Of the sealed release, as the ledger commits it."""
    request: RoundRequest
    plan: Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class SeenUpdate:
    """One update that left."""

    request: RoundRequest
    plan: Plan
    received: State
    """The global adapter that it starts from."""
    delta: State

    @property
    def stage(self) -> StageConfig:
        return self.plan.stage[self.request.stage_index]


class SeenUpdates:
    """A folder of them, one file each."""

    def __init__(self, folder: Path, *, most_bytes: int = MOST_BYTES) -> None:
        self._folder, self._most_bytes = folder, most_bytes

    def keep(
        self,
        plan: Plan,
        request: RoundRequest,
        received: Mapping[str, Tensor],
        delta: Mapping[str, Tensor],
        release_hash: str,
    ) -> None:
        """Add one, and drop the oldest beyond the bound; one that is too large alone drops none."""
        both = [*received.values(), *delta.values()]
        if sum(tensor.nbytes for tensor in both) > self._most_bytes:
            return
        about = _About(hash=release_hash, request=request, plan=plan)
        tensors = {_RECEIVED + name: tensor.contiguous() for name, tensor in received.items()}
        tensors |= {_DELTA + name: tensor.contiguous() for name, tensor in delta.items()}
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        data = save(tensors, metadata={_ABOUT: about.model_dump_json()})
        write_file(self._folder / f"{release_hash}.safetensors", data, mode=0o600)
        self._drop()

    def read(self, committed: Collection[str]) -> Iterator[SeenUpdate]:
        """Those that the ledger committed, oldest first.

        Raises:
            HomeError: a file is damaged.
        """
        for path in self._files():
            if path.stem in committed:
                yield _read(path)

    def _files(self) -> list[Path]:
        """Oldest first."""
        files = self._folder.glob("*.safetensors")
        return sorted(files, key=lambda path: (path.stat().st_mtime_ns, path.name))

    def _drop(self) -> None:
        files = self._files()
        total = sum(path.stat().st_size for path in files)
        for path in files:
            if total <= self._most_bytes:
                return
            total -= path.stat().st_size
            path.unlink()


def _read(path: Path) -> SeenUpdate:
    try:
        with safe_open(path, framework="pt") as file:
            about = _About.model_validate_json((file.metadata() or {}).get(_ABOUT, ""))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValidationError) as error:
        raise HomeError(f"{path} is damaged; remove it, and the attack goes without") from error
    return SeenUpdate(
        request=about.request,
        plan=about.plan,
        received=_under(_RECEIVED, tensors),
        delta=_under(_DELTA, tensors),
    )


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> State:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
