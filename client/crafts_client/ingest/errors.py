"""What can be wrong with what a site wants to ingest."""

from collections.abc import Iterable
from pathlib import Path
from typing import Self

from crafts_core.errors import CraftsError

MAX_LINES = 50
Problem = tuple[int, str]
"""Line of the table, and what is wrong there."""


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
        """One for each problem, up to ``MAX_LINES``."""
        lines = [" ".join(problem.split()) for problem in self.problems[:MAX_LINES]]
        if len(self.problems) > MAX_LINES:
            lines.append(f"... and {len(self.problems) - MAX_LINES} more{self._all_in}")
        return lines

    def point_to(self, page: Path) -> None:
        """Say where all problems can be read."""
        self._all_in = f"; {page} has them all"

    @classmethod
    def at_lines(cls, problems: Iterable[Problem]) -> Self:
        """What is wrong with a table, in the order of its lines."""
        ordered = sorted(problems, key=lambda problem: problem[0])
        return cls(*(f"line {line}: {told}" for line, told in ordered))


class SlideError(CraftsError):
    """One slide cannot be used; the run goes on without it. The message is the public reason."""
