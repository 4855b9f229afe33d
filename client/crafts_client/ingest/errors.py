"""What can be wrong with what a site wants to ingest."""

from collections.abc import Iterable, Sequence
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
        super().__init__("\n".join(_shortened(problems)))

    @classmethod
    def at_lines(cls, problems: Iterable[Problem]) -> Self:
        """What is wrong with a table, in the order of its lines."""
        ordered = sorted(problems, key=lambda problem: problem[0])
        return cls(*(f"line {line}: {told}" for line, told in ordered))


class SlideError(CraftsError):
    """One slide cannot be used; the run goes on without it. The message is the public reason."""


def _shortened(problems: Sequence[str]) -> list[str]:
    lines = [" ".join(problem.split()) for problem in problems[:MAX_LINES]]
    if len(problems) > MAX_LINES:
        lines.append(f"... and {len(problems) - MAX_LINES} more")
    return lines
