"""Waiting, and calls that meet a server that is busy."""

import httpx
import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.common.constant import ErrorCode

from crafts_server.collection import Collection, Members, Patience, SiteDirectory
from crafts_server.errors import RunStoppedError
from crafts_server.grid_calls import LOST_ON_THE_WAY, patiently
from support.fake_grid import FakeGrid

REQUEST = httpx.Request("POST", "https://superlink/v1/runtime")


def failing(*errors: Exception):  # type: ignore[no-untyped-def]
    left = list(errors)

    def call() -> str:
        if left:
            raise left.pop(0)
        return "done"

    return call


def status(code: int) -> httpx.HTTPStatusError:
    return httpx.HTTPStatusError("", request=REQUEST, response=httpx.Response(code))


def test_a_busy_or_restarting_server_is_asked_again() -> None:
    waits: list[float] = []
    call = failing(status(500), httpx.ConnectError("refused"), status(503))
    assert patiently(call, sleep=waits.append) == "done"
    assert waits == [0.5, 1.0, 2.0]


def test_a_refusal_is_not_repeated() -> None:
    with pytest.raises(httpx.HTTPStatusError):
        patiently(failing(status(401)), sleep=lambda _s: pytest.fail("waited"))


def test_patience_ends_after_a_minute() -> None:
    waits: list[float] = []
    with pytest.raises(httpx.ConnectError):
        patiently(failing(*[httpx.ConnectError("gone")] * 20), sleep=waits.append)
    assert 60 <= sum(waits) <= 90


ANSWER = RecordDict({"reply": ConfigRecord({"fine": True})})


class Noting:
    """A phase that notes who answered."""

    def __init__(self, accepted: list[int]) -> None:
        self._accepted = accepted

    def compose(self, node_id: int) -> Message:
        return Message(RecordDict(), dst_node_id=node_id, message_type="train")

    def accept(self, node_id: int, _message: Message) -> None:
        self._accepted.append(node_id)


def collection(grid: FakeGrid, sleep, accepted: list[int], members=None) -> Collection:
    return Collection(
        grid,
        SiteDirectory(members=members or Members()),
        Noting(accepted),
        patience=Patience(poll_s=0.0, join_wait_s=0.0, sleep=sleep),
    )


def test_a_node_that_dies_with_the_request_is_asked_again_when_it_is_back() -> None:
    """Flower never delivers a message twice; without this the node has refused for good."""
    sites = {1: lambda _: ANSWER, 2: lambda _: Error(5, "no heartbeat")}
    grid, accepted, naps = FakeGrid(sites), [], []

    def sleep(_seconds: float) -> None:
        naps.append(len(naps))
        if naps[-1] == 0:
            del grid.sites[2]
        if naps[-1] == 3:
            grid.sites[2] = lambda _: ANSWER
        assert len(naps) < 9, "it waits for ever"

    replies = collection(grid, sleep, accepted).run(min_sites=1, deadline_s=60)
    assert accepted == [1, 2]
    assert [node for node, _ in grid.requests] == [1, 2, 2]
    assert (replies.num_asked, replies.num_accepted, replies.missing) == (2, 2, ())


def test_a_node_that_was_never_seen_away_but_is_another_process_is_asked_again() -> None:
    """Restarted in the moment that Flower gave it up: nobody saw an error, the request is lost."""
    grid, accepted, naps = FakeGrid({1: lambda _: None}), [], []

    def sleep(_seconds: float) -> None:
        naps.append(len(naps))
        if naps[-1] == 1:
            grid.sites[1] = lambda _: ANSWER
        assert len(naps) < 6, "it waits for ever"

    members = Members(connected_since=lambda _: "10:00" if len(naps) < 3 else "10:01")
    replies = collection(grid, sleep, accepted, members).run(min_sites=1, deadline_s=60)
    assert accepted == [1]
    assert [node for node, _ in grid.requests] == [1, 1]
    assert replies.num_asked == 1


def test_a_node_that_does_not_come_back_is_missing_not_refused() -> None:
    grid = FakeGrid({1: lambda _: ANSWER, 2: lambda _: Error(5, "no heartbeat")})

    def sleep(_seconds: float) -> None:
        grid.sites.pop(2, None)

    replies = collection(grid, sleep, []).run(min_sites=1, deadline_s=0.2)
    assert (replies.refused, replies.missing) == ((), ("node 2",))


def test_a_sleep_may_end_the_run() -> None:
    def sleep(_seconds: float) -> None:
        raise RunStoppedError("the operator asked for it")

    with pytest.raises(RunStoppedError):
        collection(FakeGrid({1: lambda _: None}), sleep, []).run(min_sites=1, deadline_s=60)


def test_flowers_codes_for_what_is_lost_are_what_we_think() -> None:
    unavailable = (
        ErrorCode.MESSAGE_UNAVAILABLE,
        ErrorCode.REPLY_MESSAGE_UNAVAILABLE,
        ErrorCode.NODE_UNAVAILABLE,
    )
    assert set(unavailable) == LOST_ON_THE_WAY
