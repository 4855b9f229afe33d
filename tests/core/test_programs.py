"""A program without its extra says what to install, also for ``--help``."""

import sys

import pytest
from typer.testing import CliRunner

from crafts_core import programs
from crafts_core.cli import app


@pytest.mark.parametrize(
    ("program", "module", "told"),
    [
        (programs.client, "crafts_client.cli", "crafts-client: flwr is not installed; run: pip "
         "install 'crafts-federated[client]'"),
        (programs.simulations, "crafts_simulations.cli", "'crafts-federated[simulations]'"),
        (programs.crafts, "crafts_core.cli", "pip install 'crafts-federated' (or"),
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
