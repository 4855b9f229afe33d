"""The plans that a person at this site has read and approved, by hash: ``approved.json``.

A plan's hash covers every word of it, so an approval is for exactly what was shown. It is asked
for before each round; taken back, the site answers no further round of that plan.
"""

from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from crafts_client.errors import HomeError
from crafts_core.durable import write_file
from crafts_core.plan import Plan


class Approval(BaseModel):
    """One approved plan."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    study: str
    approved_at: datetime


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

    def approve(self, plan: Plan) -> None:
        """Say yes to a plan. Again is fine."""
        known = self.all()
        known.setdefault(plan.hash, Approval(study=plan.study.name, approved_at=datetime.now(UTC)))
        self._write(known)

    def take_back(self, plan: Plan) -> None:
        """From the next round on, no."""
        known = self.all()
        known.pop(plan.hash, None)
        self._write(known)

    def _write(self, approvals: dict[str, Approval]) -> None:
        write_file(self._path, _FILE.dump_json(approvals, indent=1).decode() + "\n")
