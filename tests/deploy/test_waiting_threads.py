"""Every program tells OpenMP to wait asleep before torch is there to read it."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import importlib, os, sys
class Spy:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(os.environ.get("OMP_WAIT_POLICY"), os.environ.get("GOMP_SPINCOUNT"))
            sys.stdout.flush()
            os._exit(0)
sys.meta_path.insert(0, Spy())
for name in sys.argv[1:]:
    importlib.import_module(name)
"""
ENTRIES = [
    ("crafts_core.cli", "crafts_core.sampling"),
    ("crafts_client.cli", "crafts_client.trainer"),
    ("crafts_client.client_app",),
    ("crafts_server.cli", "crafts_core.foundation"),
    ("crafts_simulations.cli", "crafts_simulations.run"),
    ("crafts",),
]


@pytest.mark.parametrize("modules", ENTRIES)
def test_the_policy_is_set_before_torch_is_imported(modules: tuple[str, ...]) -> None:
    ours = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    environment["PYTHONPATH"] = ":".join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *modules],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "passive 3000\n"


def test_what_the_machines_owner_set_stays() -> None:
    words = (
        "import os, crafts_core; "
        "print(os.environ['OMP_WAIT_POLICY'], 'GOMP_SPINCOUNT' in os.environ)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    environment |= {"OMP_WAIT_POLICY": "active", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", words], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "active False\n"
