"""What counted as zero because it could not be used. For the operator's eyes only.

A tile that cannot be read or encoded, and a patient whose gradient is not finite, add nothing, and
nobody would know. The counts are computed from patients without noise, so they lie in the home,
where ``crafts-client status`` shows them; they are never logged, sent, or put into a report.
"""

import logging
from contextlib import suppress
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from crafts_core.durable import write_file

log = logging.getLogger(__name__)


class Unusable(BaseModel):
    """Counts. A patient, or tile, counts once for each time that it was drawn."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    gradients: int = Field(default=0, ge=0)
    tiles: int = Field(default=0, ge=0)

    def __add__(self, other: "Unusable") -> "Unusable":
        return Unusable(gradients=self.gradients + other.gradients, tiles=self.tiles + other.tiles)


def note(folder: Path, counted: Unusable, *, rank: int = 0) -> None:
    """Add a round's counts; each of the site's devices has its own file.

    Written also where there is nothing to add, and no error where the disk refuses: neither how
    long a round takes nor how it ends may tell that there was something.
    """
    path = folder / f"{rank}.json"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        write_file(path, (_read(path) + counted).model_dump_json(), mode=0o600)
    except OSError as error:
        log.warning("%s cannot be written: %s", path, error.strerror)


def total(folder: Path) -> Unusable:
    """Over all rounds and devices."""
    return sum((_read(path) for path in folder.glob("*.json")), Unusable())


def _read(path: Path) -> Unusable:
    """Nothing where it cannot be read."""
    with suppress(OSError, ValidationError):
        return Unusable.model_validate_json(path.read_bytes())
    return Unusable()
