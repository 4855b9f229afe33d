"""Running independent jobs on processes, results in order as they come."""

import multiprocessing
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from crafts_client.ingest.errors import IngestError

Job = TypeVar("Job")
Result = TypeVar("Result")


def run_jobs(
    function: Callable[[Job], Result],
    jobs: Sequence[Job],
    *,
    num_processes: int,
    chunk_size: int = 1,
) -> Generator[Result, None, None]:
    """Yield ``function(job)`` for each job in order.

    Processes are spawned, never forked: slide handles and their caches do not survive a fork.
    With one process everything runs here. Leaving the iteration early drops what has not begun.

    Raises:
        IngestError: a process died, which a damaged file can do to a decoder.
    """
    if num_processes == 1 or len(jobs) <= 1:
        yield from map(function, jobs)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(num_processes, len(jobs)), mp_context=context)
    try:
        yield from pool.map(function, jobs, chunksize=chunk_size)
    except BrokenProcessPool as error:
        raise IngestError(
            "a reading process died (out of memory, or a damaged file); what was finished is "
            "kept: run again, with one process to see which file it is"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
