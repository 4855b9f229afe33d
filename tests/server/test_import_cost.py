"""Commands that only read state answer at once: nothing heavy is imported for them."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from crafts_client import doctor
from crafts_client.budget import budget_of, left_for
from crafts_client.offered_plans import judge
from crafts_core.exchange import SignedPlan
from crafts_core.plan import Plan
from crafts_privacy import signing
from crafts_server.home import CoordinatorHome, HomeConfig
from support.charges import charge
from support.sites import Coordinator, make_site_home, plan_values, write_plan

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
exec(sys.argv[4])
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


def run(
    module: str, commands: list[list[str]], *, first: str = ""
) -> tuple[list[int], list[str], float]:
    """Exit codes, heavy modules and seconds of a process that runs ``first``, then commands."""
    names = json.dumps(sorted(HEAVY))
    words = [sys.executable, "-c", PROGRAM, module, json.dumps(commands), names, first]
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


OFFERING = """
from types import SimpleNamespace
from crafts_client import enrolment
class Registrar:
    def __init__(self, home): ...
    __enter__ = lambda self: self
    __exit__ = lambda *_: None
    call = lambda self, name: SimpleNamespace(plans=[SimpleNamespace(**PLAN, has_finished=False)])
enrolment.Registrar = Registrar
"""


@pytest.mark.slow
def test_what_was_counted_once_is_shown_at_once(tmp_path: Path, foundation) -> None:
    """Of a charged cohort with a filter that counts: no accountant's library, and no torch."""
    coordinator = Coordinator(tmp_path, foundation)
    filters = ("sums", "renyi:8")
    site = make_site_home(
        tmp_path / "site", foundation, coordinator.public_key, lifetime_filters=filters
    )
    plan, file = coordinator.plan(), write_plan(tmp_path, plan_values(foundation.manifest.hash))
    charge(site, plan)
    signed = SignedPlan(
        json=plan.to_json(),
        signature=signing.sign(coordinator._key, plan.to_json().encode()),
        public_key=coordinator.public_key,
    )
    assert judge(site, signed).refused == ()
    assert budget_of(site).steps == 2
    assert left_for(site, file)["steps_left_of_this_plan"] > 0
    list(doctor.ledger(site))

    where = ["--home", str(site.path)]
    words = (["plan", "list"], ["plan", "show", plan.hash], ["budget"], ["doctor"])
    commands = [*words, ["budget", "--plan", str(file)]]
    codes, heavy, seconds = run(
        "crafts_client.cli",
        [[*each, *where] for each in commands],
        first=f"PLAN = {asdict(signed)!r}\n{OFFERING}",
    )
    assert codes == [0, 0, 0, 1, 0], "a site that never enrolled is not ready"
    assert heavy == ["grpc", "numpy", "openslide"]
    assert seconds < MOST_S
