"""What ``crafts-client join`` says of a round: little in its log, more at the owner's terminal.

A log may be read elsewhere, and each of its lines carries a time. So nothing is logged at a moment
that a patient decides: one line as training begins, the next when the answer leaves. How fast the
steps go, and when they are done, tells roughly how many patients were drawn: a bar shows it on the
terminal that somebody sits at, and it is written nowhere else.
"""

import contextlib
import logging
import sys
from collections.abc import Iterator
from datetime import datetime, timedelta

from rich.progress import Progress, TaskID

from crafts_core.command_line import bars_on_stderr
from crafts_core.harmless import MOST_OF_A_SENTENCE, harmless

log = logging.getLogger(__name__)


class RoundNews:
    """Of one round after the other. Without bars there is the log and nothing else."""

    def __init__(self, bars: Progress | None = None) -> None:
        self._bars = bars
        self._task: TaskID | None = None
        self._round = self._leaves = ""
        self._num_steps = 0

    @contextlib.contextmanager
    def of(self, round_words: str, num_steps: int) -> Iterator[None]:
        """Tell of a round as long as the block lasts; ``round_words`` may hold a peer's text."""
        self._round, self._num_steps = harmless(round_words, most=MOST_OF_A_SENTENCE), num_steps
        self._show("checking and timing public steps", 0)
        try:
            yield
        finally:
            self._hide()

    def began(self, every_s: float) -> None:
        """Just before the first draw: the answer waits so many seconds; 0, until it is ready."""
        at = datetime.now().astimezone() + timedelta(seconds=every_s)
        self._leaves = f"{at:%Y-%m-%d %H:%M:%S %Z}" if every_s else "as soon as it is ready"
        log.info(
            "%s began, %d steps; its answer leaves %s", self._round, self._num_steps, self._leaves
        )
        self._show("training", 0)

    def stepped(self, done: int) -> None:
        """After each step. For the terminal alone."""
        is_over = done == self._num_steps
        self._show(f"done, leaves {self._leaves}" if is_over else "training", done)

    def _show(self, what: str, done: int) -> None:
        """A terminal that went away ends the bar, never a round."""
        if self._bars is None:
            return
        told = f"{self._round}: {what}"
        try:
            if self._task is None:
                self._task = self._bars.add_task(told, total=self._num_steps)
            self._bars.update(self._task, description=told, completed=done)
        except OSError:
            self._bars = None

    def _hide(self) -> None:
        if self._bars is not None and self._task is not None:
            self._bars.remove_task(self._task)
        self._task = None


@contextlib.contextmanager
def news_at_terminal() -> Iterator[RoundNews]:
    """With a bar on stderr if a person sits there; what is logged meanwhile goes above it."""
    if not sys.stderr.isatty():  # not rich's own answer: variables can make it one of yes
        yield RoundNews()
        return
    with bars_on_stderr() as bars:
        yield RoundNews(bars)
