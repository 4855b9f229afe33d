"""What a stranger, a slow node and a greedy node cost the coordinator, over real sockets."""

import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from http.client import HTTPResponse

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree

from crafts_server import fleet_gate, superlink
from crafts_server.fleet_gate import MAX_BODY_BYTES
from crafts_server.superlink import SuperLink
from support.superlinks import admitted_key, connected, listening, signed_by

pytestmark = pytest.mark.network

PIECE = 1000
FLOWERS = -1
"""An answer of Flower's own: the body is no message of this node's."""


@pytest.fixture(scope="module")
def link(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple]:
    with listening(tmp_path_factory.mktemp("link")) as link:
        yield link


@contextmanager
def dialled(link) -> Iterator[ssl.SSLSocket]:
    server, context = link
    with (
        socket.create_connection(("localhost", server.port), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as secure,
    ):
        yield secure


def head(length: int, **headers: str) -> bytes:
    lines = ["POST /v1/fleet/push-object HTTP/1.1", "Host: localhost"]
    lines += ["Content-Type: application/protobuf", f"Content-Length: {length}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def status(secure: ssl.SSLSocket) -> int:
    """Of the next answer; 0 if the connection is closed instead."""
    answer = HTTPResponse(secure)
    try:
        answer.begin()
        text = answer.read()
    except ConnectionError:
        return 0
    return FLOWERS if b"SuperNode" in text else answer.status


def test_a_stranger_is_answered_before_its_body(link) -> None:
    """Nothing of thirty bodies that are announced and half sent is kept."""
    server, _ = link
    with ExitStack() as stack:
        strangers = [stack.enter_context(dialled(link)) for _ in range(30)]
        for stranger in strangers:
            stranger.sendall(head(MAX_BODY_BYTES))
        assert {status(stranger) for stranger in strangers} == {401}
        for stranger in strangers:
            stranger.sendall(b"x" * (MAX_BODY_BYTES // 2))
        assert server.gate.held_bytes == 0


@pytest.mark.parametrize("spoil", ["X-Flwr-Nothing", "flwr-timestamp", "another's signature"])
def test_only_an_admitted_nodes_own_fresh_signature_counts(link, spoil: str, monkeypatch) -> None:
    server, _ = link
    key, other = admitted_key(server, "north"), admitted_key(server, "south")
    headers = signed_by(key)
    if spoil == "flwr-timestamp":
        monkeypatch.setattr(superlink, "TIMESTAMP_TOLERANCE", -100)
    elif spoil == "another's signature":
        public = next(name for name in headers if "public-key" in name)
        headers[public] = signed_by(other)[public]
    with dialled(link) as node:
        node.sendall(head(PIECE, **headers))
        if spoil == "X-Flwr-Nothing":
            node.settimeout(0.5)
            with pytest.raises(TimeoutError):
                status(node)  # it waits for the body of a node
        else:
            assert status(node) == 401


def test_a_dismissed_node_is_a_stranger(link) -> None:
    server, _ = link
    key = admitted_key(server, "north")
    server.admit_only({})
    with dialled(link) as node:
        node.sendall(head(PIECE, **signed_by(key)))
        assert status(node) == 401


def test_a_body_that_is_announced_too_long_is_not_read(link) -> None:
    key = admitted_key(link[0], "north")
    with dialled(link) as node:
        node.sendall(head(MAX_BODY_BYTES + 1, **signed_by(key)))
        assert status(node) == 413


def test_chunks_are_bound_by_the_announced_length(link) -> None:
    key = admitted_key(link[0], "north")
    chunked = {"Transfer-Encoding": "chunked"}
    with dialled(link) as node:
        node.sendall(head(PIECE, **chunked, **signed_by(key)) + b"7d0\r\n" + b"x" * 2 * PIECE)
        assert status(node) == 413


@pytest.mark.slow
def test_a_body_that_stops_is_given_up_and_asked_for_again(link, monkeypatch) -> None:
    monkeypatch.setattr(fleet_gate, "_GRACE_S", 0.3)
    key = admitted_key(link[0], "north")
    with dialled(link) as node:
        node.sendall(head(2 * PIECE, **signed_by(key)) + b"x" * PIECE)
        assert status(node) == 503
    holds(link[0], 0)


@pytest.mark.slow
def test_a_slow_body_is_waited_for(link, monkeypatch) -> None:
    """Longer than the pause that is allowed, and fast enough."""
    monkeypatch.setattr(fleet_gate, "_GRACE_S", 1.0)
    monkeypatch.setattr(fleet_gate, "_LEAST_BYTES_PER_S", PIECE)
    key = admitted_key(link[0], "north")
    with dialled(link) as node:
        node.sendall(head(8 * PIECE, **signed_by(key)))
        for _ in range(8):
            time.sleep(0.25)
            node.sendall(b"x" * PIECE)
        assert status(node) == FLOWERS


def test_bodies_under_way_are_limited_together(link, monkeypatch) -> None:
    server, _ = link
    monkeypatch.setattr(fleet_gate, "_MOST_BYTES", 3 * PIECE)
    signed = head(2 * PIECE, **signed_by(admitted_key(server, "north")))
    with dialled(link) as second:
        with dialled(link) as first:
            first.sendall(signed + b"x")
            holds(server, 2 * PIECE)
            second.sendall(signed + b"x" * 2 * PIECE)
            assert status(second) == 503
        holds(server, 0)
        second.sendall(signed + b"x" * 2 * PIECE)
        assert status(second) == FLOWERS


def holds(server: SuperLink, num_bytes: int) -> None:
    """Wait until it does."""
    deadline = time.monotonic() + 10
    while server.gate.held_bytes != num_bytes:
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("said", [b"", b"X"])
def test_a_request_that_does_not_come_is_not_waited_for(link, monkeypatch, said: bytes) -> None:
    """Nothing, or a byte now and then."""
    monkeypatch.setattr(fleet_gate, "_REQUEST_WITHIN_S", 0.5)
    with dialled(link) as stranger:
        stranger.settimeout(0.1)
        started, closed = time.monotonic(), False
        while not closed and time.monotonic() < started + 5:
            with suppress(TimeoutError):
                stranger.sendall(said)
                closed = stranger.recv(1) == b""
        assert closed


def test_headers_without_an_end_are_not_collected(link) -> None:
    with dialled(link) as stranger:
        stranger.sendall(b"POST /v1/fleet/push-object HTTP/1.1\r\nX: " + b"x" * (100 << 10))
        assert status(stranger) in (0, 400)


def test_connections_are_limited(link, monkeypatch) -> None:
    key = admitted_key(link[0], "north")
    monkeypatch.setattr(link[0]._server.config, "limit_concurrency", 3)
    with ExitStack() as stack:
        first, *_ = [stack.enter_context(dialled(link)) for _ in range(4)]
        first.sendall(head(0, **signed_by(key)))
        assert status(first) == 503


@pytest.mark.slow
def test_the_largest_piece_that_flower_sends_passes(link) -> None:
    """Flower's own node sends an answer that is cut into pieces."""
    server, _ = link
    with connected(server) as calls, server.grid() as grid:
        node_id, receive, send, _run, _fab, _pull, push_object, _confirm = calls
        content = RecordDict({"request": ConfigRecord({"please": 1})})
        asked = Message(content, dst_node_id=node_id, message_type="train")
        (message_id,) = grid.push_messages([asked])
        message, _ = receive()
        sent = np.random.default_rng(0).random(1_000_000)
        record = ArrayRecord({"delta": Array.from_numpy_ndarray(sent)})
        reply = Message(RecordDict({"delta": record}), reply_to=message)
        reply.metadata.__dict__["_message_id"] = reply.object_id
        objects = get_all_nested_objects(reply)
        _, session = send(reply, get_object_tree(reply), 1.0)
        for object_id, each in objects.items():
            push_object(grid.run.run_id, session, object_id, each.deflate())
        (answer,) = grid.pull_messages([message_id])
        got = answer.content.array_records["delta"]["delta"].numpy()
        assert np.array_equal(got, sent)
        assert max(len(each.deflate()) for each in objects.values()) > 5 << 20
