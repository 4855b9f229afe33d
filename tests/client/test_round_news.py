"""Who sits at the site's terminal sees how far a round is; a log elsewhere learns none of it."""

import io
import logging
import sys

import pytest
from flwr.app import Context, RecordDict
from rich.console import Console
from rich.progress import Progress, TextColumn

from crafts_client.client_app import HOME_KEY, make_client_app
from crafts_client.home import SiteHome
from crafts_client.round_news import RoundNews, news_at_terminal
from crafts_client.site import Site
from support.hostile import TEXT
from support.sites import flower_message, make_site_home


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Cut(Terminal):
    """Its line is cut some time."""

    is_cut = False

    def write(self, text: str) -> int:
        if self.is_cut:
            raise OSError(5, "Input/output error")
        return super().write(text)


def bars_on(terminal: Terminal, *, auto_refresh: bool = True) -> Progress:
    console = Console(file=terminal, force_terminal=True, width=200)
    column = TextColumn("{task.description}", markup=False)
    return Progress(column, console=console, auto_refresh=auto_refresh)


class Shown(RoundNews):
    """Keeps what its bar says after each call."""

    def __init__(self, bars: Progress) -> None:
        self.bars, self.told = bars, []
        super().__init__(bars)

    def _show(self, what: str, done: int) -> None:
        super()._show(what, done)
        (task,) = self.bars.tasks
        self.told.append((task.description.partition(": ")[2], task.completed, task.total))


def answered(home: SiteHome, foundation, coordinator, news: RoundNews):
    plan = coordinator.plan()
    site = Site(home, foundation, news=news)
    content = coordinator.content(plan, coordinator.start(plan))
    where = Context(1, 7, {HOME_KEY: str(home.path)}, RecordDict(), {})
    return make_client_app(lambda _: site)(flower_message(content), where)


@pytest.fixture
def home(tmp_path, foundation, coordinator) -> SiteHome:
    return make_site_home(tmp_path / "site", foundation, coordinator.public_key)


def test_a_bar_follows_the_steps_of_a_round_and_goes_with_it(home, foundation, coordinator) -> None:
    news = Shown(bars_on(Terminal()))
    assert not answered(home, foundation, coordinator, news).has_error()
    assert news.told == [
        ("checking and timing public steps", 0, 2),
        ("training", 0, 2),
        ("training", 1, 2),
        ("done, leaves as soon as it is ready", 2, 2),
    ]
    assert news.bars.tasks == []


def test_the_log_says_what_began_and_what_the_cohort_has_spent_after_it(
    home, foundation, coordinator, caplog
) -> None:
    with caplog.at_level(logging.INFO, "crafts_client"):
        answered(home, foundation, coordinator, RoundNews())
    began, left = caplog.messages
    assert began == (
        "round 1 of 4 (stage pretraining) of tiny began, 2 steps; its answer leaves as soon as it "
        "is ready"
    )
    assert left == (
        "answered round=1; charged to the cohort so far: sums counts epsilon 8.000 of 20 at delta "
        "0.001 of 0.001"
    )


def test_an_answer_that_waits_is_said_to_before_it_does(caplog) -> None:
    news = RoundNews()
    with caplog.at_level(logging.INFO, "crafts_client"), news.of("round 1", 3):
        news.began(3600.0)
    assert "its answer leaves 2" in caplog.text
    assert "ready" not in caplog.text


def test_a_terminal_that_goes_away_ends_no_round(home, foundation, coordinator) -> None:
    terminal = Cut()
    with bars_on(terminal, auto_refresh=False) as bars:
        terminal.is_cut = True
        with pytest.raises(OSError, match="Input/output error"):
            bars.refresh()
        assert not answered(home, foundation, coordinator, RoundNews(bars)).has_error()
        terminal.is_cut = False


@pytest.mark.parametrize("variable", ["FORCE_COLOR", "TTY_COMPATIBLE"])
def test_no_variable_makes_a_log_of_the_bar(monkeypatch, variable: str) -> None:
    """A service's log would hold how fast the steps went."""
    monkeypatch.setenv(variable, "1")
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with news_at_terminal() as news, news.of("round 1", 2):
        news.began(0.0)
        news.stepped(1)
    assert sys.stderr.getvalue() == ""


def test_a_terminal_has_the_bar_and_the_log_above_it(monkeypatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", Terminal())
    terminal = sys.stderr
    with news_at_terminal() as news, news.of("round 1 [of] 2", 2):
        print("a line of the log", file=sys.stderr)
        news.began(0.0)
        news.stepped(1)
        news._bars.refresh()
    assert "a line of the log\n" in terminal.getvalue()
    assert "round 1 [of] 2: training" in terminal.getvalue()
    assert "1/2" in terminal.getvalue()


def test_a_peers_text_acts_on_no_terminal(caplog) -> None:
    terminal = Terminal()
    bars = bars_on(terminal)
    news = RoundNews(bars)
    with caplog.at_level(logging.INFO, "crafts_client"), news.of(f"round 1 of {TEXT}", 2):
        news.began(0.0)
        (task,) = bars.tasks
        assert task.description.isprintable()
    assert all(message.isprintable() for message in caplog.messages)
