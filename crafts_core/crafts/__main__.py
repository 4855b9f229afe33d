"""``python -m crafts`` is ``crafts``."""

from crafts_core.programs import crafts

crafts()
