"""What the coordinator offered when it was last asked. No page waits for the answer."""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from crafts_client.home import SiteHome
from crafts_client.offered_plans import OfferedPlan, offered_plans
from crafts_core.errors import CraftsError

log = logging.getLogger(__name__)

_EVERY_S = 60.0
_PATIENCE_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Offered:
    """An answer of the coordinator's, or why there is none."""

    at: datetime | None
    """None before the first answer."""
    plans: tuple[OfferedPlan, ...] = ()
    why: str = ""
    """It could not be asked; ``plans`` are then those of the last answer."""


class OfferedNow:
    """Asks while somebody looks, once a minute at most, beside whoever looks."""

    def __init__(
        self,
        open_home: Callable[[], SiteHome],
        ask: Callable[[SiteHome], tuple[OfferedPlan, ...]] = lambda home: tuple(
            offered_plans(home)
        ),
    ) -> None:
        self._open_home, self._ask = open_home, ask
        self._newest = Offered(at=None)
        self._asked_s = -_EVERY_S
        self._asking: threading.Thread | None = None
        self._lock = threading.Lock()

    def look(self) -> Offered:
        """The newest answer; it may be a minute old, and the first comes with a later look."""
        with self._lock:
            is_due = time.monotonic() - self._asked_s >= _EVERY_S
            if is_due and not (self._asking and self._asking.is_alive()):
                self._asked_s = time.monotonic()
                self._asking = threading.Thread(target=self._refresh, daemon=True)
                self._asking.start()
            asking = self._asking
        if asking is not None:
            asking.join(_PATIENCE_S)  # most coordinators are that near
        return self._newest

    def _refresh(self) -> None:
        try:
            self._newest = Offered(at=datetime.now(UTC), plans=self._ask(self._open_home()))
        except Exception as error:  # nobody waits for this thread: unsaid, old plans would look new
            why = str(error)
            if not isinstance(error, CraftsError):
                log.exception("the coordinator's plans could not be read")
                why = f"{type(error).__name__}, which this program's log has more about"
            self._newest = replace(self._newest, why=why)
