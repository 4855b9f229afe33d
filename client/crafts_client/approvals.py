"""The plans that a person at this site has read and approved, by hash: ``approved.json``.

A plan's hash covers every word of it, so an approval is for exactly what was shown, and for one run
of it: approving it again once it ran allows one run more. It is asked for before each round; taken
back, the site answers no further round of that plan.
"""

from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from crafts_client.errors import HomeError
from crafts_core.durable import write_file
from crafts_core.plan import Plan


class Approval(BaseModel):
    """One approved plan."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    study: str
    approved_at: datetime
    runs: int = Field(default=1, ge=1)
    """How many runs of it may spend here, all within its one target epsilon."""


_FILE = TypeAdapter(dict[str, Approval])


class Approvals:
    """The file, read anew at every question, so that a running site sees a change at once."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def all(self) -> dict[str, Approval]:
        """By plan hash.

        Raises:
            HomeError: the file is damaged; nothing counts as approved.
        """
        try:
            return _FILE.validate_json(self._path.read_bytes())
        except FileNotFoundError:
            return {}
        except (OSError, ValidationError) as error:
            raise HomeError(
                f"cannot read {self._path}; remove it and approve the plans again"
            ) from error

    def runs_of(self, plan_hash: str) -> int:
        """How many runs of a plan are allowed; one without a word of anybody."""
        approval = self.all().get(plan_hash)
        return 1 if approval is None else approval.runs

    def approve(self, plan: Plan, *, runs_so_far: int = 0) -> None:
        """Say yes to a plan, and to one run more than it has had. Again is fine."""
        runs = runs_so_far + 1
        known = self.all()
        if plan.hash not in known or known[plan.hash].runs < runs:
            known[plan.hash] = Approval(
                study=plan.study.name, approved_at=datetime.now(UTC), runs=runs
            )
        self._write(known)

    def take_back(self, plan: Plan) -> None:
        """From the next round on, no."""
        known = self.all()
        known.pop(plan.hash, None)
        self._write(known)

    def _write(self, approvals: dict[str, Approval]) -> None:
        write_file(self._path, _FILE.dump_json(approvals, indent=1).decode() + "\n")
