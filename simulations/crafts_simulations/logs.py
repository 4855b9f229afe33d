"""What ``--verbose`` shows, in this process and in those that work for it."""

import logging

from crafts_core.command_line import log_to_stderr

_SITES = logging.getLogger("crafts_client")


def show_what_goes_wrong() -> None:
    """At a site, with tracebacks, on stderr."""
    log_to_stderr("%(levelname)s %(name)s %(message)s")
    _SITES.setLevel(logging.DEBUG)


def is_shown() -> bool:
    """Whether that was asked for."""
    return _SITES.isEnabledFor(logging.DEBUG)
