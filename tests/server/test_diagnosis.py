"""Looking for the one site that spoils sums, on receipts that nobody wrote."""

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crafts_server.diagnosis import Suspicion, parts_of, suspicion
from crafts_server.receipts import SumReceipt

SITES = [f"site-{number:02d}" for number in range(1, 31)]


def told(members: list[str], *, good: bool | None) -> SumReceipt:
    norm = None if good is None else 1.0 if good else 9.0
    return SumReceipt(
        attempt=1,
        members=tuple(sorted(members)),
        missing=() if norm else (members[0],),
        noise_multiplier=1.0,
        norm=norm,
        lowest=0.5,
        highest=2.0,
    )


def search(
    num_sites: int, bad: str, *, smallest: int, diagnose_after: int = 2
) -> tuple[Suspicion, int]:
    """Until somebody is found: the end, and the rounds since the search began."""
    rounds: list[list[SumReceipt]] = []
    for _ in range(40):
        state = suspicion(rounds, diagnose_after=diagnose_after)
        if state.found:
            return state, len(rounds) - diagnose_after
        parts = parts_of(SITES[:num_sites], state.suspects, smallest=smallest)
        rounds.append([told(part, good=bad not in part) for part in parts])
    raise AssertionError("nobody was found")


@pytest.mark.parametrize("num_sites", [6, 8, 11, 30])
def test_halves_name_the_bad_site_in_about_log_n_steps(num_sites: int) -> None:
    for bad in SITES[:num_sites]:
        state, steps = search(num_sites, bad, smallest=3)
        assert state.found == {bad}
        assert steps <= math.log2(num_sites) + 2


def test_too_few_for_halves_leave_one_suspect_out_at_a_time() -> None:
    for bad in SITES[:5]:
        state, steps = search(5, bad, smallest=3)
        assert state.found == {bad}
        assert steps <= 5


def test_nobody_is_looked_for_without_the_plans_word() -> None:
    rounds = [[told(SITES[:4], good=False)]] * 9
    assert suspicion(rounds, diagnose_after=0) == Suspicion()


def test_a_good_step_in_between_ends_the_count() -> None:
    bad, good = [told(SITES[:4], good=False)], [told(SITES[:4], good=True)]
    assert suspicion([bad, good, bad], diagnose_after=2) == Suspicion()
    assert suspicion([bad, good, bad, bad], diagnose_after=2).suspects == set(SITES[:4])


def test_a_sum_that_nobody_could_read_says_nothing() -> None:
    bad, void = told(SITES[:4], good=False), told(SITES[:4], good=None)
    assert suspicion([[void, bad]], diagnose_after=1).suspects == set(SITES[:4])
    assert suspicion([[void]], diagnose_after=1) == Suspicion()


def test_two_bad_sites_in_two_halves_are_both_found_once_they_stand_alone() -> None:
    everybody = [told(SITES[:8], good=False)]
    first = [told(SITES[:4], good=False), told(SITES[4:8], good=False)]
    second = [told([*SITES[1:4], SITES[7]], good=True), told([SITES[0], *SITES[4:7]], good=False)]
    third = [
        told([SITES[0], *SITES[1:4]], good=False),
        told([*SITES[4:6], SITES[7], SITES[6]], good=False),
    ]
    state = suspicion([everybody, first, second, third], diagnose_after=1)
    assert state.found == {SITES[0]}


@given(
    num_members=st.integers(3, 30),
    num_suspects=st.integers(0, 30),
    smallest=st.integers(3, 12),
    seed=st.randoms(use_true_random=False),
)
def test_sets_are_disjoint_large_enough_and_split_the_suspects(
    num_members: int, num_suspects: int, smallest: int, seed: object
) -> None:
    members = SITES[:num_members]
    suspects = frozenset(SITES[:num_suspects]) & frozenset(members)
    shuffle: Callable[[object], None] = seed.shuffle  # type: ignore[attr-defined]
    parts = parts_of(members, suspects, smallest=smallest, shuffle=shuffle)
    chosen = [site for part in parts for site in part]
    assert len(chosen) == len(set(chosen))
    assert set(chosen) <= set(members)
    if num_members < smallest:
        assert parts == [members]
    else:
        assert all(len(part) >= smallest for part in parts)
    if suspects and num_members >= 2 * smallest:
        counts = [len(suspects & set(part)) for part in parts]
        assert max(counts) - min(counts) <= 1
        assert set(chosen) == set(members)
    if not suspects:
        assert parts == [members]
