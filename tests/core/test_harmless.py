"""Whatever somebody else wrote stays one line of plain letters, wherever it is shown."""

import ast
import json
import logging
from io import StringIO
from pathlib import Path

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crafts_core import command_line
from crafts_core.command_line import (
    HarmlessFormat,
    confirm,
    one_line_errors,
    print_result,
    progress_bars,
    say,
)
from crafts_core.errors import CraftsError
from crafts_core.harmless import harmless
from crafts_core.pages import page_environment
from crafts_core.plan import Plan, PlanError
from support.hostile import TEXT, assert_harmless
from support.sites import plan_values

ROOT = Path(__file__).parents[2]
ANY_TEXT = st.text(st.characters(exclude_categories=()))


@given(ANY_TEXT)
def test_what_is_shown_prints_on_one_line_and_stays_so(text: str) -> None:
    shown = harmless(text)
    assert shown.isprintable()
    assert harmless(shown) == shown
    shown.encode()


@given(ANY_TEXT)
def test_plain_letters_stay_and_json_stays_the_same_json(text: str) -> None:
    if text.isprintable():
        assert harmless(text) == text
    assert json.loads(harmless(json.dumps(text, ensure_ascii=False))) == text


def test_a_long_text_says_what_is_left_out() -> None:
    assert harmless("a\n" * 50, most=4) == "a\\na\\n ... (96 letters more)"
    assert harmless("abcd", most=4) == "abcd"


def test_results_and_questions_are_harmless(capsys, monkeypatch) -> None:
    say(TEXT)
    print_result({"name": TEXT, "names": [TEXT]}, as_json=False)
    assert_harmless(capsys.readouterr().out, num_lines=3)
    print_result({"name": TEXT}, as_json=True)
    said = capsys.readouterr().out
    assert_harmless(said, num_lines=1)
    assert json.loads(said) == {"name": TEXT}
    asked: list[str] = []
    monkeypatch.setattr(command_line.typer, "confirm", lambda text, **_: asked.append(text))
    confirm(f"Remove {TEXT}?", yes=False)
    confirm("Not asked", yes=True)
    assert_harmless(*asked, num_lines=1)


def test_an_error_is_one_harmless_line(capsys) -> None:
    with pytest.raises(click.exceptions.Exit), one_line_errors("crafts"):
        raise CraftsError(TEXT + "x" * 10_000)
    shown = capsys.readouterr().err
    assert_harmless(shown, num_lines=1)
    assert len(shown) < 3000


def test_a_progress_bar_reads_no_markup(monkeypatch, capsys) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", "300")
    with progress_bars() as show:
        show("file [red]\x1b]0;title\x07\x1b[2K", 1, 2)
    shown = capsys.readouterr().err
    assert "file [red]\\u001b]0;title\\u0007\\u001b[2K" in shown


def test_a_log_line_is_one_line_and_a_traceback_none_of_the_log() -> None:
    stream = StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(HarmlessFormat("%(levelname)s %(message)s"))
    log = logging.Logger("hostile")
    log.addHandler(handler)
    log.warning("refused why=%s", TEXT)
    assert_harmless(stream.getvalue(), num_lines=1)
    try:
        raise ValueError("\nINFO approved" + TEXT)
    except ValueError:
        log.exception("failed")
    first, *rest = stream.getvalue().splitlines()[1:]
    assert first == "ERROR failed"
    assert {line[:4] for line in rest} == {"  | "}
    assert all(line.isprintable() for line in rest)


def test_services_and_all_other_commands_log_in_this_format(monkeypatch) -> None:
    given_options: dict[str, object] = {}
    monkeypatch.setattr(logging, "basicConfig", given_options.update)
    monkeypatch.setattr(command_line.signal, "signal", lambda *_: None)
    monkeypatch.setattr(logging.Logger, "setLevel", lambda *_: None)
    monkeypatch.setattr(logging.getLogger("flwr"), "handlers", [])
    command_line.run_as_service()
    (handler,) = given_options["handlers"]
    assert isinstance(handler.formatter, HarmlessFormat)
    monkeypatch.setattr(logging.lastResort, "formatter", None)
    with one_line_errors("crafts"):
        assert isinstance(logging.lastResort.formatter, HarmlessFormat)


def test_a_page_shows_neither_tags_nor_controls() -> None:
    environment = page_environment("crafts_client")
    source = "{% macro bold(x) %}<b>{{ x }}</b>\n{% endmacro %}{{ text }}|{{ bold(text) }}"
    page = environment.from_string(source).render(text=TEXT)
    assert page.count("\n") == 1  # the macro's own
    assert page.replace("\n", "").isprintable()
    assert "<script" not in page
    assert page.count("<b>") == 1


def test_keys_and_values_of_a_plan_are_named_harmlessly() -> None:
    values = plan_values("0" * 64) | {TEXT * 100: 1}
    with pytest.raises(PlanError) as refused:
        Plan.parse(values)
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 4000


def names_called(path: Path) -> set[str]:
    """``a.b`` for each call of a function b of a name a; ``b`` for a bare one."""
    called = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            called.add(ast.unparse(node.func))
    return called


@pytest.mark.slow
def test_nothing_is_shown_by_another_way() -> None:
    """No program prints, asks, logs or renders but through the functions above."""
    theirs = {"print", "typer.echo", "typer.secho", "typer.confirm", "click.echo"}
    theirs |= {"sys.stdout.write", "sys.stderr.write", "Environment", "logging.basicConfig"}
    theirs |= {"logging.Formatter", "Console", "Progress", "rich.print"}
    allowed = {"command_line.py", "pages.py"}
    ways = {
        f"{path.relative_to(ROOT)}: {name}"
        for package in ("crafts_core", "privacy", "client", "server", "simulations")
        for path in (ROOT / package).rglob("*.py")
        if path.name not in allowed
        for name in names_called(path) & theirs
    }
    assert ways == set()
