"""A process killed at any instruction never leaves the ledger below what was released.

Run as a script, this file is the driver: it forks sites that reserve, commit and release rounds,
kills each with SIGKILL at a named point or at a random time, restarts, and compares the ledger
with an outside witness of what left. The driver is its own process because forking pytest, with
torch's threads in it, would not be safe.
"""

import argparse
import hashlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.orm import Session

from crafts_privacy import ledger_store
from crafts_privacy.accounting import PrivacyEvent
from crafts_privacy.ledger import EntryKind, Ledger

EVENT = PrivacyEvent(noise_multiplier=50.0, sample_rate=1.0, steps=1)
POINTS = [
    f"{moment} {what}"
    for what in ("database commit", "witness write", "sync", "rename", "release")
    for moment in ("before", "after")
]


def released_rounds(outside: Path) -> list[int]:
    if not outside.exists():
        return []
    return [int(line) for line in outside.read_text().splitlines()]


def release(outside: Path, number: int) -> None:
    with outside.open("a") as file:
        file.write(f"{number}\n")
        file.flush()
        os.fsync(file.fileno())


def run_site(folder: Path, rounds: int, broken: bool) -> None:
    """Train some rounds; one committed before a crash is sent without training again."""
    ledger, outside = Ledger(folder / "ledger.db"), folder / "outside"
    for number in range(len(released_rounds(outside)) + 1, rounds + 1):
        if broken:
            release(outside, number)
        committed = {e.round for e in ledger.entries() if e.kind is EntryKind.COMMITTED}
        if number not in committed:
            reservation = ledger.reserve(
                cohort="breast",
                plan_hash="a" * 64,
                run_id="run",
                round=number,
                stage="pretraining",
                event=EVENT,
                max_epsilon=100.0,
                delta=1e-4,
            )
            ledger.commit(reservation, hashlib.sha256(str(number).encode()).hexdigest())
        if not broken:
            release(outside, number)


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
    Session.commit = killing(Session.commit, point, "database commit", occurrence)
    ledger_store.write_head = killing(ledger_store.write_head, point, "witness write", occurrence)
    os.fsync = killing(os.fsync, point, "sync", occurrence)
    Path.replace = killing(Path.replace, point, "rename", occurrence)
    globals()["release"] = killing(release, point, "release", occurrence)


def run_and_kill(folder: Path, rounds: int, broken: bool, kill: tuple[str, int] | float) -> bool:
    """Fork a site and kill it; whether it died of that."""
    child = os.fork()
    if child == 0:
        if isinstance(kill, tuple):
            arm(*kill)
        run_site(folder, rounds, broken)
        os._exit(0)
    if isinstance(kill, float):
        time.sleep(kill)
        os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def violations(folder: Path) -> list[str]:
    """What the ledger on disk fails to cover, and what it charges twice."""
    entries = Ledger(folder / "ledger.db").entries()
    left = released_rounds(folder / "outside")
    reserved = [e.round for e in entries if e.kind is EntryKind.RESERVED]
    committed = [e.round for e in entries if e.kind is EntryKind.COMMITTED]
    found = [f"round {r} left without a charge" for r in left if r not in reserved]
    found += [f"round {r} left without a commit" for r in left if r not in committed]
    found += [f"round {r} charged twice" for r in set(reserved) if reserved.count(r) > 1]
    return found


def drive(folder: Path, kills: int, seed: int, broken: bool) -> dict[str, Any]:
    generator = random.Random(seed)
    done: int = 0
    found: list[str] = []
    # Every named point in turn, each third kill at a random time instead.
    named = ((point, generator.randint(1, 3)) for point in itertools.cycle(POINTS))
    for attempt in itertools.count(1):
        if done == kills:
            break
        rounds = len(released_rounds(folder / "outside")) + 3
        kill = next(named) if attempt % 3 else generator.uniform(0.0, 0.15)
        done += run_and_kill(folder, rounds, broken, kill)
        found += violations(folder)
    run_site(folder, len(released_rounds(folder / "outside")) + 1, broken=False)
    found += violations(folder)
    return {"kills": done, "released": released_rounds(folder / "outside"), "violations": found}


def driven(folder: Path, *options: str) -> dict[str, Any]:
    roots = os.pathsep.join(path for path in sys.path if path)
    finished = subprocess.run(
        [sys.executable, __file__, str(folder), *options],
        env=os.environ | {"PYTHONPATH": roots, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    result: dict[str, Any] = json.loads(finished.stdout)
    return result


@pytest.mark.parametrize(
    "kills", [pytest.param(20, id="20"), pytest.param(80, id="80", marks=pytest.mark.slow)]
)
def test_no_kill_leaves_the_ledger_below_what_was_released(tmp_path: Path, kills: int) -> None:
    result = driven(tmp_path, "--kills", str(kills), "--seed", str(kills))
    assert result["violations"] == []
    assert result["kills"] == kills
    assert result["released"] == list(range(1, len(result["released"]) + 1))


def test_a_site_that_releases_before_it_charges_is_caught(tmp_path: Path) -> None:
    """Control: the outside witness does see an under-counting site."""
    result = driven(tmp_path, "--kills", "15", "--seed", "1", "--broken")
    assert any("without a charge" in violation for violation in result["violations"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--broken", action="store_true")
    chosen = parser.parse_args()
    print(json.dumps(drive(chosen.folder, chosen.kills, chosen.seed, chosen.broken)))
