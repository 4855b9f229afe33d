"""Figures that took seconds to compute, kept for whoever only looks: ``figures.json`` in the home.

What an accountant answers depends on its question alone, so a question that this code has answered
before, with these libraries, is answered from the file. Commands and pages that show something ask
here. What decides never does: who approves a plan has it judged anew, the privacy report composes
what it says, and what trains calibrates and charges for itself.
"""

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from crafts_client.code_hash import code_sha256
from crafts_client.errors import HomeError
from crafts_core.durable import exclusive_lock, write_file

_MOST_KEPT = 256
_ACCOUNTANTS = ("dp-accounting", "numpy", "scipy")
Answer = TypeVar("Answer")


class Figures:
    """What was computed in one home."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def of(
        self, kind: type[Answer], question: tuple[object, ...], ask: Callable[[], Answer]
    ) -> Answer:
        """The answer to a question; computed if nobody has asked it before.

        Args:
            kind: Of the answer, as pydantic reads it.
            question: All that the answer depends on, as values whose ``repr`` is exact.
            ask: Computes it.
        """
        adapter = TypeAdapter(kind)
        key = hashlib.sha256(f"{_computed_by()} {question!r}".encode()).hexdigest()
        with suppress(KeyError, ValidationError):
            return adapter.validate_python(self._kept()[key])
        answer = ask()
        self._keep(key, adapter.dump_python(answer, mode="json"))
        return answer

    def _kept(self) -> dict[str, Any]:
        """What is not a file of ours counts as empty: nothing is lost but time."""
        try:
            kept = json.loads(self._path.read_bytes())
        except (OSError, ValueError, RecursionError):  # the last: of brackets in brackets
            return {}
        return kept if isinstance(kept, dict) else {}

    def _keep(self, key: str, answer: object) -> None:
        """Where the home cannot be written, or somebody else writes, it is computed again."""
        busy = HomeError(f"{self._path} is in use")
        with (
            suppress(OSError, HomeError),
            exclusive_lock(
                self._path.with_name(f"{self._path.name}.lock"), held=busy, timeout_s=1.0
            ),
        ):
            newest = list(self._kept().items())[1 - _MOST_KEPT :]
            write_file(self._path, json.dumps(dict([*newest, (key, answer)])), mode=0o600)


@cache
def _computed_by() -> str:
    return " ".join([code_sha256(), *map(metadata.version, _ACCOUNTANTS)])
