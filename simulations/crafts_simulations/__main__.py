"""``python -m crafts_simulations`` is ``crafts-sim``."""

from crafts_core.programs import simulations

simulations()
