"""What the rows of a table must be together: one slide once, one patient, one cohort.

Patients are what privacy is promised to. A slide listed for two of them, or a patient written in
two ways, would count one person twice and break the promise without a sign.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from crafts_client.ingest.deidentify import plain_name
from crafts_client.ingest.errors import Problem
from crafts_client.ingest.named_files import composed
from crafts_client.ingest.patient_names import (
    EXACT_DIGITS,
    is_long_number,
    is_rounded,
    likeness,
)


class CheckedRow(Protocol):
    """What is compared between rows."""

    @property
    def line(self) -> int: ...
    @property
    def name(self) -> str: ...
    @property
    def target(self) -> Path: ...
    @property
    def patient(self) -> str: ...
    @property
    def case(self) -> str: ...


def problems_between(
    rows: Sequence[CheckedRow], cohorts: Mapping[int, str], *, cohort: str | None
) -> list[Problem]:
    """Everything that is wrong between rows, each with the line it is told at.

    Args:
        rows: As read; empty cells are told elsewhere and not compared.
        cohorts: The cohort of each line that names one.
        cohort: The only one that is allowed; None allows any, but one only.
    """
    return [
        *_twice([row for row in rows if row.name]),
        *_nested([row for row in rows if row.name]),
        *_spellings([row for row in rows if row.patient]),
        *_likenesses([row for row in rows if row.patient]),
        *_rounded([row for row in rows if row.patient]),
        *_shared_cases([row for row in rows if row.patient and row.case]),
        *_other_cohorts(rows, cohorts, cohort),
    ]


def _twice(rows: Sequence[CheckedRow]) -> Iterator[Problem]:
    first: dict[str, CheckedRow] = {}
    for row in rows:
        before = first.setdefault(composed(str(row.target)).casefold(), row)
        if before is row:
            continue
        if before.target != row.target:
            is_form = row.name == before.name
            how = "the form of its letters in Unicode" if is_form else "capitals"
            told = (
                f"file {row.name} differs only in {how} from {before.name} on line "
                f"{before.line}; if they are two, rename one"
            )
            yield row.line, told
        else:
            whose = ", for another patient" if before.patient != row.patient else ""
            yield row.line, f"file {row.name} is listed before, on line {before.line}{whose}"


def _nested(rows: Sequence[CheckedRow]) -> Iterator[Problem]:
    """A folder is one slide: no other row may be a part of it."""
    listed = {row.target: row for row in rows}
    for row in rows:
        for folder in row.target.parents:
            if folder in listed:
                told = (
                    f"file {row.name} lies inside {listed[folder].name}, which is listed as a "
                    f"slide on line {listed[folder].line}"
                )
                yield row.line, told


def _spellings(rows: Sequence[CheckedRow]) -> Iterator[Problem]:
    first: dict[str, CheckedRow] = {}
    for row in rows:
        before = first.setdefault(plain_name(row.patient), row)
        if before.patient != row.patient:
            told = (
                f"patient {row.patient} is written {before.patient} on line {before.line}; "
                "write one patient in one way, and tell two apart by more than capitals"
            )
            yield row.line, told


def _likenesses(rows: Sequence[CheckedRow]) -> Iterator[Problem]:
    """Once for each name that looks like one before it."""
    first: dict[str, CheckedRow] = {}
    told: set[str] = set()
    for row in rows:
        name = plain_name(row.patient)
        before = first.setdefault(likeness(row.patient), row)
        if plain_name(before.patient) != name and name not in told:
            told.add(name)
            yield row.line, look_alike(row.patient, f"{before.patient} on line {before.line}")


def look_alike(patient: str, other: str) -> str:
    """What to say of two names that may be one patient's; ``other`` with its place."""
    return (
        f"patient {patient} looks like {other}; write one patient in one way, and tell two apart "
        "by more than dashes, blanks, accents, zeros in front, .0 behind and signs that cannot be "
        "seen"
    )


def _rounded(rows: Sequence[CheckedRow]) -> Iterator[Problem]:
    """Where every long number ends in zeros, a spreadsheet has put them there."""
    long = [row for row in rows if is_long_number(row.patient)]
    if len({row.patient for row in long}) > 1 and all(is_rounded(row.patient) for row in long):
        told = (
            f"patient {long[0].patient}: all numbers of more than {EXACT_DIGITS} digits end in "
            "zeros, as a spreadsheet rounds them, so that several people may have one; format the "
            "column as text, enter it again, and export"
        )
        yield long[0].line, told


def _shared_cases(rows: Sequence[CheckedRow]) -> Iterator[Problem]:
    first: dict[str, CheckedRow] = {}
    for row in rows:
        before = first.setdefault(row.case, row)
        if plain_name(before.patient) != plain_name(row.patient):
            told = (
                f"case {row.case} belongs to patient {before.patient} on line {before.line}, "
                f"and to {row.patient} here"
            )
            yield row.line, told


def _other_cohorts(
    rows: Sequence[CheckedRow], cohorts: Mapping[int, str], cohort: str | None
) -> Iterator[Problem]:
    named = [row for row in rows if cohorts.get(row.line)]
    first_of: dict[str, CheckedRow] = {}
    for row in named:
        own, before = cohorts[row.line], first_of.setdefault(plain_name(row.patient), row)
        if row.patient and cohorts[before.line] != own:
            told = (
                f"patient {row.patient} is in cohort {own} here and in {cohorts[before.line]} "
                f"on line {before.line}; a patient belongs to one cohort"
            )
            yield row.line, told
        elif cohort is not None and own != cohort:
            yield row.line, f"belongs to cohort {own}; ingest it in that cohort's home"
        elif cohort is None and own != cohorts[named[0].line]:
            told = (
                f"belongs to cohort {own}, but line {named[0].line} to "
                f"{cohorts[named[0].line]}; one table for each cohort"
            )
            yield row.line, told
