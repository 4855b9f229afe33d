"""Whether a process is taking part with a home: there is one at most."""

from contextlib import AbstractContextManager

from crafts_client.errors import HomeError
from crafts_client.home import SiteHome
from crafts_core.durable import exclusive_lock


def is_running(home: SiteHome) -> bool:
    """Whether a process is taking part with this home now."""
    try:
        with the_only_one(home):
            return False
    except HomeError:
        return True


def the_only_one(home: SiteHome) -> AbstractContextManager[None]:
    """Hold the home; a second process is told that there is a first."""
    held = HomeError(f"another crafts-client join is running in {home.path}")
    return exclusive_lock(home.path / "join.lock", held=held)
