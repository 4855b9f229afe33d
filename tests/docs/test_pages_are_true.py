"""README and docs name commands, options and files that exist, and their examples run."""

import importlib
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
from typer.main import get_command

from crafts_client.cli import app as client
from crafts_core.cli import app as crafts
from crafts_server import aggregation
from crafts_server.cli import app as server
from crafts_simulations.cli import app as simulations
from crafts_simulations.report import weighed_by
from crafts_simulations.scenario import load_scenario, parse_scenario
from support.foundations import write_tiny_pipeline

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "deploy" / "README.md", *ROOT.glob("docs/**/*.md")])
PROGRAMS = {
    "crafts": crafts,
    "crafts-client": client,
    "crafts-server": server,
    "crafts-sim": simulations,
}
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s#]+)(?:#[^)\s]*)?\)")


def blocks(page: Path, *languages: str) -> list[str]:
    return [text for kind, text in BLOCK.findall(page.read_text()) if kind in languages]


def commands(page: Path) -> Iterator[list[str]]:
    """The words of every command of ours that a page shows."""
    for text in blocks(page, "sh", ""):
        for line in text.replace("\\\n", " ").splitlines():
            for part in re.split(r"&&|;", line.partition(" #")[0]):
                words = shlex.split(part) if part.count('"') % 2 == 0 else []
                if words and words[0] in PROGRAMS:
                    yield words


def problem(words: list[str]) -> str | None:
    """Why a command would be refused before it did anything, or None."""
    command: click.Command = get_command(PROGRAMS[words[0]])
    rest = words[1:]
    while isinstance(command, click.Group):
        if " ".join(rest[:2]) in command.commands:  # "evaluate downstream", beside "evaluate"
            rest = [" ".join(rest[:2]), *rest[2:]]
        names = rest[0].split("/") if rest else []
        if not names or set(names) - command.commands.keys():
            return f"no command {rest[:1]}"
        command, rest = command.commands[names[0]], rest[1:]
    options = {name for each in command.params for name in (*each.opts, *each.secondary_opts)}
    for word in rest:
        if word.startswith("-") and word.partition("=")[0] not in {*options, "--help"}:
            return f"no option {word}"
    given = {word.partition("=")[0] for word in rest}
    for each in command.params:
        if each.required and isinstance(each, click.Option) and not given & {*each.opts, "--help"}:
            return f"{each.opts[0]} is missing"
    return None


def test_enough_commands_are_found_to_mean_anything() -> None:
    assert sum(1 for page in PAGES for _ in commands(page)) > 80
    assert problem(["crafts-client", "approve"]) == "no command ['approve']"
    assert problem(["crafts-client", "plan", "list", "--all"]) == "no option --all"
    assert problem(["crafts", "evaluate", "--validate", "TILES"]) == "--real is missing"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_and_files_that_a_page_names_exist(page: Path) -> None:
    refused = [(" ".join(words), found) for words in commands(page) if (found := problem(words))]
    assert not refused
    links = [link for link in LINK.findall(page.read_text()) if "://" not in link]
    assert not [link for link in links if not (page.parent / link).exists()]


def test_the_packages_own_page_leads_nowhere_into_the_repository() -> None:
    """It is shown by package indexes and `pip show`, where there is none."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    text = project["readme"]["text"]
    assert all(link.startswith("https://") for link in LINK.findall(text))
    assert {name for name in PROGRAMS if f"`{name}`" in text} == PROGRAMS.keys()
    named = set(re.findall(r"`([a-z-]+)`", text))
    assert named & project["optional-dependencies"].keys() >= {"client", "server", "simulations"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_python_of_a_page_is_python(page: Path) -> None:
    for text in blocks(page, "python"):
        compile(text, str(page), "exec")


def test_the_researchers_rule_is_all_that_another_rule_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pasted where the page says: a scenario and a plan name it, and a report calls it so."""
    page = ROOT / "docs" / "tutorials" / "researcher.md"
    text = (ROOT / "server" / "crafts_server" / "aggregation.py").read_text(encoding="utf-8")
    head, registry = text.split("RULES: ")
    rule, name = blocks(page, "python")[0], '"squared_precision": SquaredPrecision'
    assert f"`{name}`" in " ".join(page.read_text(encoding="utf-8").replace("\n", " ").split())
    changed = f"{head}\n{rule}\n\nRULES: " + registry.replace("= {", f"= {{\n    {name},", 1)
    (tmp_path / "changed_aggregation.py").write_text(changed, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("changed_aggregation")
    monkeypatch.setattr(aggregation, "RULES", module.RULES)
    scenario = load_scenario("quickstart")
    values = scenario.model_dump(mode="json")
    values["aggregation"]["rule"] = "squared_precision"
    plan = parse_scenario(values, "of the page").plan("0" * 64)
    sites: Any = [SimpleNamespace(noise_variance=variance) for variance in (1.0, 0.5)]
    found = aggregation.rule_of(plan.aggregation)
    assert found.weights(sites) == pytest.approx([0.2, 0.8])
    assert weighed_by(plan) == "rule squared_precision"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")  # a tiny encoder reads no caption to its end
@pytest.mark.parametrize("page", ["use.md", "tutorials/recipient.md", "reference/python.md"])
def test_a_recipients_examples_run(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in ("generator", "runs/quickstart/generator"):
        write_tiny_pipeline(tmp_path / place, seed=3)
    monkeypatch.chdir(tmp_path)
    text = blocks(ROOT / "docs" / page, "python")[0].replace("per_type=100", "per_type=2")
    exec(compile(text, page, "exec"), {})
    assert list(tmp_path.glob("*.png"))
    assert (tmp_path / "set" / "manifest.json").is_file() == (page == "use.md")
