"""One fault: what is done, what must hold, and whether it held."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from crafts_client.home import SiteHome
from crafts_core.foundation import Foundation
from crafts_privacy.ledger import EntryKind, Ledger
from crafts_server.checkpoints import Checkpoint
from crafts_simulations.errors import ProcessError
from crafts_simulations.small_study import COHORT


class Verdict(StrEnum):
    """How a case ended."""

    HELD = "held"
    FAILED = "FAILED"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A line of the table."""

    group: str
    fault: str
    must_hold: str
    verdict: Verdict
    observed: str
    seconds: float


Experiment = Callable[[Path, Foundation], str]
"""Runs the fault in an empty folder and says in a few words what was observed; raises when what
must hold does not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A fault."""

    group: str
    fault: str
    must_hold: str
    experiment: Experiment

    def run(self, folder: Path, foundation: Foundation) -> Outcome:
        """Try it; a failure is an outcome, too."""
        started = time.monotonic()
        try:
            observed, verdict = self.experiment(folder, foundation), Verdict.HELD
        except Exception as error:
            text = (str(error).splitlines() or [""])[0]
            observed, verdict = f"{type(error).__name__}: {text}", Verdict.FAILED
        return Outcome(
            group=self.group,
            fault=self.fault,
            must_hold=self.must_hold,
            verdict=verdict,
            observed=observed,
            seconds=time.monotonic() - started,
        )


def expect(holds: bool, otherwise: str) -> None:  # reads as a sentence
    """Raise unless something holds.

    Raises:
        ProcessError: with what is the case instead.
    """
    if not holds:
        raise ProcessError(otherwise)


def check_ledgers(chain: Iterable[Checkpoint], sites: dict[str, Path]) -> None:
    """Every update that a committed round used was charged at its site before it left.

    Raises:
        ProcessError: a ledger shows fewer rounds than left.
    """
    receipts = [checkpoint.receipt() for checkpoint in list(chain)[1:]]
    for name, path in sites.items():
        used = sum(name in {site.site for site in receipt.sites} for receipt in receipts)
        ledger = Ledger(SiteHome.open(path).ledger_path)
        ledger.verify()
        released = sum(entry.kind is EntryKind.COMMITTED for entry in ledger.entries())
        charged = len(ledger.events(COHORT))
        expect(
            used <= released <= charged,
            f"{name}: {used} updates used, {released} released, {charged} charged",
        )
