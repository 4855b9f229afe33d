"""The Flower ClientApp of a site. It runs what is installed here and nothing that was sent.

Which home it serves is the site's own word (``site-home`` in the node's configuration), never the
coordinator's.
"""

import logging
from collections.abc import Callable
from pathlib import Path

from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp

from crafts_client.errors import HomeError
from crafts_client.messages import read_message, write_reply
from crafts_client.refusals import refusal_of
from crafts_client.site import Site

log = logging.getLogger(__name__)

HOME_KEY = "site-home"
"""Key of the node's configuration that names the site home."""


def make_client_app(open_site: Callable[[Path], Site] = Site.open) -> ClientApp:
    """A ClientApp whose sites stay open, so that models stay warm between rounds."""
    app = ClientApp()
    sites: dict[Path, Site] = {}

    @app.train()
    def train(message: Message, context: Context) -> Message:
        """Answer one round, or refuse it with a public sentence."""
        try:
            path = _home_of(context)
            if path not in sites:
                sites[path] = open_site(path)
            release = sites[path].answer(read_message(message))
            return Message(write_reply(release), reply_to=message)
        except Exception as error:  # whatever it is, its text stays here
            refusal = refusal_of(error)
            log.warning("refused code=%d error=%s", refusal.code, type(error).__name__)
            log.debug("refused because", exc_info=error)
            return Message(Error(refusal.code, refusal.sentence), reply_to=message)

    return app


def _home_of(context: Context) -> Path:
    value = context.node_config.get(HOME_KEY)
    if not isinstance(value, str) or not value:
        raise HomeError(f"the node's configuration lacks {HOME_KEY}")
    return Path(value)


app = make_client_app()
