"""How long work tells how far it is."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""What is being done, how much of it is done, and how much there is.

What follows a comma in the first is news of the same work.
"""


def silent(_what: str, _done: int, _total: int) -> None:
    """Where nobody is told."""
