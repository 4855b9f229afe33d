"""What a process of ``process_crew`` does: it runs turns until nobody asks any more.

Nothing heavy is imported here. Libraries read how many threads they may start, and which GPU they
may see, when they are first imported, which is after ``serve`` has said so.
"""

import os
import signal
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing import connection, parent_process


@dataclass(frozen=True, slots=True)
class Ready:
    """The process has what it needs, and waits for turns."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The process cannot work, and why."""

    why: str


def serve(pipe: "connection.Connection", environment: Mapping[str, str]) -> None:
    """Make what answers, out of what comes first, and let it answer one turn after another."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one who waits for us
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.update(environment)
    try:
        try:
            answer = pipe.recv()()
            pipe.send(Ready())
            while True:
                pipe.send(answer(*pipe.recv()))
        except (EOFError, ConnectionError):
            pass  # nobody asks any more
        except Exception as error:
            pipe.send(Failed(f"{type(error).__name__}: {error}"))
    except OSError:
        pass


def _end_with_parent() -> None:
    """Nobody works on in a home whose simulation was killed: the next one would meet it there."""
    program = parent_process()
    assert program is not None
    connection.wait([program.sentinel])
    os._exit(1)
