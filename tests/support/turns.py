"""What processes of a test answer turns with. Light, as every process imports it."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

from flwr.app import ConfigRecord, Message, RecordDict

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
