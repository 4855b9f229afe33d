"""Turns on processes of this machine."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from multiprocessing import connection

import torch
from flwr.app import Message

from crafts_simulations.errors import ProcessError
from crafts_simulations.turn_pool import Died
from crafts_simulations.turn_server import Failed, Ready, serve

Answer = Callable[[str, Message], Message]
"""Runs one turn of the site with this name."""
_DIES_WITHIN_S = 10.0
_CONTEXT = multiprocessing.get_context("spawn")
"""Threads and devices that torch has begun to use do not survive a fork."""


class ProcessCrew:
    """A process for each place, see ``turn_pool.Crew``."""

    def __init__(
        self, make_answer: Callable[[], Answer], environment_of: Callable[[int], Mapping[str, str]]
    ) -> None:
        """Prepare.

        Args:
            make_answer: Called once in each process; can be pickled.
            environment_of: What the process at a place finds in its environment.
        """
        self._make_answer = make_answer
        self._environment_of = environment_of
        self._workers: dict[int, _Worker] = {}

    def begin(self, place: int, site: str, message: Message) -> None:
        """See ``turn_pool.Crew``."""
        if place not in self._workers:
            self._workers[place] = _Worker(self._make_answer, self._environment_of(place))
        self._workers[place].begin(site, message)

    def listen(self, places: Collection[int]) -> Sequence[tuple[int, Message | Died]]:
        """See ``turn_pool.Crew``."""
        place_of = {self._workers[place].pipe: place for place in places}
        heard: list[tuple[int, Message | Died]] = []
        while not heard:
            for pipe in connection.wait(list(place_of)):
                place = place_of[pipe]  # type: ignore[index]  # what was asked for
                said = self._workers[place].hear()
                if isinstance(said, Died):
                    del self._workers[place]
                if said is not None:
                    heard.append((place, said))
        return heard

    def close(self) -> None:
        """See ``turn_pool.Crew``."""
        for worker in self._workers.values():
            worker.end()
        self._workers.clear()


class _Worker:
    def __init__(self, make_answer: Callable[[], Answer], environment: Mapping[str, str]) -> None:
        self.pipe, theirs = _CONTEXT.Pipe()
        self._process = _CONTEXT.Process(target=serve, args=(theirs, environment), daemon=True)
        self._process.start()
        theirs.close()
        self._is_ready = False
        self._turn: tuple[str, Message] | None = None
        self._send(make_answer)

    def begin(self, site: str, message: Message) -> None:
        """A large message would block until the process reads: it waits until there is one."""
        self._turn = (site, message)
        if self._is_ready:
            self._send(self._turn)

    def hear(self) -> Message | Died | None:
        """What it said; None where that is only that it is ready."""
        try:
            said = self.pipe.recv()
        except (EOFError, OSError):
            self._process.join(_DIES_WITHIN_S)
            self.end()
            return Died(_how(self._process.exitcode))
        if isinstance(said, Ready):
            self._is_ready = True
            self._send(self._turn)
            return None
        if isinstance(said, Failed):
            raise ProcessError(f"a process that works for sites cannot go on: {said.why}")
        assert isinstance(said, Message)
        return said

    def end(self) -> None:
        self._process.kill()
        self._process.join()
        self.pipe.close()

    def _send(self, said: object) -> None:
        with suppress(OSError):  # it has died, which listening finds out
            self.pipe.send(said)


def _how(exit_code: int | None) -> str:
    if exit_code is None or exit_code >= 0:
        return f"exit code {exit_code}"
    return signal.Signals(-exit_code).name


def environment_of(place: int, *, num_places: int, device: str) -> dict[str, str]:
    """A share of this process's threads, and of its GPUs one: by turns.

    A device with a number is everybody's: who names one wants that one.
    """
    threads = str(max(1, torch.get_num_threads() // num_places))
    shares = {f"{library}_NUM_THREADS": threads for library in ("OMP", "MKL", "OPENBLAS")}
    if device != "cuda":
        return shares
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = seen.split(",") if seen else [str(gpu) for gpu in range(torch.cuda.device_count())]
    # Without one the device's own error says so.
    return shares | ({"CUDA_VISIBLE_DEVICES": gpus[place % len(gpus)]} if gpus else {})
