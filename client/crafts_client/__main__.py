"""``python -m crafts_client`` is ``crafts-client``."""

from crafts_core.programs import client

client()
