"""What can be wrong with what a site wants to ingest."""

from collections.abc import Sequence

from crafts_core.errors import CraftsError

MAX_LINES = 50


class IngestError(CraftsError):
    """Something that the site's operator must mend before ingest can run.

    The message has one line per problem, so that all can be mended at once. It may name files and
    lines of the site's table: it is for the operator, never for a log or a peer.
    """

    def __init__(self, *problems: str) -> None:
        self.problems = problems
        super().__init__("\n".join(_shortened(problems)))


class SlideError(CraftsError):
    """One slide cannot be used; the run goes on without it. The message is the public reason."""


def _shortened(problems: Sequence[str]) -> list[str]:
    lines = [" ".join(problem.split()) for problem in problems[:MAX_LINES]]
    if len(problems) > MAX_LINES:
        lines.append(f"... and {len(problems) - MAX_LINES} more")
    return lines
