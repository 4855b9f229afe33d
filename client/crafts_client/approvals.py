"""What a person at this site has read and approved, by hash: plans, foundations and rosters.

A hash covers every word of a plan and every byte of a foundation, so an approval is for exactly
what was shown. It is asked for before each round; taken back, the site answers no further one.

A plan is approved for one run: approving it again once it ran allows one run more. Not of a plan
that releases something before training: whoever saw what a first run told could choose by it
between a second telling and further steps, and what the two cost together no limit of one covers.

A foundation
sees every tile, as it encodes them, and one that was made for that could behave otherwise where a
certain tile is; so nothing private is encoded, and nothing trained, with one that nobody here
approved. The embedded foundation is part of the installed package, and approved by installing it.

A roster says who the other hospitals of a plan's sums are, by their keys. It is approved once they
have read its phrase to each other, or their fingerprints are in the policy.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from crafts_client.errors import HomeError
from crafts_client.policy import ONE_RUN, PolicyError, Rule
from crafts_core.durable import exclusive_lock, write_file
from crafts_core.foundation_manifest import FoundationManifest, embedded_path, read_manifest
from crafts_core.plan import Plan
from crafts_core.roster import Roster


class Approval(BaseModel):
    """One approved plan."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    study: str
    approved_at: datetime
    runs: int = Field(default=1, ge=1)
    """How many runs of it may spend here, all within its one target epsilon."""


class FoundationApproval(BaseModel):
    """One approved foundation, as it was shown."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    licence: str
    approved_at: datetime


class RosterApproval(BaseModel):
    """The roster of one plan, as it was approved."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    roster: Roster
    approved_at: datetime


Approved = TypeVar("Approved", bound=BaseModel)
_PATIENCE_S = 10.0


class _ApprovalFile(Generic[Approved]):
    """A file, read anew at every question, so that a running site sees a change at once."""

    def __init__(self, path: Path, model: type[Approved]) -> None:
        self._path = path
        self._file: TypeAdapter[dict[str, Approved]] = TypeAdapter(dict[str, model])  # type: ignore[valid-type]  # known at run time

    def all(self) -> dict[str, Approved]:
        """By hash.

        Raises:
            HomeError: the file is damaged; nothing counts as approved.
        """
        try:
            return self._file.validate_json(self._path.read_bytes())
        except FileNotFoundError:
            return {}
        except (OSError, ValidationError) as error:
            raise HomeError(
                f"cannot read {self._path}; remove it and approve everything again"
            ) from error

    def take_back(self, beginning: str) -> str:
        """From the next round on, no; nobody else is asked. The hash.

        Raises:
            HomeError: none, or several, of what is approved begins so.
        """
        with self._changing() as known:
            found = [each for each in known if each.startswith(beginning)]
            if not found:
                others = f"; approved are {', '.join(known)}" if known else ""
                raise HomeError(f"nothing that begins with {beginning!r} is approved here{others}")
            if len(found) > 1:
                raise HomeError(
                    f"{', '.join(found)} begin with {beginning!r}; give more digits of one"
                )
            del known[found[0]]
        return found[0]

    @contextmanager
    def _changing(self) -> Iterator[dict[str, Approved]]:
        """What is approved, to be changed in place: of two commands at once both count."""
        busy = HomeError(f"another command changes {self._path}; run it again")
        lock = self._path.with_name(f"{self._path.name}.lock")
        with exclusive_lock(lock, held=busy, timeout_s=_PATIENCE_S):
            known = self.all()
            yield known
            write_file(self._path, self._file.dump_json(known, indent=1).decode() + "\n")


class Approvals(_ApprovalFile[Approval]):
    """Of plans: ``approved.json``."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, Approval)

    def runs_of(self, plan: Plan) -> int:
        """How many runs of a plan are allowed; one without a word of anybody."""
        approval = self.all().get(plan.hash)
        return 1 if approval is None or plan.releases else approval.runs

    def approve(self, plan: Plan, *, runs_so_far: int = 0) -> None:
        """Say yes to a plan, and to one run more than it has had. Again is fine.

        One that releases something has one run: it is approved again only where that was taken
        back, and goes on with it.

        Raises:
            PolicyError: rule ``run``: it had the only one that it may have.
        """
        runs = 1 if plan.releases else runs_so_far + 1
        with self._changing() as known:
            if plan.releases and runs_so_far and plan.hash in known:
                raise PolicyError(Rule.RUN, ONE_RUN)
            if plan.hash not in known or known[plan.hash].runs < runs:
                known[plan.hash] = Approval(
                    study=plan.study.name, approved_at=datetime.now(UTC), runs=runs
                )


class FoundationApprovals(_ApprovalFile[FoundationApproval]):
    """Of foundations: ``approved_foundations.json``."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, FoundationApproval)

    def approve(self, manifest: FoundationManifest) -> None:
        """Say yes to a foundation. Again is fine."""
        approval = FoundationApproval(
            name=manifest.name, licence=manifest.licence, approved_at=datetime.now(UTC)
        )
        with self._changing() as known:
            known.setdefault(manifest.hash, approval)

    def has(self, foundation_hash: str) -> bool:
        """Whether it may see private tiles."""
        return foundation_hash in self.all() or is_embedded(foundation_hash)

    def check(self, manifest: FoundationManifest) -> None:
        """Refuse a foundation that nobody here approved.

        Raises:
            PolicyError: rule ``foundation_approval``.
        """
        if not self.has(manifest.hash):
            raise PolicyError(
                Rule.FOUNDATION_APPROVAL,
                f"nobody here approved foundation {manifest.name}; compare its hash with the "
                "study's, then run crafts-client foundation approve "
                f"{manifest.hash}",
            )


class RosterApprovals(_ApprovalFile[RosterApproval]):
    """Of rosters, one for each plan: ``approved_rosters.json``."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, RosterApproval)

    def approve(self, roster: Roster) -> None:
        """Say yes to a roster, in place of the one of the same plan."""
        approval = RosterApproval(roster=roster, approved_at=datetime.now(UTC))
        with self._changing() as known:
            known[roster.plan_hash] = approval

    def of_plan(self, plan_hash: str) -> Roster:
        """The roster that was approved for a plan.

        Raises:
            PolicyError: rule ``roster``: none was.
        """
        approval = self.all().get(plan_hash)
        if approval is None:
            raise PolicyError(
                Rule.ROSTER,
                "nobody here approved who the other hospitals are; run crafts-client roster "
                f"approve {plan_hash}",
            )
        return approval.roster


def is_embedded(foundation_hash: str) -> bool:
    """Whether it is the one that came with the installed package."""
    return foundation_hash == read_manifest(embedded_path()).hash
