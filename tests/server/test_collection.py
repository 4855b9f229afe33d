"""Waiting, and calls that meet a server that is busy."""

import httpx
import pytest

from crafts_server.grid_calls import patiently

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
