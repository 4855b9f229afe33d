"""Commands that only read state answer at once: nothing heavy is imported for them."""

import json
import subprocess
import sys
from pathlib import Path

from crafts_core.plan import Plan
from crafts_server.home import CoordinatorHome, HomeConfig
from support.sites import make_site_home, plan_values

HEAVY = {
    "alembic",
    "torch",
    "diffusers",
    "transformers",
    "flwr",
    "peft",
    "scipy",
    "numpy",
    "grpc",
    "openslide",
}
MOST_S = 5.0
"""Of one core for all commands together: five times what they took, for a busy machine."""
PROGRAM = """
import json, sys, time
from contextlib import redirect_stdout
from importlib import import_module
from io import StringIO
app = import_module(sys.argv[1]).app
codes = []
for words in json.loads(sys.argv[2]):
    with redirect_stdout(StringIO()):
        try:
            app(words)
        except SystemExit as end:
            codes.append(end.code)
heavy = sorted(set(json.loads(sys.argv[3])) & sys.modules.keys())
print(json.dumps([codes, heavy, time.process_time()]))
"""


def run(module: str, commands: list[list[str]]) -> tuple[list[int], list[str], float]:
    words = [sys.executable, "-c", PROGRAM, module, json.dumps(commands), json.dumps(sorted(HEAVY))]
    environment = {"PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(words, check=True, env=environment, capture_output=True, text=True)
    codes, heavy, seconds = json.loads(done.stdout)
    return codes, heavy, seconds


def test_reading_the_coordinators_state_imports_nothing_heavy(tmp_path: Path, foundation) -> None:
    home = CoordinatorHome.create(tmp_path / "c", HomeConfig(foundation=str(foundation.path)))
    plan = Plan.parse(plan_values(foundation.manifest.hash))
    home.sign_plan(plan)
    registry = home.registry()
    registry.start_run("run", plan.hash)
    registry.close()
    where = ["--home", str(home.path)]
    commands = [
        *(["runs", "list", *where], ["runs", "show", "run", *where], ["sites", "list", *where]),
        *(["log", "show", *where], ["log", "verify", *where], ["status", *where]),
        *(["sites", "invite", "north", "--patients", "7", *where], ["status", "--json", *where]),
    ]
    codes, heavy, seconds = run("crafts_server.cli", commands)
    assert codes == [0] * len(commands)
    assert heavy == []
    assert seconds < MOST_S


def test_reading_a_sites_state_imports_nothing_heavy(tmp_path: Path, foundation) -> None:
    """numpy comes with the ledger and grpc with the address book; both are small."""
    site = make_site_home(tmp_path / "site", foundation, "nobody")
    where = ["--home", str(site.path)]
    words = (["policy", "show"], ["foundation", "list"], ["status"])
    codes, heavy, seconds = run("crafts_client.cli", [[*each, *where] for each in words])
    assert (codes, heavy) == ([0] * len(words), ["grpc", "numpy"])
    assert seconds < MOST_S
