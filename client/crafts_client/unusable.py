"""How often a patient's gradient was not finite and counted as zero. For the operator's eyes only.

A patient whose tiles are damaged adds nothing, and nobody would know. The count is computed from
patients without noise, so it lies in the home, where ``crafts-client status`` shows it; it is never
logged, sent, or put into a report.
"""

from pathlib import Path

from crafts_core.durable import write_file


def note(folder: Path, num: int, *, rank: int = 0) -> None:
    """Add a round's count; each of the site's devices has its own file."""
    if num == 0:
        return
    folder.mkdir(mode=0o700, exist_ok=True)
    path = folder / str(rank)
    write_file(path, str(_read(path) + num), mode=0o600)


def total(folder: Path) -> int:
    """Over all rounds and devices; a patient counts once for each step that drew it."""
    return sum(_read(path) for path in folder.glob("[0-9]*"))


def _read(path: Path) -> int:
    return int(path.read_text(encoding="utf-8")) if path.exists() else 0
