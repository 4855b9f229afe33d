"""Flower's ``Grid`` in one process: the same ServerApp and ClientApps, no network.

Sites run one after the other, each when its reply is first asked for, so one reply is in memory at
a time. Messages are copied on both ways: no site can see or change another's objects.

This module holds the simulation's only private import of Flower: outside a Flower process somebody
has to say who sends the messages.
"""

import copy
import itertools
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from flwr.app import Context, Error, Message, RecordDict, UserConfig
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

_CLIENT_APP_RAISED = 2
"""Flower's code for a ClientApp that raised."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalNode:
    """A site: its app and what the site itself configures."""

    app: ClientApp
    node_config: UserConfig


class LocalGrid(Grid):
    """A grid over named local nodes."""

    def __init__(
        self, nodes: Mapping[str, LocalNode], *, on_turn: Callable[[str], None] | None = None
    ) -> None:
        """Give every node an id, in the order of their names.

        Args:
            nodes: Name to node.
            on_turn: Called with a node's name before it works.
        """
        self._names = dict(enumerate(sorted(nodes), start=1))
        self._apps = {node_id: nodes[name].app for node_id, name in self._names.items()}
        self._contexts = {
            node_id: Context(
                run_id=1,
                node_id=node_id,
                node_config=nodes[name].node_config,
                state=RecordDict(),
                run_config={},
            )
            for node_id, name in self._names.items()
        }
        self._on_turn = on_turn
        self._ids = itertools.count(1)
        self._waiting: dict[str, Message] = {}
        self._run: Run | None = None
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 0

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        if self._run is None:
            raise RuntimeError("a local grid has a run only after set_run")
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return list(self._names)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        pushed = []
        for message in messages:
            message_id = str(next(self._ids))
            self._waiting[message_id] = copy.deepcopy(message)
            pushed.append(message_id)
        return pushed

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        for message_id in message_ids:
            message = self._waiting.pop(message_id, None)
            if message is not None:
                yield copy.deepcopy(self._answer(message))

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        started = time.monotonic()
        replies: list[Message] = []
        for message_id in self.push_messages(messages):
            if timeout is not None and time.monotonic() - started > timeout:
                break
            replies += self.pull_messages([message_id])
        return replies

    def _answer(self, message: Message) -> Message:
        node_id = message.metadata.dst_node_id
        if self._on_turn is not None:
            self._on_turn(self._names[node_id])
        try:
            return self._apps[node_id](message, self._contexts[node_id])
        except Exception as error:  # as Flower does, but without the exception's text
            return Message(Error(_CLIENT_APP_RAISED, type(error).__name__), reply_to=message)
