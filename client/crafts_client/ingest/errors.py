"""What can be wrong with what a site wants to ingest."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Self

from crafts_core.errors import CraftsError

MAX_LINES = 50
Problem = tuple[int, str]
"""Line of the table, and what is wrong there."""
_AT_LINE = re.compile(r"line (\d+): (.*)", re.DOTALL)
_OF_A_FILE = re.compile(
    r"(?:(\w+ )?file )?.+?"
    r"(?= (?:does not exist below|may not be read|is a link|(?:would be|was) skipped))"
)
"""Where a problem names the file that has it: what is left is the same for all that have it."""
_NAMED_ONE_BY_ONE = 5
"""Files with one problem; of more of them some lines are named."""
_SHOWN_LINES = 4


class IngestError(CraftsError):
    """Something that the site's operator must mend before ingest can run.

    The message has one line per problem, so that all can be mended at once. It may name files and
    lines of the site's table: it is for the operator, never for a log or a peer.
    """

    def __init__(self, *problems: str) -> None:
        self.problems = problems
        self._all_in = ""
        super().__init__(*problems)

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def lines(self) -> list[str]:
        """One for each problem, equal ones together, up to ``MAX_LINES``."""
        lines = [" ".join(problem.split()) for problem in grouped(self.problems)]
        if len(lines) > MAX_LINES:
            return [*lines[:MAX_LINES], f"... and {len(lines) - MAX_LINES} more{self._all_in}"]
        if len(lines) < len(self.problems):
            lines.append(f"{len(self.problems)} problems in all{self._all_in}")
        return lines

    def point_to(self, page: Path) -> None:
        """Say where all problems can be read."""
        self._all_in = f"; {page} has them all"

    @classmethod
    def at_lines(cls, problems: Iterable[Problem]) -> Self:
        """What is wrong with a table, in the order of its lines."""
        ordered = sorted(problems, key=lambda problem: problem[0])
        return cls(*(f"line {line}: {told}" for line, told in ordered))


def grouped(problems: Sequence[str]) -> list[str]:
    """Problems as ``at_lines`` tells them, equal ones as one, in the order of their first lines.

    So a share that is not mounted is one thing to mend, not a page of files.
    """
    told = [_told(problem) for problem in problems]
    kinds = [_OF_A_FILE.sub(r"\1file", each, count=1) for each in told]
    many = {kind for kind, number in Counter(kinds).items() if number > _NAMED_ONE_BY_ONE}
    groups: dict[str, list[str]] = {}
    for kind, each, problem in zip(kinds, told, problems, strict=True):
        key = problem if each == problem else f"line: {kind if kind in many else each}"
        groups.setdefault(key, []).append(problem)
    return [_of_group(group) for group in groups.values()]


def _told(problem: str) -> str:
    """Without the line of the table, where it is of one."""
    found = _AT_LINE.fullmatch(problem)
    return problem if found is None else found[2]


def _of_group(problems: Sequence[str]) -> str:
    """One line for problems of one kind."""
    numbers = [found[1] for found in map(_AT_LINE.fullmatch, problems) if found is not None]
    if len(numbers) < 2:
        return problems[0]
    shown, more = ", ".join(numbers[:_SHOWN_LINES]), len(numbers) - _SHOWN_LINES
    lines = f"lines {shown} and {more} more" if more > 0 else f"lines {shown}"
    others = "" if len(set(map(_told, problems))) == 1 else "; the others likewise"
    return f"{lines}: {_told(problems[0])}{others}"


class SlideError(CraftsError):
    """One slide cannot be used; the run goes on without it. The message is the public reason."""
