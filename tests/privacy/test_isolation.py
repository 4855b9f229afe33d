"""The check that patients who share a pass leave each other alone: it must see who does not."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from crafts_privacy.isolation import is_isolated

PATIENTS = [torch.full((3,), float(number + 1)) for number in range(5)]
STRANGERS = [torch.zeros(3), torch.full((3,), torch.nan), torch.full((3,), 1e4)]
SHIFTS = (1, 2, 3, 4)


def alone(group: Sequence[Tensor]) -> Tensor:
    """Each by itself; what is not finite stays with whoever brought it."""
    return torch.stack([patient.square() + 1 / patient for patient in group])


def adding(change: Callable[[Tensor, Sequence[Tensor]], Tensor]) -> Callable[..., Tensor]:
    return lambda group: change(alone(group), group)


COUPLED = {
    "the last bit, by how many are not finite": adding(
        lambda rows, group: rows * (1 + 2**-23 * sum(bool(p.isnan().any()) for p in group))
    ),
    "the last bit, by place": adding(
        lambda rows, _: rows * (1 + 2**-23 * torch.arange(len(rows))[:, None])
    ),
    "only the first place": adding(lambda rows, _: torch.cat([rows[:1] * (1 + 2**-23), rows[1:]])),
    "only the last place": adding(lambda rows, _: torch.cat([rows[:-1], rows[-1:] * (1 + 2**-23)])),
    "a neighbour": adding(lambda rows, _: rows + 1e-7 * rows.roll(1, 0).nan_to_num()),
    "a batch's mean": adding(lambda rows, _: rows - rows.mean(0)),
    "nan spreads": adding(lambda rows, _: rows + 0 * rows.sum(0)),
}


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_who_minds_nobody_is_isolated(count: int) -> None:
    assert is_isolated(alone, PATIENTS[:count], STRANGERS, SHIFTS, in_one_pass=count)


@pytest.mark.parametrize("count", [2, 3, 4, 5])
@pytest.mark.parametrize("fault", COUPLED)
def test_who_minds_place_or_company_is_not(fault: str, count: int) -> None:
    assert not is_isolated(COUPLED[fault], PATIENTS[:count], STRANGERS, SHIFTS, in_one_pass=count)


def test_four_shifts_try_every_patient_in_even_and_odd_places() -> None:
    seen: set[tuple[int, int]] = set()

    def noting(group: Sequence[Tensor]) -> Tensor:
        seen.update((int(p[0]), place % 2) for place, p in enumerate(group) if 0 < p[0] < 9)
        return alone(group)

    is_isolated(noting, PATIENTS[:4], STRANGERS, SHIFTS, in_one_pass=4)
    assert seen == {(number, parity) for number in range(1, 5) for parity in (0, 1)}


def test_what_is_not_finite_is_equal_to_itself() -> None:
    """A hostile adapter's gradients may be NaN for everybody; they become zero one by one."""
    nothing = adding(lambda rows, _: rows * torch.nan)
    assert is_isolated(nothing, PATIENTS, STRANGERS, SHIFTS, in_one_pass=len(PATIENTS))


def test_a_pass_that_rounds_otherwise_alone_is_found() -> None:
    """A step's last turn may have fewer passes than run at a time."""

    def by_company(group: Sequence[Tensor]) -> Tensor:
        return alone(group) * (1 + 2**-23 * (len(group) > 2))

    assert not is_isolated(by_company, PATIENTS[:4], STRANGERS, SHIFTS, in_one_pass=2)
    assert is_isolated(by_company, PATIENTS[:4], STRANGERS, SHIFTS, in_one_pass=4)
