"""A delta is never shown smaller than it is."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crafts_core.delta_text import delta_text, delta_times_patients


@pytest.mark.parametrize(
    ("delta", "text"),
    [
        (1e-3, "0.001"),
        (1.49e-4, "0.000149"),
        (0.00014901, "0.00015"),
        (1 / 4000, "0.00025"),
        (1 / 3000, "0.000334"),
        (0.00099999, "0.001"),
        (1e-7, "0.0000001"),
    ],
)
def test_delta_is_written_in_three_digits_rounded_up(delta: float, text: str) -> None:
    assert delta_text(delta) == text


@given(st.floats(1e-12, 1e-2))
def test_no_delta_is_ever_shown_smaller_nor_a_hundredth_larger(delta: float) -> None:
    assert delta <= float(delta_text(delta)) <= delta * 1.01


@given(st.floats(1e-12, 1e-2), st.integers(1, 10**6))
def test_patients_without_a_promise_are_never_told_too_few(delta: float, patients: int) -> None:
    assert delta * patients * (1 - 1e-15) <= delta_times_patients(delta, patients)


def test_patients_without_a_promise_in_expectation() -> None:
    assert delta_times_patients(1e-3, 120) == 0.12
    assert delta_times_patients(1.49e-4, 4000) == 0.596
