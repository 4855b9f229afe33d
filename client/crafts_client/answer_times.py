"""When an answer leaves: at a time that was fixed before the first patient was drawn.

A step takes longer with more patients, so whoever sees when an answer leaves could count, without
noise, whom the round drew. A site therefore holds every answer back, and every refusal that comes
after the first draw, until ``every_s`` after training began; what is not ready by then leaves at
the next multiple. In ``auto`` that is a bound on how long training can take, made of public numbers
only: the declared size, the plan, and how long steps on public tiles took just before.

The bound holds for the number drawn but for ``OVERRUN`` a round, as long as the cohort is at most
``COHORT_SLACK`` times what is declared. That chance is named and not added to delta: over R rounds
it adds at most ``R (1 + exp(epsilon)) OVERRUN``, 3e-9 for a thousand rounds at epsilon 8, which no
printed digit of delta holds. It cannot cover a machine that becomes slower after the public steps
were timed, by more than ``MARGIN`` and the room that the bound leaves above the usual number drawn:
an answer that is late then tells roughly how many were drawn, as every answer would without this.

A release waits sealed and not yet committed: an entry of the ledger carries its time, and its hash
leaves with the head that the coordinator witnesses. So a process that dies while it waits loses
nothing, and what is asked for again leaves at once, at a time that the asking decides.
"""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np

from crafts_client.home import SiteConfig
from crafts_core.plan_sections import StageConfig

log = logging.getLogger(__name__)

OVERRUN = 1e-15
"""How often a round may draw more patients than its answer waits for."""
COHORT_SLACK = 1.1
"""How much larger than declared a cohort may be; `crafts-client doctor` warns above it."""
MARGIN = 1.25
"""Patients' passes beside public ones: tiles are read from disk, the machine does other work."""
_AFTER_S = 1.0
"""From the last step to a sealed release, and what a round does once before its first step."""
_AFTER_S_PER_BYTE = 2e-8
"""Writing, syncing and hashing what a round leaves in the home, on a slow disk."""
_TIMED_STEPS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Clock:
    """Where time comes from; another one is for tests."""

    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


@dataclass(frozen=True, slots=True, kw_only=True)
class PublicStep:
    """A private step on public patients, to be timed."""

    run: Callable[[int], None]
    """Takes the step with so many full passes; none is a step that nobody was drawn for."""
    group_size: int
    """Patients in a full pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How long public steps took, on the device and with the code that trains."""

    step_s: float
    """A step that nobody was drawn for."""
    pass_s: float
    """What a full pass adds to it."""
    group_size: int

    @classmethod
    def of(cls, step: PublicStep, now: Callable[[], float]) -> Self:
        """Time a few steps; the slowest counts."""

        def seconds(num_passes: int) -> float:
            began = now()
            step.run(num_passes)
            return now() - began

        seconds(1)  # compiles, fills caches, wakes the device
        empty = [seconds(0) for _ in range(_TIMED_STEPS)]
        full = [seconds(1) for _ in range(_TIMED_STEPS)]
        return cls(
            step_s=max(empty),
            pass_s=max(max(full) - min(empty), 0.0),
            group_size=step.group_size,
        )


def flush_subnormals() -> None:
    """Let no number slow the processor down. Call it before torch starts its threads.

    Some processors take up to a hundred times longer for numbers below 1e-38, and a coordinator's
    adapter could make them of one patient's tiles and not of public ones: a time that tells who
    was drawn. The threads that torch starts later do as the one that starts them.
    """
    import torch

    torch.set_flush_denormal(True)


def most_passes(
    declared_patients: int, sample_rate: float, *, steps: int, group_size: int, num_devices: int
) -> int:
    """Passes of a round, but for ``OVERRUN``, where each step waits for its busiest device.

    Chernoff's bound on the sum over the steps, with the exact moment generating function of one
    step: how many passes the device needs that drew most.
    """
    from scipy.special import logsumexp  # to know the slack, as doctor does, needs none of it
    from scipy.stats import binom

    cohort = math.ceil(COHORT_SLACK * declared_patients)
    # Pseudonyms deal patients out: as many as no device gets, but for ``OVERRUN`` again.
    share = cohort if num_devices == 1 else int(binom.isf(OVERRUN, cohort, 1 / num_devices))
    drawn_K = np.arange(share + 1)
    with np.errstate(divide="ignore"):  # log(0) is the chance of what cannot be
        # P(max > k) over the devices, exact to the last digit of a tail that is next to nothing.
        above_K = -np.expm1(num_devices * np.log1p(-binom.sf(drawn_K, share, sample_rate)))
        chance_K = np.maximum(-np.diff(above_K, prepend=1.0), 0.0)
        log_chance_N = np.log(np.bincount(-(-drawn_K // group_size), weights=chance_K))
    passes_N = np.arange(len(log_chance_N))
    slopes = np.geomspace(1e-4, 1e2, 241)
    log_moments = np.array([logsumexp(log_chance_N + slope * passes_N) for slope in slopes])
    most = np.min((steps * log_moments - math.log(OVERRUN)) / slopes)
    return min(int(most), steps * int(passes_N[-1]))


def longest_round_s(
    pace: Pace, config: SiteConfig, stage: StageConfig, *, sample_rate: float, num_bytes: int
) -> float:
    """How long a round takes from its first draw to its sealed release, at most.

    Args:
        pace: Of public steps.
        config: For the declared size and the number of devices.
        stage: For the number of steps. Patients without a mask take no time in stage control, and
            count like all others.
        sample_rate: Of the plan.
        num_bytes: That the round writes before its answer waits.
    """
    passes = most_passes(
        config.declared_patients,
        sample_rate,
        steps=stage.local_steps,
        group_size=pace.group_size,
        num_devices=1 + len(config.more_devices),
    )
    training_s = stage.local_steps * pace.step_s + passes * pace.pass_s
    return MARGIN * training_s + _AFTER_S + _AFTER_S_PER_BYTE * num_bytes


class Departure:
    """Holds back what comes of a block, answer or error, until a time that no patient decides.

    Nothing is waited for before ``begin``: until then everything was public. An interruption
    (``KeyboardInterrupt``, ``SystemExit``) waits for nothing, because nothing leaves.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._began_s = self._every_s = 0.0
        self.was_in_time = False
        """Whether the last block's answer left when it was fixed to, so that its time told nothing;
        not if nothing was held back."""

    def begin(self, every_s: float) -> None:
        """Start counting now, just before the first draw; 0 holds nothing back."""
        self._began_s, self._every_s = self._clock.now(), every_s

    def __enter__(self) -> Self:
        self._every_s, self.was_in_time = 0.0, False
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._every_s and (kind is None or issubclass(kind, Exception)):
            self._wait()

    def _wait(self) -> None:
        taken_s = self._clock.now() - self._began_s
        times = max(1, math.ceil(taken_s / self._every_s))
        self.was_in_time = times == 1
        self._clock.sleep(times * self._every_s - taken_s)
        if not self.was_in_time:  # said only now: a log's lines carry times
            log.warning(
                "a round took longer than the %.0f s that its answer waits for, so that its time "
                "tells roughly how many patients were drawn; set answer_every_s in site.toml to a "
                "number that is never passed",
                self._every_s,
            )
