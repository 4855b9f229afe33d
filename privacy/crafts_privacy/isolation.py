"""Do patients who share a backward pass leave each other's gradients alone, to the last bit?

Clipping bounds what one patient adds to a sum *given* everybody else's gradients. In a shared pass
the others' gradients are computed beside the patient's, so the bound holds only if they are what
they would have been without. In exact arithmetic they are, where no layer mixes tiles; in floating
point they are if a processor adds the same numbers in the same order whoever shares the pass. With
one shape for every pass (``GroupGradients``) it does, on what has been measured; no document of a
processor's library promises it, so it is looked at, on public patients, before it is relied on.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from torch import Tensor

Patient = TypeVar("Patient")


def is_isolated(
    gradients_of: Callable[[Sequence[Patient]], Tensor],
    patients: Sequence[Patient],
    strangers: Sequence[Patient],
    shifts: Iterable[int],
) -> bool:
    """Whether a patient's gradient is the same in other places and other company.

    Every second patient of one pass runs again, each in a place ``shift`` further on, with
    strangers in between; over four shifts in a row all patients do, in even and in odd places.

    Args:
        gradients_of: The patients of one pass to their gradients, one row for each.
        patients: As many as a pass has places. Public.
        strangers: Who else may come, in turn: nobody (a filled place), zeros, what is not finite.
        shifts: One pass for each, after the first.

    Returns:
        Whether every row was equal, bit for bit, NaN equal to NaN.
    """
    count = len(patients)
    company = itertools.cycle(strangers)
    expected_PD = gradients_of(patients).clone()
    for shift in shifts:
        stays = [(index + shift // 2) % 2 == 0 for index in range(count)]
        some = [
            patient if is_kept else next(company)
            for patient, is_kept in zip(patients, stays, strict=True)
        ]
        turned = [some[(place - shift) % count] for place in range(count)]
        found_PD = gradients_of(turned)
        for index in (index for index in range(count) if stays[index]):
            if not _same(found_PD[(index + shift) % count], expected_PD[index]):
                return False
    return True


def _same(found_D: Tensor, expected_D: Tensor) -> bool:
    return bool(((found_D == expected_D) | (found_D.isnan() & expected_D.isnan())).all())
