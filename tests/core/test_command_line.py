"""Whatever fails, a person reads one line that names the program and the matter."""

import errno

import click
import pytest

from crafts_core.command_line import one_line_errors, progress_bars
from crafts_core.errors import CraftsError


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (CraftsError("no plan at x"), "crafts: no plan at x"),
        (OSError(errno.ENOSPC, "No space left", "/x/y"), "crafts: No space left: /x/y; run again"),
        (KeyboardInterrupt(), "crafts: interrupted; run again"),
    ],
)
def test_a_failure_is_one_line_and_exit_code_1(
    error: BaseException, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(click.exceptions.Exit), one_line_errors("crafts", advice="run again"):
        raise error
    captured = capsys.readouterr()
    assert captured.err == line + "\n"
    assert captured.out == ""


def test_a_mistake_of_ours_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError), one_line_errors("crafts"):
        raise ZeroDivisionError


def test_news_of_the_same_work_shares_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("TTY_INTERACTIVE", "1")
    with progress_bars() as show:
        for step in range(3):
            show(f"VAE, loss {step}", step, 3)
        show("UNet, loss 1", 0, 3)
        bars = show.__closure__
    assert bars is not None
    tasks = next(cell.cell_contents for cell in bars if isinstance(cell.cell_contents, dict))
    assert list(tasks) == ["VAE", "UNet"]


def test_long_work_without_a_terminal_says_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr("crafts_core.command_line.time.monotonic", lambda: now[0])
    with progress_bars() as show:
        for seconds, done in ((1, 1), (31, 2), (40, 3), (62, 4)):
            now[0] = float(seconds)
            show("tiles", done, 9)
    assert capsys.readouterr().err == "tiles: 2 of 9\ntiles: 4 of 9\n"
