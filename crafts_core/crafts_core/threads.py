"""How many threads torch works with, chosen by measurement.

Threads that share a small tensor wait for each other many times in a step. Where other programs
keep the cores busy, each wait lasts until the scheduler comes round again, and one thread alone is
done sooner; where cores are two halves of one, it is not much later even on a quiet machine.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

_ROUNDS = 4
_ROWS, _CHANNELS, _SIZE = 8, 64, 16


@contextmanager
def quickest_threads() -> Iterator[int]:
    """Work with all the threads that torch has, or half of them, and so on to one: the quickest.

    Measured anew each time, on a few layers of the size that denoisers have: some 0.2 s on a quiet
    machine. Afterwards torch has as many threads as before. Sums are rounded in another order on
    another number of threads: what is to be repeated bit by bit sets one thread itself, and then
    nothing is measured.

    Yields:
        The number of threads.
    """
    most = torch.get_num_threads()
    if most == 1:
        yield most
        return
    step = _small_step()
    taken_s = {most >> halvings: 0.0 for halvings in range(most.bit_length())}
    for turn in range(_ROUNDS + 1):
        for threads in taken_s:
            torch.set_num_threads(threads)
            began = time.perf_counter()
            step()
            if turn:  # the first one starts the threads
                taken_s[threads] += time.perf_counter() - began
    chosen = min(taken_s, key=lambda threads: taken_s[threads])
    torch.set_num_threads(chosen)
    try:
        yield chosen
    finally:
        torch.set_num_threads(most)


def _small_step() -> Callable[[], None]:
    """Forward and backward of a few layers."""
    layers = nn.Sequential(
        *(
            module
            for _ in range(3)
            for module in (
                nn.Conv2d(_CHANNELS, _CHANNELS, 3, padding=1),
                nn.GroupNorm(8, _CHANNELS),
                nn.SiLU(),
            )
        )
    )
    rows = torch.zeros(_ROWS, _CHANNELS, _SIZE, _SIZE)

    def step() -> None:
        with torch.enable_grad():
            layers(rows).sum().backward()

    return step
