"""Calls on Flower's Grid that survive a server that is busy or restarting."""

import time
from collections.abc import Callable
from typing import TypeVar

import httpx
from sqlalchemy.exc import OperationalError

T = TypeVar("T")
LOST_ON_THE_WAY = frozenset({3, 4, 5})
"""Flower's error codes for a message that expired or is gone, a reply whose upload never ended, and
a node that stopped saying that it is there: no answer of the site's."""
_WAITS_S = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)


def patiently(call: Callable[[], T], *, sleep: Callable[[float], None] = time.sleep) -> T:
    """Call again after 5xx answers, broken connections and a busy database, for about a minute.

    Flower's own client gives up on 500, which a locked state database answers with. Asking a site
    twice is harmless: it sends the same sealed reply again.
    """
    for wait_s in _WAITS_S:
        try:
            return call()
        except httpx.HTTPStatusError as error:
            if error.response.status_code < 500:
                raise
        except (httpx.TransportError, OperationalError):
            pass
        sleep(wait_s)
    return call()
