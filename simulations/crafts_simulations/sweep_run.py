"""Runs a sweep: each arm and seed is a run of its own in a folder of its own.

::

    OUT/runs/ARM/SEED/    as ``crafts-sim run`` leaves it, with its own report.html
    OUT/sweep.json        every figure, and differences to the baseline
    OUT/sweep.html        the same to look at
"""

import multiprocessing
import signal
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from crafts_core.durable import write_file
from crafts_core.errors import CraftsError
from crafts_simulations.errors import ScenarioError
from crafts_simulations.report import Report
from crafts_simulations.run import run_scenario
from crafts_simulations.scenario import Scenario
from crafts_simulations.sites import TileSource
from crafts_simulations.study import StepProgress
from crafts_simulations.sweep import Sweep
from crafts_simulations.sweep_page import render
from crafts_simulations.sweep_report import SweepReport, compare

Run = tuple[str, int]
"""An arm's name and a seed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """One run, as it is handed to a process."""

    run: Run
    scenario: Scenario
    out: Path
    source: TileSource | None
    device: str

    def __call__(
        self, progress: StepProgress = lambda _what, _done, _total: None
    ) -> Report | ScenarioError:
        """The report, or why there is none: other runs go on."""
        self.out.parent.mkdir(parents=True, exist_ok=True)
        try:
            return run_scenario(
                self.scenario,
                self.out,
                source=self.source,
                device=self.device,
                num_workers=0,
                progress=progress,
            )
        except CraftsError as error:
            name, seed = self.run
            return ScenarioError(f"arm {name!r}, seed {seed}: {error}")


def run_sweep(
    sweep: Sweep,
    scenarios: Mapping[Run, Scenario],
    out: Path,
    *,
    source: TileSource | None = None,
    device: str = "cpu",
    num_parallel: int = 1,
    progress: StepProgress = lambda _what, _done, _total: None,
) -> SweepReport:
    """Run what is missing of a sweep, and compare its arms.

    Args:
        sweep: Arms, seeds and the baseline.
        scenarios: Of each run, from ``load_sweep``.
        out: Folder of this sweep. A run that was made from other values is refused.
        source: Real tiles, where the scenario deals some.
        device: Torch device of all runs.
        num_parallel: Runs at a time, each in a process of its own; 1 runs them here.
        progress: Called with what is being done, how much is done, and how much there is.

    Raises:
        CraftsError: runs failed, the first with its arm and seed; all others were finished first.
    """
    folder_of = {arm.name: arm.folder for arm in sweep.arms}
    jobs = [
        _Job(
            run=(name, seed),
            scenario=scenario,
            out=out / "runs" / folder_of[name] / str(seed),
            source=source,
            device=device,
        )
        for (name, seed), scenario in scenarios.items()
    ]
    reports: dict[Run, Report] = {}
    done = _one_by_one(jobs, progress) if num_parallel == 1 else _at_once(jobs, num_parallel)
    failures: list[ScenarioError] = []
    for run, report in done:
        if isinstance(report, ScenarioError):
            failures.append(report)
        else:
            reports[run] = report
        progress("runs", len(reports) + len(failures), len(jobs))
    if failures:
        others = f" (and {len(failures) - 1} more runs failed)" if failures[1:] else ""
        raise ScenarioError(f"{failures[0]}{others}")
    found = compare(sweep, reports)
    write_file(out / "sweep.json", found.model_dump_json(indent=1) + "\n")
    pages = {
        arm.name: [(seed, f"runs/{arm.folder}/{seed}/report.html") for seed in sweep.seeds]
        for arm in sweep.arms
    }
    write_file(out / "sweep.html", render(found, pages))
    return found


def _one_by_one(
    jobs: list[_Job], progress: StepProgress
) -> Iterator[tuple[Run, Report | ScenarioError]]:
    for job in jobs:
        yield job.run, job(progress)


def _at_once(jobs: list[_Job], num_parallel: int) -> Iterator[tuple[Run, Report | ScenarioError]]:
    """In processes that begin anew: torch's threads do not survive a fork."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_parallel, mp_context=context, initializer=_one_thread) as pool:
        waiting = {pool.submit(job): job.run for job in jobs}
        try:
            for future in as_completed(waiting):
                yield waiting[future], future.result()
        except KeyboardInterrupt:  # a run takes hours, and goes on where it was ended
            for process in multiprocessing.active_children():
                process.terminate()
            raise
        except BrokenProcessPool as error:
            raise ScenarioError(
                "the process of a run was killed, perhaps for want of memory; run the same command "
                "again with a smaller --parallel"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _one_thread() -> None:
    """And no answer to Ctrl-C, which reaches all processes: the first one ends the others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    import torch

    torch.set_num_threads(1)
