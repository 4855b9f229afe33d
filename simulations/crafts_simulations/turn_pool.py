"""Sites' turns on several processes, with the replies in the order in which they were asked for.

A site stays with the process that had its first turn, as what it holds between two messages of a
round is in that process's memory. A process that dies is started anew and its turn is run again:
whether anything is charged again is for the site's own ledger, as after any crash. Processes work
ahead of the reply that is waited for by a bounded number of turns, so that replies in memory do
not grow with sites.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, Self

from flwr.app import Message

from crafts_simulations.errors import ProcessError

MAX_TRIES = 3
"""Of one turn: systems end processes for reasons of their own, too."""
_AHEAD = 2
"""Turns for each process that have begun and whose reply nobody has taken."""


@dataclass(frozen=True, slots=True)
class Died:
    """A process is no more; its turn is not answered."""

    how: str


class Crew(Protocol):
    """Processes in numbered places, each of which runs one turn at a time."""

    def begin(self, place: int, site: str, message: Message) -> None:
        """Hand a turn to a place. Where no process is, or one that has died, one is started."""
        ...

    def listen(self, places: Collection[int]) -> Sequence[tuple[int, Message | Died]]:
        """Wait until at least one of these places has answered, or its process died.

        Raises:
            ProcessError: a process says that it cannot work.
        """
        ...

    def close(self) -> None:
        """End all processes, whatever they do."""
        ...


@dataclass(slots=True)
class _Turn:
    site: str
    message: Message
    tries: int = 0


class TurnPool:
    """Turns at the places of a crew, see ``local_grid.Turns``; a context manager."""

    def __init__(
        self,
        crew: Crew,
        sites: Sequence[str],
        *,
        num_places: int,
        on_turn: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Prepare; processes start with the first turns.

        Args:
            crew: What the processes are. Leaving the block ends them.
            sites: Names.
            num_places: Turns at a time.
            on_turn: Called with a site's name before it works.
        """
        self.sites = tuple(sites)
        self._crew = crew
        self._places = range(num_places)
        self._on_turn = on_turn
        self._place_of: dict[str, int] = {}
        """Where a site has its turns."""
        self._num_asked = 0
        self._asked: dict[int, _Turn] = {}
        """By number: turns whose reply nobody has taken."""
        self._busy: dict[int, int] = {}
        """Place to the number of the turn that it runs."""
        self._replies: dict[int, Message] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._crew.close()

    def begin(self, site: str, message: Message) -> Callable[[], Message]:
        """See ``local_grid.Turns``."""
        number, self._num_asked = self._num_asked, self._num_asked + 1
        self._asked[number] = _Turn(site, message)
        self._hand_out()
        return partial(self._take, number)

    def _take(self, number: int) -> Message:
        """Wait for a reply.

        Raises:
            ProcessError: its process died too often, or cannot work.
        """
        while number not in self._replies:
            self._hand_out(wanted=number)
            for place, said in self._crew.listen(list(self._busy)):
                self._hear(place, said)
        del self._asked[number]
        reply = self._replies.pop(number)
        self._hand_out()  # others work on while the coordinator looks at this one
        return reply

    def _hand_out(self, wanted: int | None = None) -> None:
        """Begin turns in the order asked for, as far as places are free and memory allows."""
        begun = {*self._busy.values(), *self._replies}
        for number, turn in self._asked.items():
            has_room = len(begun) < _AHEAD * len(self._places) or number == wanted
            if number in begun or not has_room:
                continue
            place = self._free_place(turn.site)
            if place is not None:
                self._place_of[turn.site] = place
                self._busy[place] = number
                begun.add(number)
                turn.tries += 1
                self._on_turn(turn.site)
                self._crew.begin(place, turn.site, turn.message)

    def _free_place(self, site: str) -> int | None:
        own = self._place_of.get(site)
        places = self._places if own is None else (own,)
        return next((place for place in places if place not in self._busy), None)

    def _hear(self, place: int, said: Message | Died) -> None:
        number = self._busy.pop(place)
        if isinstance(said, Message):
            self._replies[number] = said
            return
        turn = self._asked[number]
        if turn.tries >= MAX_TRIES:
            raise ProcessError(
                f"the process that works for {turn.site} ended {turn.tries} times in one turn "
                f"({said.how}), perhaps for want of memory; committed rounds are kept: run the "
                "same command again with fewer --workers"
            )
