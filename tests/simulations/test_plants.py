"""What is planted into a program for a fault does what the table says."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from crafts_core.exchange import Announcement
from crafts_core.roster import Roster
from crafts_privacy import signing
from crafts_privacy.secure_aggregation.members import verify_members
from crafts_simulations.faults import plants
from support.sums import PLAN, roster_of, sum_sites

PROGRAM = "# crafts_server.cli\n"


def run_with(folder: str, code: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": folder},
        stdout=subprocess.PIPE,
        text=True,
    )


def stands_still(pause: plants.Pause) -> bool:
    deadline = time.monotonic() + 20
    while not pause.reached.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    return pause.reached.exists()


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
    assert stands_still(pause)
    program.kill()
    said, _ = program.communicate()
    assert said == "1/3\n", "another call is not the point"


def test_a_paused_program_goes_on_once_it_is_told(tmp_path: Path) -> None:
    pause = plants.pause(
        *(tmp_path / "pause", "crafts_server", "fractions:Fraction.conjugate"), before=True
    )
    code = PROGRAM + (
        "from fractions import Fraction as F\n"
        "print(F(1, 3).conjugate(), F(1, 4).conjugate(), flush=True)\n"
    )
    program = run_with(pause.first_import_from, code)
    assert stands_still(pause)
    pause.reached.unlink()
    said, _ = program.communicate(timeout=20)
    assert said == "1/3 1/4\n", "it stands still once, not at each call"


def test_another_program_is_not_paused(tmp_path: Path) -> None:
    pause = plants.pause(tmp_path / "pause", "crafts_client", "fractions:Fraction.conjugate")
    code = PROGRAM + "from fractions import Fraction as F\nprint(F(1, 3).conjugate())\n"
    said, _ = run_with(pause.first_import_from, code).communicate(timeout=20)
    assert said == "1/3\n"


@pytest.mark.slow
def test_a_ghost_that_is_announced_passes_for_a_site_where_its_key_is_known(tmp_path: Path) -> None:
    """So that hospitals refuse it for nothing but their roster."""
    key = signing.create_signing_key(tmp_path / "ghost.key")
    plant = plants.announcing(
        tmp_path / "plant", ghost="ghost", key=tmp_path / "ghost.key", patients=9
    )
    sites = sum_sites(2)
    code = PROGRAM + (
        "import crafts_server.sums as module\n"
        "from crafts_core.exchange import ReadyReply\n"
        f"words = {[site.ready.model_dump_json() for site in sites.values()]!r}\n"
        "members = [ReadyReply.model_validate_json(word) for word in words]\n"
        "print(module.announce(members).to_json())\n"
    )
    said, _ = run_with(os.pathsep.join([plant, *sys.path]), code).communicate(timeout=60)
    announced, honest = Announcement.parse(said), roster_of(sites)
    with_ghost = Roster.of(PLAN, honest.patients | {"ghost": 9}, honest.identities | {"ghost": key})
    own = sites["site-01"].ready
    assert verify_members(announced, with_ghost, own, min_members=3).keys.keys() == {
        *("ghost", "site-01", "site-02")
    }


@pytest.mark.slow
def test_made_up_words_replace_a_vector_and_nothing_else(tmp_path: Path) -> None:
    code = PROGRAM.replace("server", "client") + (
        "import numpy as np, torch\n"
        "import crafts_client.messages as module\n"
        "from types import SimpleNamespace\n"
        "from crafts_core.array_bytes import PACKED\n"
        "from crafts_core.exchange import MaskedReply\n"
        "names = ('plan_hash', 'request_hash', 'members_hash', 'schema_hash')\n"
        f"hashes = dict.fromkeys(names, {PLAN!r})\n"
        "reply = MaskedReply(site='a', run_id='r', round=1, own_noise_multiplier=2.0, **hashes)\n"
        "vector = {PACKED: torch.zeros(64, dtype=torch.int32)}\n"
        "told = module.write_reply(SimpleNamespace(reply=reply, delta=vector))\n"
        "words = told.array_records['sum'][PACKED].numpy()\n"
        "print(words.dtype, len(set(words.tolist())), told.config_records['masked']['site'])\n"
    )
    plant = plants.garbage(tmp_path / "plant")
    said, _ = run_with(os.pathsep.join([plant, *sys.path]), code).communicate(timeout=60)
    assert said == "uint32 64 a\n"
