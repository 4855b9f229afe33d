"""A site killed at any instruction never leaves its ledger below what was released.

Run as a script, this file is the driver: it forks sites that train and release rounds, kills each
with SIGKILL at a named point or at a random time, restarts, and compares the ledger with an outside
witness of what left. The driver is its own process because forking pytest, with the threads of
many libraries in it, would not be safe.
"""

import argparse
import gc
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sqlalchemy.orm import Session

from crafts_client.home import SiteHome
from crafts_client.mechanism import mechanism_of
from crafts_client.outbox import Outbox
from crafts_client.site import Site
from crafts_core.foundation import Foundation, load
from crafts_core.plan import Plan
from crafts_privacy import ledger_store
from crafts_privacy.ledger import EntryKind, Ledger
from crafts_privacy.patient_sgd import PatientSGD
from crafts_simulations.small_study import DECLARED_PATIENTS
from support.foundations import write_tiny_foundation
from support.sites import Coordinator, make_site_home, plan_values

POINTS = [
    f"{moment} {what}"
    for what in (
        "reservation", "step", "seal", "database commit", "witness write", "sync", "rename",
        "release",
    )
    for moment in ("before", "after")
]  # fmt: skip


class Study:
    """One home, one coordinator, one plan of more rounds than any test needs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.foundation = load(write_tiny_foundation(folder / "foundation"))
        self.coordinator = Coordinator(folder, self.foundation)
        self.plan = study_plan(self.foundation)
        self.state = self.coordinator.start(self.plan)

    def request(self, number: int) -> Any:
        request = self.coordinator.request(self.plan, self.state, number=number)
        return self.coordinator.message(self.plan, self.state, request=request)


def study_plan(foundation: Foundation) -> Plan:
    """As little training as there can be: what is killed is everything around it."""
    values = plan_values(foundation.manifest.hash)
    values["adapter"] |= {"targets": ["to_q"]}  # type: ignore[operator]
    values["privacy"] |= {"tiles_per_patient": 1, "draws_per_tile": 1}  # type: ignore[operator]
    values["stage"] = [
        {"name": "pretraining", "rounds": 2000, "local_steps": 1, "learning_rate": 0.01}
    ]
    return Plan.parse(values)


def released(outside: Path) -> list[tuple[int, str]]:
    """The outside witness: what left, in order."""
    if not outside.exists():
        return []
    lines = [line.split() for line in outside.read_text().splitlines()]
    return [(int(number), digest) for number, digest in lines]


def release(outside: Path, number: int, digest: str) -> None:
    with outside.open("a") as file:
        file.write(f"{number} {digest}\n")
        file.flush()
        os.fsync(file.fileno())


def run_site(study: Study, rounds: int, broken: bool) -> None:
    """Answer the coordinator until so many rounds have left."""
    outside = study.folder / "outside"
    site = Site(SiteHome.open(study.folder / "site"), study.foundation)
    for number in range(len(released(outside)) + 1, rounds + 1):
        if broken:
            release(outside, number, "0")
        answer = site.answer(study.request(number))
        if not broken:
            release(outside, number, answer.hash)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killing(call: Callable[..., Any], point: str, target: str, occurrence: int) -> Any:
    """``call``, but the process dies before or after its nth time if that is the point."""
    count = 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += target in point
        if point == f"before {target}" and count == occurrence:
            die()
        result = call(*args, **kwargs)
        if point == f"after {target}" and count == occurrence:
            die()
        return result

    return wrapped


def arm(point: str, occurrence: int) -> None:
    """Patch this process (a fork that will die) so that it is killed at the point."""
    for owner, name, what in (
        (Ledger, "reserve", "reservation"),
        (PatientSGD, "step_in_groups", "step"),
        (Outbox, "seal", "seal"),
        (Session, "commit", "database commit"),
        (ledger_store, "write_head", "witness write"),
        (os, "fsync", "sync"),
        (Path, "replace", "rename"),
    ):
        setattr(owner, name, killing(getattr(owner, name), point, what, occurrence))
    globals()["release"] = killing(release, point, "release", occurrence)


def run_and_kill(study: Study, rounds: int, broken: bool, kill: tuple[str, int] | float) -> bool:
    """Fork a site and kill it; whether it died of that."""
    child = os.fork()
    if child == 0:
        if isinstance(kill, tuple):
            arm(*kill)
        try:
            run_site(study, rounds, broken)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if isinstance(kill, float):
        time.sleep(kill)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or status == 0, "the site failed by itself"
    return os.WIFSIGNALED(status)


def violations(folder: Path) -> list[str]:
    """What the ledger on disk fails to cover, and what it charges twice."""
    entries = Ledger(folder / "site" / "ledger.db").entries()
    left = released(folder / "outside")
    reserved = [e.round for e in entries if e.kind is EntryKind.RESERVED]
    committed = {e.round: e.detail for e in entries if e.kind is EntryKind.COMMITTED}
    found = [f"round {r} left without a charge" for r, _ in left if r not in reserved]
    found += [f"round {r} left without a commit of it" for r, h in left if committed.get(r) != h]
    found += [f"round {r} charged twice" for r in set(reserved) if reserved.count(r) > 1]
    return found


def drive(folder: Path, kills: int, seed: int, broken: bool) -> dict[str, Any]:
    torch.set_num_threads(1)
    study = Study(folder)
    child = os.fork()  # what writing tiles starts, no later fork inherits
    if child == 0:
        signer = study.coordinator.public_key
        make_site_home(folder / "site", study.foundation, signer, max_rounds=2000)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    mechanism_of(study.plan, declared_patients=DECLARED_PATIENTS)  # once for all forks
    gc.freeze()  # a collection in a fork would copy every page of the libraries
    generator = random.Random(seed)
    done: int = 0
    found: list[str] = []
    # Every named point in turn, each third kill at a random time instead.
    named = ((point, generator.randint(1, 3)) for point in itertools.cycle(POINTS))
    for attempt in itertools.count(1):
        if done == kills:
            break
        rounds = len(released(folder / "outside")) + 3
        kill = next(named) if attempt % 3 else generator.uniform(0.0, 0.4)
        done += run_and_kill(study, rounds, broken, kill)
        found += violations(folder)
    run_site(study, len(released(folder / "outside")) + 1, broken=False)
    found += violations(folder)
    left = [number for number, _ in released(folder / "outside")]
    return {"kills": done, "released": left, "violations": found}


def driven(folder: Path, *options: str) -> dict[str, Any]:
    roots = os.pathsep.join(path for path in sys.path if path)
    finished = subprocess.run(
        [sys.executable, __file__, str(folder), *options],
        env=os.environ | {"PYTHONPATH": roots, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1100,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    result: dict[str, Any] = json.loads(finished.stdout)
    return result


@pytest.mark.timeout(1200)  # a minute of work, ten where many share two cores
@pytest.mark.parametrize(
    "kills", [pytest.param(20, id="20"), pytest.param(200, id="200", marks=pytest.mark.exhaustive)]
)
def test_no_kill_leaves_the_ledger_below_what_was_released(tmp_path: Path, kills: int) -> None:
    result = driven(tmp_path, "--kills", str(kills), "--seed", str(kills))
    assert result["violations"] == []
    assert result["kills"] == kills
    assert result["released"] == list(range(1, len(result["released"]) + 1))


def test_a_site_that_releases_before_it_charges_is_caught(tmp_path: Path) -> None:
    """Control: the outside witness does see an under-counting site."""
    result = driven(tmp_path, "--kills", "5", "--seed", "1", "--broken")
    assert any("without a charge" in violation for violation in result["violations"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--broken", action="store_true")
    chosen = parser.parse_args()
    print(json.dumps(drive(chosen.folder, chosen.kills, chosen.seed, chosen.broken)))
