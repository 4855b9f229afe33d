"""Flower's ``Grid`` without a network: the same ServerApp and ClientApps.

Who runs a site's turn is a choice of its own (``Turns``). Here in this process they run one after
the other, each when its reply is first asked for, so one reply is in memory at a time. Messages are
copied on both ways: no site can see or change another's objects.

This module holds the simulation's only private import of Flower: outside a Flower process somebody
has to say who sends the messages.
"""

import copy
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from flwr.app import Context, Error, Message, RecordDict, UserConfig
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

App = Callable[[Message, Context], Message]
"""A ClientApp, or what stands for one."""
_CLIENT_APP_RAISED = 2
"""Flower's code for a ClientApp that raised."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalNode:
    """A site: its app and what the site itself configures."""

    app: App
    node_config: UserConfig


class Turns(Protocol):
    """Who runs the sites' turns: a message goes in, the site's reply comes out."""

    @property
    def sites(self) -> Sequence[str]:
        """Names."""
        ...

    def begin(self, site: str, message: Message) -> Callable[[], Message]:
        """Hand a message, which is nobody else's, to a site.

        Returns:
            What waits for the reply, and is called once at most.
        """
        ...


class TurnsHere:
    """Turns in this process, each when its reply is waited for."""

    def __init__(
        self, nodes: Mapping[str, LocalNode], *, on_turn: Callable[[str], None] = lambda _: None
    ) -> None:
        """Every site's app and context.

        Args:
            nodes: Name to node.
            on_turn: Called with a site's name before it works.
        """
        self.sites = tuple(nodes)
        self._nodes = nodes
        self._on_turn = on_turn
        self._contexts: dict[str, Context] = {}

    def begin(self, site: str, message: Message) -> Callable[[], Message]:
        """See ``Turns``."""
        return partial(self._take, site, message)

    def _take(self, site: str, message: Message) -> Message:
        self._on_turn(site)
        node = self._nodes[site]
        if site not in self._contexts:
            self._contexts[site] = context_of(message.metadata.dst_node_id, node.node_config)
        return answer(node.app, message, self._contexts[site])


def context_of(node_id: int, node_config: UserConfig) -> Context:
    """What a site's app knows before its first message."""
    return Context(
        run_id=1, node_id=node_id, node_config=node_config, state=RecordDict(), run_config={}
    )


def answer(app: App, message: Message, context: Context) -> Message:
    """One turn. An exception becomes an error, as Flower does, but without the exception's text."""
    try:
        return app(message, context)
    except Exception as error:
        return Message(Error(_CLIENT_APP_RAISED, type(error).__name__), reply_to=message)


class LocalGrid(Grid):
    """A grid over named sites."""

    def __init__(self, turns: Turns) -> None:
        """Give every site a node id, in the order of their names."""
        self._turns = turns
        self._names = dict(enumerate(sorted(turns.sites), start=1))
        self._ids = itertools.count(1)
        self._waiting: dict[str, Callable[[], Message]] = {}
        self._run: Run | None = None
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 0

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        if self._run is None:
            raise RuntimeError("a local grid has a run only after set_run")
        return self._run

    def create_message(self, *_: object, **__: object) -> Message:
        raise NotImplementedError("Flower's older way; a message is made by its class")

    def get_node_ids(self) -> Iterable[int]:
        return list(self._names)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        pushed = []
        for message in messages:
            message_id = str(next(self._ids))
            site = self._names[message.metadata.dst_node_id]
            self._waiting[message_id] = self._turns.begin(site, copy.deepcopy(message))
            pushed.append(message_id)
        return pushed

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        for message_id in message_ids:
            reply = self._waiting.pop(message_id, None)
            if reply is not None:
                yield copy.deepcopy(reply())

    def send_and_receive(self, *_: object, **__: object) -> Iterable[Message]:
        raise NotImplementedError("a round looks for each site's reply by itself")
