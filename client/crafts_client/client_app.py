"""The Flower ClientApp of a site. It runs what is installed here and nothing that was sent.

Which home it serves is the site's own word (``site-home`` in the node's configuration), never the
coordinator's.
"""

import logging
import traceback
from collections.abc import Callable
from pathlib import Path

from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp

from crafts_client.errors import HomeError
from crafts_client.messages import read_announcement, read_message, write_reply
from crafts_client.outbox import Release
from crafts_client.refusals import refusal_of
from crafts_client.site import Site
from crafts_core.exchange import ReadyReply, RoundRequest

log = logging.getLogger(__name__)

Answer = Callable[[], Release | ReadyReply]
Ask = Callable[[Site, Message], tuple[RoundRequest, Answer]]

HOME_KEY = "site-home"
"""Key of the node's configuration that names the site home."""


def make_client_app(
    open_site: Callable[[Path], Site] = Site.open, *, witness: Callable[[], None] = lambda: None
) -> ClientApp:
    """A ClientApp whose sites stay open, so that models stay warm between rounds.

    Args:
        open_site: Opens the home at a path.
        witness: Called before a round and again before its release or refusal leaves; when it
            raises, the release stays, sealed, until it is asked for again.
    """
    app = ClientApp()
    sites: dict[Path, Site] = {}

    def answered(message: Message, context: Context, ask: Ask) -> Message:
        """One question, or a refusal with a public sentence."""
        try:
            path = _home_of(context)
            if path not in sites:
                sites[path] = open_site(path)
            request, answer = ask(sites[path], message)
            witness()
            try:
                release = answer()
            except Exception:
                witness()  # a refusal may have been charged, too
                raise
            witness()
            spent = sites[path].spent()
            log.info("answered round=%d; charged to the cohort so far: %s", request.round, spent)
            return Message(write_reply(release), reply_to=message)
        except Exception as error:  # whatever it is, its text stays here
            refusal = refusal_of(error)
            log.warning(
                "refused code=%d (%s) error=%s at %s",
                refusal.code,
                refusal.sentence,
                type(error.__cause__ or error).__name__,
                _place(error.__cause__ or error),
            )
            log.debug("refused because", exc_info=error)
            return Message(Error(refusal.code, refusal.sentence), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        """Answer one round; of a sum, say that this site is ready."""
        return answered(message, context, _ask_to_train)

    @app.train("masked")
    def masked(message: Message, context: Context) -> Message:
        """Add this site's masked vector to a sum."""
        return answered(message, context, _ask_to_add)

    return app


def _ask_to_train(site: Site, message: Message) -> tuple[RoundRequest, Answer]:
    request = read_message(message)
    return request.request, lambda: site.answer(request)


def _ask_to_add(site: Site, message: Message) -> tuple[RoundRequest, Answer]:
    announced = read_announcement(message)
    return announced.request, lambda: site.add_to_sum(announced)


def _place(error: BaseException) -> str:
    """File and line, which say nothing of the data that it happened to."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{Path(frame.filename).name}:{frame.lineno}"


def _home_of(context: Context) -> Path:
    value = context.node_config.get(HOME_KEY)
    if not isinstance(value, str) or not value:
        raise HomeError(f"the node's configuration lacks {HOME_KEY}")
    return Path(value)


app = make_client_app()
