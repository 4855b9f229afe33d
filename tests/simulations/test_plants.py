"""What is planted into a program for a fault does what the table says."""

import os
import subprocess
import sys
import time
from pathlib import Path

from crafts_simulations.faults import plants

PROGRAM = "# crafts_server.cli\n"


def run_with(folder: str, code: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": folder},
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_clock_is_off_by_both_names_and_dates_stay_dates(tmp_path: Path) -> None:
    code = """
import time
from datetime import UTC, date, datetime, timezone
print(time.time(), datetime.now(UTC).timestamp(), datetime.now().timestamp())
print(isinstance(datetime.fromisoformat("2026-01-01"), datetime))
print(isinstance(date.today(), datetime))
"""
    said, _ = run_with(plants.clock(tmp_path / "clock", -3600.0), code).communicate()
    times, *kinds = said.splitlines()
    assert all(abs(float(each) + 3600 - time.time()) < 60 for each in times.split())
    assert kinds == ["True", "False"]


def test_a_program_stands_still_where_it_is_paused(tmp_path: Path) -> None:
    pause = plants.pause(
        *(tmp_path / "pause", "crafts_server", "fractions:Fraction.limit_denominator"),
        when="len(args) == 2",
    )
    code = PROGRAM + (
        "from fractions import Fraction as F\n"
        "print(F(1, 3).limit_denominator(), flush=True)\n"
        "print(F(1, 3).limit_denominator(2), flush=True)\n"
    )
    program = run_with(pause.first_import_from, code)
    deadline = time.monotonic() + 20
    while not pause.reached.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert pause.reached.exists()
    program.kill()
    said, _ = program.communicate()
    assert said == "1/3\n", "another call is not the point"


def test_another_program_is_not_paused(tmp_path: Path) -> None:
    pause = plants.pause(tmp_path / "pause", "crafts_client", "fractions:Fraction.conjugate")
    code = PROGRAM + "from fractions import Fraction as F\nprint(F(1, 3).conjugate())\n"
    said, _ = run_with(pause.first_import_from, code).communicate(timeout=20)
    assert said == "1/3\n"
