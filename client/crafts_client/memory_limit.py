"""How much memory this process may use: what a container or a service allows, not what is there."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")
_UNLIMITED = 1 << 60
"""Version 1 writes a number near 2^63 where it means none."""


def memory_limit(cgroups: Path = _CGROUPS, own: Path = _OWN) -> int | None:
    """The tightest limit of the control groups that this process is in; None if none limits it.

    Args:
        cgroups: Where the kernel shows control groups, of version 1 or 2.
        own: Where it says which ones this process is in.
    """
    limits = list(_limits(cgroups, own))
    return min(limits, default=None)


def _limits(cgroups: Path, own: Path) -> Iterator[int]:
    try:
        lines = own.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError):
        lines = []
    places = {(cgroups, "memory.max", ""), (cgroups / "memory", "memory.limit_in_bytes", "")}
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if not controllers:
            places.add((cgroups, "memory.max", group))
        elif "memory" in controllers.split(","):
            places.add((cgroups / "memory", "memory.limit_in_bytes", group))
    for root, name, group in places:
        parts = [part for part in group.split("/") if part not in ("", "..")]
        for depth in range(len(parts) + 1):
            with suppress(OSError, ValueError):  # not there, or "max"
                limit = int(root.joinpath(*parts[:depth], name).read_text(encoding="ascii"))
                if limit < _UNLIMITED:
                    yield limit
