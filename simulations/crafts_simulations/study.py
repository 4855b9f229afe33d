"""What every step of a simulated study needs to know."""

from dataclasses import dataclass
from pathlib import Path

from crafts_core.foundation import Foundation
from crafts_core.foundation_manifest import EMBEDDED
from crafts_core.plan import Plan
from crafts_core.progress import Progress
from crafts_simulations.scenario import Scenario
from crafts_simulations.workspace import Workspace


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalStudy:
    """One scenario at work in one folder."""

    workspace: Workspace
    scenario: Scenario
    plan: Plan
    foundation: Foundation
    signer: str
    """The coordinator's public key, which the sites trust."""
    device: str
    """As it was asked for: ``cuda`` is any GPU, ``cuda:1`` that one."""
    num_workers: int
    """Slides at a time. Speed only."""
    num_trainers: int | None
    """Sites that train at a time: 1 in this process, more on as many others, None on as many as
    Ray has room for."""
    ray: str | None
    """Address of the Ray whose processes these are; None is this machine without Ray."""
    real_processes: bool
    """Whether the sites are programs of their own, and hold answers back like a hospital's."""
    progress: Progress

    @property
    def foundation_name(self) -> str:
        """As a site names it: ``embedded``, wherever that lies, or a folder's absolute path."""
        named = self.scenario.scenario.foundation
        return named if named == EMBEDDED else str(Path(named).resolve())

    @property
    def repeatable_seed(self) -> int | None:
        """The seed of everything, or None where noise is drawn from entropy."""
        return self.plan.study.seed if self.scenario.scenario.repeatable else None
