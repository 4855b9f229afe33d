"""``python -m crafts_server`` is ``crafts-server``."""

from crafts_core.programs import server

server()
