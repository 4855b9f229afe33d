"""An accountant's answer is kept for the same question and code, and nothing depends on that."""

from pathlib import Path

import pytest

from crafts_client import figures
from crafts_client.figures import Figures


@pytest.fixture
def kept(tmp_path: Path) -> Figures:
    return Figures(tmp_path / "figures.json")


def never() -> float:
    raise AssertionError("it was asked again")


def test_a_question_is_asked_once(kept: Figures) -> None:
    assert kept.of(float, ("epsilon", 0.1), lambda: 0.25) == 0.25
    assert kept.of(float, ("epsilon", 0.1), never) == 0.25
    assert kept.of(float, ("epsilon", 0.2), lambda: 0.5) == 0.5


def test_no_bound_is_kept_as_such(kept: Figures) -> None:
    kept.of(float, ("alone",), lambda: float("inf"))
    assert kept.of(float, ("alone",), never) == float("inf")


def test_other_code_asks_again(kept: Figures, monkeypatch: pytest.MonkeyPatch) -> None:
    kept.of(float, ("epsilon",), lambda: 0.25)
    monkeypatch.setattr(figures, "_computed_by", lambda: "other code")
    assert kept.of(float, ("epsilon",), lambda: 0.5) == 0.5


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b'{"a": 1}', b"[" * 100_000])
def test_a_damaged_file_costs_time_only(kept: Figures, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "figures.json").write_bytes(content)
    assert kept.of(float, ("epsilon",), lambda: 0.25) == 0.25
    assert kept.of(float, ("epsilon",), never) == 0.25


def test_what_is_not_of_the_kind_is_asked_again(kept: Figures) -> None:
    kept.of(str, ("epsilon",), lambda: "nothing")
    assert kept.of(float, ("epsilon",), lambda: 0.25) == 0.25


def test_a_folder_that_cannot_be_written_stops_nobody(tmp_path: Path) -> None:
    assert Figures(tmp_path / "missing" / "figures.json").of(float, (), lambda: 0.25) == 0.25


def test_the_file_is_the_owners_and_stays_small(
    kept: Figures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert figures._MOST_KEPT <= 256, "answers, each of some hundred bytes"
    monkeypatch.setattr(figures, "_MOST_KEPT", 8)
    for number in range(figures._MOST_KEPT + 9):
        kept.of(int, (number,), lambda number=number: number)
    file = tmp_path / "figures.json"
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.read_text().count(":") == figures._MOST_KEPT
    assert kept.of(int, (figures._MOST_KEPT + 8,), never) == figures._MOST_KEPT + 8
