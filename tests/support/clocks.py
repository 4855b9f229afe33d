"""Time that passes only where a test says so."""

from collections.abc import Callable

from crafts_client.answer_times import Clock


class ManualClock:
    """Starts at zero; work and sleep move it on, and nothing else does."""

    def __init__(self, on_sleep: Callable[[], None] = lambda: None) -> None:
        self.now_s = 0.0
        self.slept: list[float] = []
        self._on_sleep = on_sleep

    @property
    def clock(self) -> Clock:
        return Clock(now=lambda: self.now_s, sleep=self._sleep)

    def work(self, seconds: float) -> None:
        self.now_s += seconds

    def _sleep(self, seconds: float) -> None:
        assert seconds >= 0
        self._on_sleep()
        self.slept.append(seconds)
        self.now_s += seconds
