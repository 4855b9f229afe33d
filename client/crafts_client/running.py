"""Whether a process is taking part with a home: there is one at most."""

from contextlib import AbstractContextManager

from crafts_client.errors import HomeError
from crafts_client.home import SiteHome
from crafts_core.durable import exclusive_lock

_A_LOOK_S = 0.5


def is_running(home: SiteHome) -> bool:
    """Whether a process is taking part with this home now."""
    try:
        with _held(home, timeout_s=0.0):
            return False
    except HomeError:
        return True


def the_only_one(home: SiteHome) -> AbstractContextManager[None]:
    """Hold the home; a second process is told that there is a first.

    Whoever looks, as pages do all the time, holds it for a moment: that is waited for.
    """
    return _held(home, timeout_s=_A_LOOK_S)


def _held(home: SiteHome, *, timeout_s: float) -> AbstractContextManager[None]:
    held = HomeError(f"another crafts-client join is running in {home.path}")
    return exclusive_lock(home.path / "join.lock", held=held, timeout_s=timeout_s)
