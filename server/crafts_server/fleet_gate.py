"""What stands between the fleet port and Flower: who calls is asked before a body is read.

Anybody may connect to this port. Until a caller has shown that it is an enrolled node it costs a
connection, headers of at most 64 KiB, and some seconds; nothing that it sends is kept. Bodies of
nodes are limited in size, in time, and in what all of them together may hold.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from sqlalchemy.exc import OperationalError
from uvicorn.protocols.http.h11_impl import H11Protocol

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 6 << 20
"""Flower cuts arrays into pieces of 5 MiB; nothing legal is larger."""
MAX_CONNECTIONS = 512
"""Beyond that the answer is 503: a hundred sites with five connections each."""
_MOST_BYTES = 512 << 20
"""What bodies that are not answered yet may announce together."""
_GRACE_S, _LEAST_BYTES_PER_S = 30.0, 1024
"""A body may pause for so long, and on the whole must be as fast as a very bad line."""
_REQUEST_WITHIN_S = 20.0
_OPEN = frozenset(
    f"/v1/fleet/{call}"
    for call in (
        "activate-node",
        "deactivate-node",
        "send-node-heartbeat",
        "pull-messages",
        "push-messages",
        "get-run",
        "get-fab",
        "push-object",
        "pull-object",
        "confirm-message-received",
    )
)
"""What a node calls. It cannot register itself: enrolment does that."""

Part = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Part]]
Send = Callable[[Part], Awaitable[None]]
IsNode = Callable[[Mapping[bytes, bytes]], bool]
"""Whether a request's headers are signed by a node that may connect. Called in a thread."""


class FleetGate:
    """An ASGI application that passes on what nodes need; for the rest there is nothing here."""

    def __init__(self, app: Any, is_node: IsNode) -> None:
        self._app = app
        self._is_node = is_node
        self.held_bytes = 0
        """Announced by requests of nodes that are not answered yet."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        status = await self._refusal(scope)
        if status is not None:
            await _answer(send, status)
            return
        length = _length(scope)
        self.held_bytes += length
        try:
            await self._pass_on(scope, receive, send, length)
        finally:
            self.held_bytes -= length

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send, length: int) -> None:
        """A node's request, once its body is whole."""
        try:
            body = await _read(receive, length)
        except ConnectionError:
            return  # nobody is there to be answered
        except TimeoutError:
            log.warning("a node's message came too slowly and was given up; it will try again")
            await _answer(send, 503)
        except ValueError:
            await _answer(send, 413)
        else:
            await self._app(scope, _read_already(body, receive), _busy_not_broken(send))

    async def _refusal(self, scope: Scope) -> int | None:
        """Why a request is not passed on, from its head alone."""
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] not in _OPEN:
            return 404
        length = _length(scope)
        if length < 0:
            return 411
        if length > MAX_BODY_BYTES:
            return 413
        try:
            if not await asyncio.to_thread(self._is_node, dict(scope["headers"])):
                return 401
        except OperationalError:
            return 503
        return 503 if self.held_bytes + length > _MOST_BYTES else None


class PunctualProtocol(H11Protocol):
    """uvicorn's protocol, which waits for ever for a first request; this one does not."""

    _waiting: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Someone connected."""
        super().connection_made(transport)
        self._expect_a_request()

    def connection_lost(self, exc: Exception | None) -> None:
        """Someone is gone."""
        if self._waiting is not None:
            self._waiting.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        """The next request on this connection may come."""
        super().on_response_complete()
        self._expect_a_request()

    def _expect_a_request(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
        self._waiting = self.loop.call_later(_REQUEST_WITHIN_S, self._close_if_idle)

    def _close_if_idle(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()


def _length(scope: Scope) -> int:
    """The announced length of the body; -1 if there is none."""
    text = dict(scope["headers"]).get(b"content-length", b"")
    return int(text) if text.isdigit() else -1


async def _read(receive: Receive, length: int) -> bytes:
    """The whole body.

    Raises:
        ConnectionError: the caller is gone.
        TimeoutError: it comes too slowly.
        ValueError: it is longer than announced (chunks are not bound by the announcement).
    """
    started, body = asyncio.get_running_loop().time(), bytearray()
    more = True
    while more:
        deadline = started + _GRACE_S + len(body) / _LEAST_BYTES_PER_S
        async with asyncio.timeout_at(deadline):
            part = await receive()
        if part["type"] == "http.disconnect":
            raise ConnectionError
        body += part.get("body", b"")
        more = part.get("more_body", False)
        if len(body) > length:
            raise ValueError
    return bytes(body)


def _read_already(body: bytes, receive: Receive) -> Receive:
    """The body in one part; after it, what the connection says."""
    parts: list[Part] = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_part() -> Part:
        return parts.pop() if parts else await receive()

    return next_part


def _busy_not_broken(send: Send) -> Send:
    """503 where Flower answers 500: to a locked database, a full disk, whatever it did not expect.

    Its nodes try again after 503, and end, or lose the reply that they were sending, after 500.
    """

    async def forward(part: Part) -> None:
        if part.get("status") == 500:
            part = {**part, "status": 503}
        await send(part)

    return forward


async def _answer(send: Send, status: int) -> None:
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": b""})
