"""Runs a sweep: each arm and seed is a run of its own in a folder of its own.

::

    OUT/runs/ARM/SEED/    as ``crafts-sim run`` leaves it, with its own report.html
    OUT/sweep.json        every figure, and differences to the baseline
    OUT/sweep.html        the same to look at; of runs that failed, why
"""

import multiprocessing
import signal
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from crafts_core.durable import write_file
from crafts_core.errors import CraftsError
from crafts_core.progress import Progress
from crafts_simulations.errors import ScenarioError
from crafts_simulations.report import Report
from crafts_simulations.run import run_scenario
from crafts_simulations.scenario import Scenario
from crafts_simulations.sites import TileSource
from crafts_simulations.sweep import Run, Sweep
from crafts_simulations.sweep_page import render
from crafts_simulations.sweep_report import Failure, SweepReport, compare

_KILLED = (
    "the process of a run was killed, perhaps for want of memory; run the same command again with "
    "a smaller --parallel"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """One run, as it is handed to a process."""

    run: Run
    scenario: Scenario
    out: Path
    source: TileSource | None
    pool: Path | None
    device: str

    @property
    def is_finished(self) -> bool:
        """Whether its report is there; running it again makes sure that it is this run's."""
        return (self.out / "report.json").exists()

    def __call__(self, progress: Progress = lambda _what, _done, _total: None) -> Report | Failure:
        """The report, or why there is none: other runs go on."""
        self.out.parent.mkdir(parents=True, exist_ok=True)
        try:
            return run_scenario(
                self.scenario,
                self.out,
                source=self.source,
                pool=self.pool,
                device=self.device,
                num_workers=0,
                progress=progress,
            )
        except CraftsError as error:
            return _failed(self.run, str(error))


def run_sweep(
    sweep: Sweep,
    scenarios: Mapping[Run, Scenario],
    out: Path,
    *,
    chosen: Collection[Run] | None = None,
    source: TileSource | None = None,
    pool: Path | None = None,
    device: str = "cpu",
    num_parallel: int = 1,
    progress: Progress = lambda _what, _done, _total: None,
) -> SweepReport:
    """Run what is missing of a sweep, and compare its arms, as far as they finish.

    Args:
        sweep: Arms, seeds and the baseline.
        scenarios: Of each run, from ``load_sweep``.
        out: Folder of this sweep. A run that was made from other values is refused.
        chosen: Runs to run now, of ``Sweep.chosen``; others are compared if they are finished. None
            is all.
        source: Real tiles, where the scenario deals some.
        pool: Table of open images, for the arms that have stage retrieval.
        device: Torch device of all runs.
        num_parallel: Runs at a time, each in a process of its own; 1 runs them here.
        progress: Called with what is being done, how much is done, and how much there is.

    Raises:
        CraftsError: runs failed, the first with its arm and seed; all others were finished first,
            and their comparison is written, with why each of these failed.
    """
    if pool is not None and not any(scenario.needs_pool for scenario in scenarios.values()):
        raise ScenarioError("no arm has stage retrieval; leave out --pool")
    folder_of = {arm.name: arm.folder for arm in sweep.arms}
    jobs = [
        _Job(
            run=(name, seed),
            scenario=scenario,
            out=out / "runs" / folder_of[name] / str(seed),
            source=source,
            pool=pool if scenario.needs_pool else None,
            device=device,
        )
        for (name, seed), scenario in scenarios.items()
    ]
    if chosen is not None:
        jobs = [job for job in jobs if job.run in chosen or job.is_finished]
    reports: dict[Run, Report] = {}
    done = _one_by_one(jobs, progress) if num_parallel == 1 else _at_once(jobs, num_parallel)
    failures: list[Failure] = []
    for run, report in done:
        if isinstance(report, Failure):
            failures.append(report)
        else:
            reports[run] = report
        progress("runs", len(reports) + len(failures), len(jobs))
    if not reports:
        raise ScenarioError(_first_of(failures))
    found = compare(sweep, reports, failures)
    write_file(out / "sweep.json", found.model_dump_json(indent=1) + "\n")
    pages = {
        arm.name: [
            (seed, f"runs/{arm.folder}/{seed}/report.html")
            for seed in sweep.seeds
            if (arm.name, seed) in reports
        ]
        for arm in sweep.arms
    }
    page = out / "sweep.html"
    write_file(page, render(found, {name: links for name, links in pages.items() if links}))
    if failures:
        raise ScenarioError(f"{_first_of(failures)}; {page} compares what finished")
    return found


def _failed(run: Run, reason: str) -> Failure:
    name, seed = run
    return Failure(arm=name, seed=seed, reason=reason)


def _first_of(failures: list[Failure]) -> str:
    others = f" (and {len(failures) - 1} more runs failed)" if failures[1:] else ""
    return f"{failures[0].text}{others}"


def _one_by_one(jobs: list[_Job], progress: Progress) -> Iterator[tuple[Run, Report | Failure]]:
    for job in jobs:
        yield job.run, job(progress)


def _at_once(jobs: list[_Job], num_parallel: int) -> Iterator[tuple[Run, Report | Failure]]:
    """In processes that begin anew: torch's threads do not survive a fork."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_parallel, mp_context=context, initializer=_one_thread) as pool:
        waiting = {pool.submit(job): job.run for job in jobs}
        try:
            for future in as_completed(waiting):
                yield waiting[future], _result_of(future, waiting[future])
        except KeyboardInterrupt:  # a run takes hours, and goes on where it was ended
            for process in multiprocessing.active_children():
                process.terminate()
            raise
        finally:
            pool.shutdown(cancel_futures=True)


def _result_of(future: Future[Report | Failure], run: Run) -> Report | Failure:
    """One killed process ends the others of its pool, and all runs that wait."""
    try:
        return future.result()
    except BrokenProcessPool:
        return _failed(run, _KILLED)


def _one_thread() -> None:
    """And no answer to Ctrl-C, which reaches all processes: the first one ends the others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    import torch

    torch.set_num_threads(1)
