"""What processes of a test answer turns with. Light, as every process imports it."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from flwr.app import ConfigRecord, Message, RecordDict

from crafts_core.durable import write_file

Answer = Callable[[str, Message], Message]


def tells_where() -> Answer:
    """Answers with what it got and where."""

    def answer(site: str, message: Message) -> Message:
        told = ConfigRecord(
            {
                "site": site,
                "pid": os.getpid(),
                "threads": os.environ["OMP_NUM_THREADS"],
                "num_bytes": len(str(message.content.config_records["say"]["text"])),
            }
        )
        return Message(RecordDict({"told": told}), reply_to=message)

    return answer


class Ends:
    """Ends its own process, as the system would for want of memory, in the first tries of a turn.

    Each try leaves a line in a file.
    """

    def __init__(self, tries: Path, *, times: int) -> None:
        self._tries, self._times = tries, times

    def __call__(self) -> Answer:
        return self._answer

    def _answer(self, site: str, message: Message) -> Message:
        with self._tries.open("a") as file:
            file.write(f"{site}\n")
        if self._tries.read_text().count(f"{site}\n") <= self._times:
            os.kill(os.getpid(), signal.SIGKILL)
        return tells_where()(site, message)


class PlayedWork:
    """What ``RayCrew`` has to know of its work, around turns that each end their process once."""

    def __init__(self, sites: list[str], tries: Path) -> None:
        self.homes = dict.fromkeys(sites, tries.parent)
        self.device, self.is_verbose, self._tries = "cpu", False, tries

    def bench(self) -> Answer:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        return Ends(self._tries, times=1)()


def cannot_start() -> Answer:
    raise FileNotFoundError("no foundation here")


class Sleeps:
    """Writes down its process, and never answers."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __call__(self) -> Answer:
        return self._answer

    def _answer(self, site: str, message: Message) -> Message:
        write_file(self._file, str(os.getpid()))
        time.sleep(3600)
        return message


def start_sleeping(file: str) -> None:
    """A simulation that waits for a site for ever."""
    from crafts_simulations.local_grid import LocalGrid
    from crafts_simulations.process_crew import ProcessCrew
    from crafts_simulations.turn_pool import TurnPool

    pool = TurnPool(ProcessCrew(Sleeps(Path(file)), lambda _: {}), ["a"], num_places=1)
    grid = LocalGrid(pool)
    list(grid.pull_messages(grid.push_messages([Message(RecordDict(), 1, "train")])))
