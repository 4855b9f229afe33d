"""Order, places, bounds and second tries of turns, with processes that a test plays."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from crafts_simulations.errors import ProcessError
from crafts_simulations.local_grid import LocalGrid
from crafts_simulations.turn_pool import MAX_TRIES, Died, TurnPool


@dataclass
class PlayedCrew:
    """Places that answer, or die, in the order in which ``chosen`` picks among the busy ones."""

    chosen: Callable[[Collection[int]], int] = min
    dies: Callable[[str, int], bool] = lambda _site, _try: False
    """Whether a site's turn ends its process, by the number of its try."""
    begun: list[tuple[int, str]] = field(default_factory=list)
    at_work: dict[int, tuple[str, Message]] = field(default_factory=dict)
    is_closed: bool = False

    def begin(self, place: int, site: str, message: Message) -> None:
        assert place not in self.at_work
        self.begun.append((place, site))
        self.at_work[place] = (site, message)

    def listen(self, places: Collection[int]) -> Sequence[tuple[int, Message | Died]]:
        assert set(places) == self.at_work.keys()
        place = self.chosen(places)
        site, message = self.at_work.pop(place)
        tries = sum(1 for _, begun in self.begun if begun == site)
        if self.dies(site, tries):
            return [(place, Died("SIGKILL"))]
        return [(place, Message(message.content, reply_to=message))]

    def close(self) -> None:
        self.is_closed = True


def asked(grid: LocalGrid) -> list[str]:
    """One message to each site; their ids."""
    return [
        next(
            iter(
                grid.push_messages(
                    [Message(RecordDict({"n": ConfigRecord({"to": n})}), n, "train")]
                )
            )
        )
        for n in grid.get_node_ids()
    ]


def answered(grid: LocalGrid, ids: list[str]) -> list[int]:
    return [int(reply.content["n"]["to"]) for reply in grid.pull_messages(ids)]  # type: ignore[index]


def names(count: int) -> list[str]:
    return [f"site-{number:02d}" for number in range(1, count + 1)]


@pytest.mark.parametrize("chosen", [min, max])
def test_replies_come_in_the_order_asked_for_whoever_is_first(
    chosen: Callable[[Collection[int]], int],
) -> None:
    crew = PlayedCrew(chosen)
    with TurnPool(crew, names(7), num_places=3) as pool:
        grid = LocalGrid(pool)
        assert answered(grid, asked(grid)) == [1, 2, 3, 4, 5, 6, 7]
    assert sorted(site for _, site in crew.begun) == names(7)
    assert crew.is_closed


def test_turns_begin_before_anybody_waits_and_no_more_than_there_are_places() -> None:
    crew = PlayedCrew()
    with TurnPool(crew, names(5), num_places=2) as pool:
        asked(LocalGrid(pool))
    assert crew.begun == [(0, "site-01"), (1, "site-02")]


def test_nobody_runs_far_ahead_of_the_reply_that_is_waited_for() -> None:
    """The first site is slow; the other places would otherwise answer for all the rest."""
    crew = PlayedCrew(chosen=max)
    with TurnPool(crew, names(40), num_places=3) as pool:
        grid = LocalGrid(pool)
        ids = asked(grid)
        (first,) = answered(grid, ids[:1])
        assert first == 1
        assert len(crew.begun) <= 2 * 3 + 1
        assert answered(grid, ids[1:]) == list(range(2, 41))


def test_a_site_has_its_turns_where_it_had_the_first() -> None:
    crew = PlayedCrew(chosen=max)
    with TurnPool(crew, names(6), num_places=2) as pool:
        grid = LocalGrid(pool)
        for _ in range(3):
            answered(grid, asked(grid))
    places = {site: {place for place, begun in crew.begun if begun == site} for site in names(6)}
    assert all(len(found) == 1 for found in places.values())
    assert {place for found in places.values() for place in found} == {0, 1}


def test_the_turn_of_a_process_that_died_is_run_again_and_keeps_its_place_in_line() -> None:
    crew = PlayedCrew(dies=lambda site, tries: site == "site-02" and tries < MAX_TRIES)
    with TurnPool(crew, names(4), num_places=2) as pool:
        grid = LocalGrid(pool)
        assert answered(grid, asked(grid)) == [1, 2, 3, 4]
    assert [site for _, site in crew.begun].count("site-02") == MAX_TRIES


def test_a_site_whose_process_always_dies_is_one_line() -> None:
    crew = PlayedCrew(dies=lambda site, _: site == "site-03")
    with TurnPool(crew, names(4), num_places=2) as pool:
        grid = LocalGrid(pool)
        with pytest.raises(ProcessError) as refused:
            answered(grid, asked(grid))
    (line,) = str(refused.value).splitlines()
    assert "site-03 ended 3 times in one turn (SIGKILL)" in line
    assert crew.is_closed


def test_every_try_is_told_before_it_works() -> None:
    told: list[str] = []
    crew = PlayedCrew(dies=lambda site, tries: tries == 1)
    with TurnPool(crew, ["a"], num_places=1, on_turn=told.append) as pool:
        grid = LocalGrid(pool)
        answered(grid, asked(grid))
    assert told == ["a", "a"]
