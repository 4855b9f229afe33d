"""When each site last made contact: an empty file for each in the home, by its time.

Files and not rows: a site is seen whether or not the registry's database takes writes.
"""

import logging
import os
import time
from datetime import UTC, datetime
from pathlib import Path

log = logging.getLogger(__name__)

_EVERY_S = 60.0
"""A site polls every few seconds; nobody needs to know it better than this."""


class Contacts:
    """One folder. The caller has checked who it was."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._noted: dict[str, float] = {}

    def note(self, site: str) -> None:
        """The site is there now. A disk that refuses is no reason to refuse the site."""
        now = time.monotonic()
        if now - self._noted.get(site, -_EVERY_S) < _EVERY_S:
            return
        self._noted[site] = now
        try:
            self._folder.mkdir(mode=0o700, exist_ok=True)
            (self._folder / site).touch(mode=0o600)
            os.utime(self._folder / site, (time.time(), time.time()))
        except OSError as error:
            log.warning("when %s was seen cannot be noted: %s", site, error.strerror)

    def last(self) -> dict[str, datetime]:
        """Of every site that ever made contact, to a minute.

        Raises:
            OSError: the folder cannot be read.
        """
        if not self._folder.is_dir():
            return {}
        times = {path.name: path.stat().st_mtime for path in self._folder.iterdir()}
        return {site: datetime.fromtimestamp(at, UTC) for site, at in times.items()}
