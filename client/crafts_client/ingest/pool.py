"""Running jobs on processes that may die or hang: a damaged file can do both to a decoder.

Workers are forked from a server that has imported what they need and never opens a slide: handles
and their caches do not survive a fork, and importing takes a worker longer than a small slide.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing import connection, forkserver
from typing import Any, Self, TypeVar

from crafts_client.ingest.errors import SlideError

Job = TypeVar("Job")
Result = TypeVar("Result")
Beat = Callable[[int], None]
"""A sign of life: how many places were done since the last."""

SILENCE_S = 300.0
"""A job that gives no sign of life for so long is taken for hung."""
MAX_TRIES = 2
"""The system ends processes for its own reasons, too; twice is the file's fault."""
_CONTEXT = multiprocessing.get_context("forkserver")
_PRELOADED = ("crafts_client.ingest", "tifffile", "simplejpeg")
_BEAT_EVERY_S = 0.1
_STARTS_WITHIN_S = 120.0
_LOOK_S = 1.0
_PR_SET_PDEATHSIG = 1
DIED = "reading it ends the reading process: damaged beyond what its decoder bears"
HANGS = "reading it never ends: damaged"


class Pool:
    """Processes that work on jobs one at a time; a context manager."""

    def __init__(self, num_processes: int, *, silence_s: float = SILENCE_S) -> None:
        """Prepare; processes start with the first jobs, their server at once.

        Args:
            num_processes: 0 runs everything in this process, where a crash is a crash.
            silence_s: See ``SILENCE_S``.
        """
        self._num_processes = num_processes
        self._silence_s = silence_s
        self._idle: list[_Worker] = []
        self._busy: list[_Worker] = []
        if num_processes > 0:
            _CONTEXT.set_forkserver_preload(["__main__", *_PRELOADED])
            forkserver.ensure_running()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in (*self._idle, *self._busy):
            worker.end()

    def run(
        self,
        function: Callable[[Job, Beat], Result],
        jobs: Sequence[Job],
        *,
        on_beat: Beat = lambda _: None,
    ) -> Iterator[tuple[int, Result | SlideError]]:
        """Yield each job's place and its result as they come.

        A ``SlideError`` is a result, and so is what became of a process that died or hung; any
        other error ends the run.

        Args:
            function: A function of a module; called with a job and the place for its beats.
            jobs: Anything that can be pickled.
            on_beat: Called with the beats of all.
        """
        if self._num_processes == 0:
            yield from ((place, _outcome(function, job, on_beat)) for place, job in enumerate(jobs))
            return
        waiting, tries = deque(range(len(jobs))), Counter[int]()
        while waiting or self._busy:
            while waiting and len(self._busy) < self._num_processes:
                self._give(waiting.popleft(), function, jobs)
            for worker, said in self._listen():
                if isinstance(said, _Beat):
                    on_beat(said.places)
                    continue
                place = worker.place
                self._busy.remove(worker)
                if isinstance(said, _Died):
                    worker.end()
                    tries[place] += 1
                    if tries[place] < MAX_TRIES:
                        waiting.appendleft(place)
                        continue
                    yield place, SlideError(said.reason)
                elif isinstance(said, _Raised):
                    worker.end()
                    raise said.error
                else:
                    self._idle.append(worker)
                    yield place, said

    def _give(self, place: int, function: Callable[..., Any], jobs: Sequence[Any]) -> None:
        worker = self._idle.pop() if self._idle else _Worker()
        self._busy.append(worker)
        worker.take(place, function, jobs[place])

    def _listen(self) -> Iterator[tuple["_Worker", Any]]:
        """What workers say next: beats, results, or that they are no more."""
        by_end = {worker.end_of_pipe: worker for worker in self._busy}
        for end in connection.wait(list(by_end), timeout=_LOOK_S):
            worker = by_end[end]  # type: ignore[index]  # what we asked for
            yield worker, worker.hear()
        now = time.monotonic()
        for worker in list(self._busy):
            if now - worker.heard_at > self._silence_s:
                yield worker, _Died(HANGS)


class _Worker:
    def __init__(self) -> None:
        self.end_of_pipe, theirs = _CONTEXT.Pipe()
        self._process = _CONTEXT.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()
        self.place = -1
        self.heard_at = time.monotonic() + _STARTS_WITHIN_S

    def take(self, place: int, function: Callable[..., Any], job: Any) -> None:
        self.place, self.heard_at = place, max(self.heard_at, time.monotonic())
        with suppress(OSError):  # it has died meanwhile, which the next look finds out
            self.end_of_pipe.send((function, job))

    def hear(self) -> Any:
        self.heard_at = time.monotonic()
        try:
            return self.end_of_pipe.recv()
        except (EOFError, OSError):
            return _Died(DIED)

    def end(self) -> None:
        self._process.kill()
        self._process.join()
        self.end_of_pipe.close()


class _Beat:
    def __init__(self, places: int) -> None:
        self.places = places


class _Died:
    def __init__(self, reason: str) -> None:
        self.reason = reason


class _Raised:
    def __init__(self, error: Exception) -> None:
        self.error = error


def _serve(pipe: "connection.Connection[Any, Any]") -> None:
    """What a worker does until nobody is at the other end any more."""
    _end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one who waits for us
    try:
        pipe.send(_Beat(0))
        while True:
            function, job = pipe.recv()
            beats = _Beats(pipe)
            try:
                said: Any = _outcome(function, job, beats)
                beats.flush()
            except (BrokenPipeError, ConnectionError):
                raise
            except Exception as error:
                said = _Raised(error)
            pipe.send(said)
    except (EOFError, OSError):
        os._exit(0)


def _end_with_parent() -> None:
    """See to it that a killed program leaves nobody who hangs in a decoder and holds its shard.

    The server of workers ends with the program. Linux ends this process with the server, also
    inside a library that never gives up the interpreter; elsewhere a thread does, as soon as it
    may run.
    """
    program = multiprocessing.parent_process()
    assert program is not None
    sentinel = program.sentinel
    # The server goes on while anybody holds this, and a worker gets it for workers of its own.
    os.close(forkserver._forkserver._forkserver_alive_fd)  # type: ignore[attr-defined]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if connection.wait([sentinel], timeout=0):  # it was too late for the signal
            os._exit(0)
    else:

        def watch() -> None:
            connection.wait([sentinel])
            os._exit(0)

        threading.Thread(target=watch, daemon=True).start()


class _Beats:
    """Passes beats on, a few a second: each costs the receiver time."""

    def __init__(self, pipe: "connection.Connection[Any, Any]") -> None:
        self._pipe, self._places, self._sent_at = pipe, 0, time.monotonic()

    def __call__(self, places: int) -> None:
        self._places += places
        if time.monotonic() - self._sent_at >= _BEAT_EVERY_S:
            self.flush()

    def flush(self) -> None:
        self._pipe.send(_Beat(self._places))
        self._places, self._sent_at = 0, time.monotonic()


def _outcome(function: Callable[[Job, Beat], Result], job: Job, beat: Beat) -> Result | SlideError:
    try:
        return function(job, beat)
    except SlideError as error:
        return error
