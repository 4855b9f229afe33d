"""A disk that takes nothing for a while: the kernel refuses every write of this process."""

import resource
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager


@contextmanager
def full_disk() -> Iterator[None]:
    """No write to a file succeeds in the block."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def fill_disk(for_s: float) -> threading.Timer:
    """The same from now on, for a while; join what comes back."""
    stack = ExitStack()
    stack.enter_context(full_disk())
    timer = threading.Timer(for_s, stack.close)
    timer.start()
    return timer
