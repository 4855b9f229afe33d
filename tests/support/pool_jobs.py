"""Jobs for the ingest pool, in a module of their own because its processes import them."""

import os
import re
import signal
import time
from pathlib import Path

from crafts_client.ingest.errors import SlideError
from crafts_client.ingest.pool import Beat


def behave(job: tuple[str, str], beat: Beat) -> str:
    """Do what the job says."""
    what, name = job
    if what == "die once" and not Path(name).exists():
        Path(name).touch()
        os.kill(os.getpid(), signal.SIGSEGV)
    if what == "die":
        os.kill(os.getpid(), signal.SIGSEGV)
    if what == "hang":
        time.sleep(600)
    if what == "hang for good":
        Path(name).write_text(str(os.getpid()))
        re.match("(a+)+$", "a" * 60 + "b")  # in C, and no other thread may run meanwhile
    if what == "slow":
        for _ in range(12):
            time.sleep(0.15)
            beat(1)
    if what == "refuse":
        raise SlideError(name)
    if what == "raise":
        raise OSError(28, "no space left on device")
    return f"{what} {name}"
