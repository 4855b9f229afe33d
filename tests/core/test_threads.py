"""The number of threads follows what a step takes, and is put back."""

import time

import pytest
import torch

from crafts_core import threads
from crafts_core.threads import quickest_threads


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
