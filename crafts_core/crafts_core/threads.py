"""How a processor's cores work together.

Threads that share a small tensor wait for each other many times in a step. Where other programs
keep the cores busy, each wait lasts until the scheduler comes round again. So work that falls into
parts is done side by side, a part to a thread (``side_by_side``); for the rest one thread alone may
be done sooner, which is measured (``quickest_threads``): where cores are two halves of one, it is
not much later even on a quiet machine.
"""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Protocol, TypeVar

import torch
from torch import nn

Item = TypeVar("Item")
Result = TypeVar("Result")

_ROUNDS = 4
_ROWS, _CHANNELS, _SIZE = 8, 64, 16


class Map(Protocol):
    """``map`` of one iterable, and what does the same in another way."""

    def __call__(
        self, call: Callable[[Item], Result], items: Iterable[Item], /
    ) -> Iterator[Result]:
        """The results in the order of the items."""


@contextmanager
def side_by_side(num_calls: int) -> Iterator[Map]:
    """A ``map`` that makes so many calls at a time, each on one of torch's threads.

    Who works on parts of their own waits for the others once, at the end of a turn. The calls share
    the process: each must leave alone what another one reads. What a call computes does not depend
    on how many are made: sums are rounded otherwise on more threads, and each has one.

    Args:
        num_calls: At a time; one is made where the caller is, on all of torch's threads.
    """
    if num_calls == 1:
        yield map
        return
    most = torch.get_num_threads()
    torch.set_num_threads(1)
    # Each thread has a number of its own for some of torch's libraries.
    pool = ThreadPoolExecutor(num_calls, initializer=torch.set_num_threads, initargs=(1,))

    def in_turns(call: Callable[[Item], Result], items: Iterable[Item], /) -> Iterator[Result]:
        left = iter(items)
        while turn := list(itertools.islice(left, num_calls)):
            yield from pool.map(call, turn)

    try:
        with pool:
            yield in_turns
    finally:
        torch.set_num_threads(most)


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
