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
    *,
    in_one_pass: int,
) -> bool:
    """Whether a patient's gradient is the same in other places and other company.

    Every second patient runs again, each in a place ``shift`` further on, with strangers in
    between; over four shifts in a row all patients do, in even and in odd places. Where several
    passes run at a time, the first one also runs alone, as a step's last may.

    Args:
        gradients_of: Patients of whole passes to their gradients, one row for each.
        patients: As many as passes that run at a time have places. Public.
        strangers: Who else may come, in turn: nobody (a filled place), zeros, what is not finite.
        shifts: Once all these passes for each, after the first time.
        in_one_pass: Patients.

    Returns:
        Whether every row was equal, bit for bit, NaN equal to NaN.
    """
    count = len(patients)
    company = itertools.cycle(strangers)
    expected_PD = gradients_of(patients).clone()
    if in_one_pass < count and not _same(
        gradients_of(patients[:in_one_pass]), expected_PD[:in_one_pass]
    ):
        return False
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
