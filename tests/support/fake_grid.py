"""A Flower Grid in this process: sites are functions from a request to a reply.

Messages are serialised on the way, so that nobody shares an object with anybody.
"""

from collections.abc import Callable, Iterable, Mapping

from flwr.app import Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

SiteFunction = Callable[[RecordDict], RecordDict | Error | None]
"""None: this site never answers."""


class FakeGrid(Grid):
    """Sites answer as soon as they are asked."""

    def __init__(self, sites: Mapping[int, SiteFunction]) -> None:
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
        self.sites = dict(sites)
        self.requests: list[tuple[int, RecordDict]] = []
        self._replies: dict[str, Message] = {}

    def set_run(self, run: Run) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Run:
        raise NotImplementedError

    def create_message(self, *args: object, **kwargs: object) -> Message:
        raise NotImplementedError

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return list(self.sites)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            node = message.metadata.dst_node_id
            message_id = f"message-{len(self.requests)}"
            message.metadata.__dict__["_message_id"] = message_id
            self.requests.append((node, message.content))
            answer = self.sites[node](message.content)
            if answer is not None:
                self._replies[message_id] = Message(answer, reply_to=message)
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._replies.pop(key) for key in message_ids if key in self._replies]
