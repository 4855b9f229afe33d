"""Numbers and announcements of sums, across restarts."""

from pathlib import Path

import pytest

from crafts_core.exchange import Announcement
from crafts_server.attempts import Attempts, PastSum, unreliable
from support.studies import RUN_ID, small_study
from support.summing_sites import summed_plan
from support.sums import announcement_of, sum_sites

SITES = sum_sites(4)
NAMES = list(SITES)
FIRST = announcement_of(SITES, NAMES[:2])
SECOND = announcement_of(SITES, NAMES[2:])


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


def attempts_of(home: Path) -> Attempts:
    """As another process finds them."""
    return Attempts(small_study(home, plan=summed_plan()).registry, RUN_ID)


def test_a_number_is_taken_from_when_it_is_given(home: Path) -> None:
    assert [attempts_of(home).begin(3) for _ in range(3)] == [1, 2, 3]
    assert attempts_of(home).begin(4) == 1


def test_what_was_announced_is_asked_for_again_until_it_is_void(home: Path) -> None:
    number = attempts_of(home).begin(1)
    assert attempts_of(home).under_way(1) is None, "nobody was told"
    attempts_of(home).announce(1, number, [FIRST, SECOND])
    found = attempts_of(home).under_way(1)
    assert found is not None
    assert (found.attempt, found.announcements) == (1, (FIRST, SECOND))
    attempts_of(home).note(1, number, [[], NAMES[2:3]], void=False)
    assert attempts_of(home).under_way(1) is not None, "its sum may be lost before it is committed"
    attempts_of(home).note(1, number, [NAMES[:1], NAMES[2:3]], void=True)
    assert attempts_of(home).under_way(1) is None


def test_an_attempt_that_another_followed_is_over(home: Path) -> None:
    number = attempts_of(home).begin(1)
    attempts_of(home).announce(1, number, [FIRST])
    attempts_of(home).begin(1)
    assert attempts_of(home).under_way(1) is None


def test_one_number_is_announced_once(home: Path) -> None:
    number = attempts_of(home).begin(1)
    attempts_of(home).announce(1, number, [FIRST])
    with pytest.raises(Exception, match="registry"):
        attempts_of(home).announce(1, number, [SECOND])
    found = attempts_of(home).under_way(1)
    assert found is not None
    assert found.announcements == (FIRST,)


def test_past_sums_say_who_was_missing(home: Path) -> None:
    attempts = attempts_of(home)
    for number, missing in ((1, [NAMES[1]]), (2, [])):
        attempts.announce(number, attempts.begin(number), [FIRST])
        attempts.note(number, 1, [missing], void=bool(missing))
    assert attempts.past() == [
        PastSum(round=1, members=frozenset(NAMES[:2]), missing=frozenset([NAMES[1]])),
        PastSum(round=2, members=frozenset(NAMES[:2]), missing=frozenset()),
    ]


def past(*rounds: tuple[int, str]) -> list[PastSum]:
    """Sums of a, b and c; each round with who was missing."""
    return [
        PastSum(round=number, members=frozenset("abc"), missing=frozenset(missing))
        for number, missing in rounds
    ]


def test_two_misses_in_a_row_leave_a_site_out_for_eight_rounds() -> None:
    history = past((1, "a"), (1, "ab"))
    assert unreliable(history, 1) == {"a"}
    assert unreliable(history, 9) == {"a"}
    assert unreliable(history, 10) == frozenset()


def test_a_delivery_in_between_starts_the_count_anew() -> None:
    assert unreliable(past((1, "a"), (2, ""), (3, "a")), 4) == frozenset()


def test_who_comes_back_and_fails_again_is_out_at_once() -> None:
    assert unreliable(past((1, "a"), (1, "a"), (10, "a")), 11) == {"a"}


def test_an_announcement_is_kept_word_for_word(home: Path) -> None:
    """Members compare every byte of it."""
    number = attempts_of(home).begin(1)
    attempts_of(home).announce(1, number, [FIRST])
    found = attempts_of(home).under_way(1)
    assert found is not None
    assert found.announcements[0].to_json() == FIRST.to_json()
    assert Announcement.parse(FIRST.to_json()) == FIRST
