"""``python -m crafts_core`` is ``crafts``."""

from crafts_core.programs import crafts

crafts()
