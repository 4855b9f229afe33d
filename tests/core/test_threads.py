"""How many threads there are follows what is to be done, and is put back."""

import threading
import time

import pytest
import torch

from crafts_core import threads
from crafts_core.threads import quickest_threads, side_by_side


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("quickest", [1, 2])
def test_the_quickest_is_chosen_and_then_put_back(monkeypatch, quickest: int) -> None:
    def step() -> None:
        if torch.get_num_threads() != quickest:
            time.sleep(0.01)

    monkeypatch.setattr(threads, "_small_step", lambda: step)
    with quickest_threads() as chosen:
        assert chosen == torch.get_num_threads() == quickest
    assert torch.get_num_threads() == 2


def test_they_are_put_back_after_an_error_too(monkeypatch) -> None:
    monkeypatch.setattr(threads, "_small_step", lambda: lambda: None)
    with pytest.raises(KeyError), quickest_threads():
        raise KeyError
    assert torch.get_num_threads() == 2


def test_what_repeats_its_sums_on_one_thread_is_left_alone(monkeypatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(threads, "_small_step", pytest.fail)
    with quickest_threads() as chosen:
        assert chosen == 1


def test_the_step_that_is_timed_keeps_nothing() -> None:
    with torch.no_grad():
        threads._small_step()()
    with quickest_threads() as chosen:
        assert chosen in (1, 2)


def test_calls_run_side_by_side_on_one_thread_each_and_keep_their_order() -> None:
    together = threading.Barrier(2, timeout=10)

    def call(number: int) -> tuple[int, int]:
        together.wait()  # for ever, were one made after the other
        return number, torch.get_num_threads()

    with side_by_side(2) as run:
        assert list(run(call, range(6))) == [(number, 1) for number in range(6)]
        assert list(run(call, [])) == []
    assert torch.get_num_threads() == 2


def test_the_last_turn_may_be_smaller() -> None:
    with side_by_side(2) as run:
        assert list(run(abs, iter([-1, -2, -3]))) == [1, 2, 3]


def test_one_call_at_a_time_is_made_where_the_caller_is_on_all_threads() -> None:
    with side_by_side(1) as run:
        (found,) = run(lambda _: (threading.current_thread(), torch.get_num_threads()), [0])
    assert found == (threading.current_thread(), 2)


def test_an_error_of_one_call_is_the_callers_and_ends_the_rest() -> None:
    made = []

    def call(number: int) -> None:
        made.append(number)
        if number == 1:
            raise KeyError(number)

    with pytest.raises(KeyError, match="1"), side_by_side(2) as run:
        list(run(call, range(9)))
    assert sorted(made) == [0, 1]
    assert torch.get_num_threads() == 2


def test_each_of_few_calls_has_one_thread_of_many() -> None:
    torch.set_num_threads(7)
    with side_by_side(2) as run:
        assert list(run(lambda _: torch.get_num_threads(), range(4))) == [1] * 4
    assert torch.get_num_threads() == 7


def test_what_is_too_small_is_zero_in_every_call_as_where_it_was_asked_for() -> None:
    tiny = torch.full((64,), 1e-40)
    assert torch.set_flush_denormal(True)
    try:
        with side_by_side(2) as run:
            assert not any(run(lambda _: bool((tiny * 0.5).any()), range(4)))
    finally:
        torch.set_flush_denormal(False)
    assert (tiny * 0.5).any()
