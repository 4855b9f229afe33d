"""A program without its extra says what to install, also for ``--help``."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from crafts_core import programs
from crafts_core.cli import app
from crafts_core.installing import WHEEL


@pytest.mark.parametrize(
    ("program", "module", "told"),
    [
        (programs.client, "crafts_client.cli", "crafts-client: flwr is not installed; run: pip "
         f"install './{WHEEL}[client]' (the wheel"),
        (programs.simulations, "crafts_simulations.cli", "or '.[simulations]' in a clone"),
        (programs.crafts, "crafts_core.cli", f"pip install './{WHEEL}' (the wheel"),
    ],
)  # fmt: skip
def test_a_missing_extra_is_one_line(
    program: object, module: str, told: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def importing(name: str) -> None:
        assert name == module
        raise ModuleNotFoundError("No module named 'flwr'", name="flwr")

    monkeypatch.setattr(programs.importlib, "import_module", importing)
    monkeypatch.setattr(sys, "argv", ["program", "--help"])
    with pytest.raises(SystemExit) as ended:
        program()  # type: ignore[operator]
    assert ended.value.code == 1
    captured = capsys.readouterr()
    assert told in captured.err
    assert len(captured.err.splitlines()) == 1


def test_a_hole_in_our_own_package_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def importing(name: str) -> None:
        raise ModuleNotFoundError("No module named 'crafts_core.x'", name="crafts_core.x")

    monkeypatch.setattr(programs.importlib, "import_module", importing)
    with pytest.raises(ModuleNotFoundError):
        programs.crafts()


def test_arguments_show_their_help() -> None:
    """typer 0.20 loses it with click 8.5."""
    result = CliRunner().invoke(app, ["sample", "--help"])
    assert "Exported generator or foundation." in " ".join(result.output.replace("│", "").split())


def test_no_colour_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("FORCE_COLOR", "")
    assert "\x1b[" not in CliRunner().invoke(app, ["--help"]).output


UNIX_ONLY = {"fcntl", "grp", "pwd", "resource", "termios"}


def test_nothing_is_imported_at_the_top_that_macos_or_windows_lack() -> None:
    """Core imports everywhere; what only Linux has is asked for where only Linux runs."""
    root = Path(__file__).parents[2]
    paths = [
        path for top in ("crafts_core", "client", "server") for path in root.glob(f"{top}/**/*.py")
    ]
    assert len(paths) > 100
    for path in paths:
        tops = [
            node
            for node in ast.parse(path.read_text()).body
            if isinstance(node, ast.Import | ast.ImportFrom)
        ]
        names = {
            name
            for node in tops
            for name in (*(each.name for each in node.names), getattr(node, "module", ""))
        }
        assert not names & UNIX_ONLY, path


def test_programs_start_where_affinity_is_unknown() -> None:
    code = "import os; del os.sched_getaffinity; import crafts_client.cli; print('imported')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "imported\n", done.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_shells_can_complete(shell: str) -> None:
    told = CliRunner().invoke(
        app, [], env={"_CRAFTS_COMPLETE": f"source_{shell}"}, prog_name="crafts"
    )
    assert "_CRAFTS_COMPLETE=complete_" in told.output
